"""A small OpenAI-compatible server with known behaviour, in a thread of its own."""

import asyncio
import json
import threading
import time

import pytest

REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many", 500: "Error"}


def count_tokens(text):
    """One token for two letters of a word."""
    return sum((len(word) + 1) // 2 for word in text.split())


class FakeServer:
    """What it does is set by its attributes; what it was asked stands in `requests`."""

    def __init__(self):
        self.models = ["fake"]
        self.key = None
        self.has_tokenize = True
        self.tokenize_field = "prompt"
        self.has_usage = True
        self.tokens_per_chunk = 1
        self.chunk_delay_s = 0.0
        self.fail_every = 0
        self.cut_after_chunks = None
        self.error_after_chunks = None
        self.has_done = True
        self.closes_after_reply = False
        self.newline = "\n"
        self.requests = []
        self.chunk_times_s = []
        self.num_connections = 0
        self.num_in_flight = 0
        self.max_in_flight = 0
        self.hold_until_in_flight = 0
        self._has_enough = asyncio.Event()
        self._tasks = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve)
        self._ready = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def completions(self):
        return [body for path, body in self.requests if path.endswith("completions")]

    def __enter__(self):
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _serve(self):
        self._loop.run_until_complete(self._main())
        self._loop.close()

    async def _main(self):
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _handle(self, reader, writer):
        self.num_connections += 1
        self._tasks.add(asyncio.current_task())
        try:
            while await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._tasks.discard(asyncio.current_task())
            writer.close()

    async def _answer(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {key.lower(): value for key, value in (line.split(": ", 1) for line in head[1:] if line)}
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        body = json.loads(raw) if raw else None
        self.requests.append((path, body))
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            await self._json(writer, 401, {"error": {"message": "wrong key", "code": "invalid_api_key"}})
        elif path == "/v1/models":
            await self._json(writer, 200, {"object": "list", "data": [{"id": name} for name in self.models]})
        elif path == "/tokenize" and self.has_tokenize:
            await self._tokenize(writer, body)
        elif method == "POST" and path in {"/v1/completions", "/v1/chat/completions"}:
            self.num_in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self.num_in_flight)
            if self.num_in_flight >= self.hold_until_in_flight:
                self._has_enough.set()
            try:
                await self._has_enough.wait()
                return await self._complete(writer, body) and not self.closes_after_reply
            finally:
                self.num_in_flight -= 1
        else:
            await self._json(writer, 404, {"error": {"message": "no such path", "code": "not_found"}})
        return True

    async def _tokenize(self, writer, body):
        if self.tokenize_field not in body:
            await self._json(writer, 400, {"error": {"message": "wrong field"}})
            return
        value = body[self.tokenize_field]
        text = value if isinstance(value, str) else value[0]["content"]
        extra = 0 if isinstance(value, str) else 5
        await self._json(writer, 200, {"tokens": list(range(count_tokens(text) + extra))})

    async def _complete(self, writer, body):
        if self.fail_every and len(self.completions) % self.fail_every == 0:
            await self._json(writer, 429, {"error": {"message": "too many", "code": "queue_full"}})
            return True
        is_chat = "messages" in body
        prompt = body["messages"][0]["content"] if is_chat else body["prompt"]
        usage = {
            "prompt_tokens": count_tokens(prompt) + (5 if is_chat else 0),
            "completion_tokens": body["max_tokens"],
            "prompt_tokens_details": {"cached_tokens": 3},
        }
        if not body["stream"]:
            choice = {"index": 0, "finish_reason": "length"} | (
                {"message": {"content": "x"}} if is_chat else {"text": "x"}
            )
            await self._json(writer, 200, {"choices": [choice]} | ({"usage": usage} if self.has_usage else {}))
            return True
        return await self._stream(writer, body, is_chat, usage)

    async def _stream(self, writer, body, is_chat, usage):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        if is_chat:
            self._event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        left = body["max_tokens"]
        times = []
        while left:
            await asyncio.sleep(self.chunk_delay_s)
            if self.cut_after_chunks is not None and len(times) >= self.cut_after_chunks:
                writer.transport.abort()
                return False
            if self.error_after_chunks is not None and len(times) >= self.error_after_chunks:
                self._event(writer, {"error": {"message": "the engine died", "code": "engine_died"}}, name="error")
                break
            num = min(left, self.tokens_per_chunk)
            left -= num
            choice = {"delta": {"content": "t" * num}} if is_chat else {"text": "t" * num}
            times.append(time.perf_counter())
            self._event(
                writer, {"choices": [choice | {"finish_reason": None if left or not self.has_done else "length"}]}
            )
            await writer.drain()
        self.chunk_times_s.append(times)
        if self.has_usage and body.get("stream_options", {}).get("include_usage"):
            self._event(writer, {"choices": [], "usage": usage})
        if self.has_done:
            self._event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    def _event(self, writer, data, name=None):
        text = data if isinstance(data, str) else json.dumps(data)
        lines = ([f"event: {name}"] if name else []) + [f"data: {text}", "", ""]
        piece = self.newline.join(lines).encode()
        writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))

    async def _json(self, writer, status, value):
        body = json.dumps(value).encode()
        head = f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()


@pytest.fixture
def server():
    with FakeServer() as fake:
        yield fake
