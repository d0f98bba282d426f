"""What the load generator's own client costs: how late it notices a chunk, and the CPU time it spends on one.

    python bench/loadgen_overhead.py

A sender in another process streams chunks at fixed gaps and writes into each chunk when it was sent (both processes
read the same monotonic clock); the client notes when it saw it. The same is done with httpx, to show why the load
generator has a client of its own. "noticed late" includes the kernel and the sender's own write; "gap error" is the
gap that the client saw minus the gap between the sendings: what blurs an inter-token latency.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Coroutine
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import httpx

from vashista.server.loadgen.client import ReplyReader
from vashista.server.loadgen.connection import ConnectionPool, Endpoint
from vashista.server.loadgen.outcome import Outcome
from vashista.server.loadgen.report import table
from vashista.server.loadgen.statistics import Distribution

NUM_CHUNKS = 200
GAP_S = 0.010
LEVELS = (1, 16, 64)


def send_chunks(pipe: Connection) -> None:
    """The sender's process: a server that streams NUM_CHUNKS chunks at GAP_S to each request."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
        await reader.readexactly(int(length.split(b":")[1]))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        begin_s = time.perf_counter()
        for index in range(NUM_CHUNKS):
            await asyncio.sleep(max(0.0, begin_s + index * GAP_S - time.perf_counter()))
            text = f"{time.perf_counter():.7f}"
            chunk = {"id": "cmpl-1", "object": "text_completion", "choices": [{"index": 0, "text": text}]}
            _write(writer, json.dumps(chunk))
        _write(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        server.close()

    asyncio.run(main())


def _write(writer: asyncio.StreamWriter, data: str) -> None:
    event = f"data: {data}\n\n".encode()
    writer.write(b"%x\r\n%s\r\n" % (len(event), event))


Streams = list[list[tuple[float, float]]]
"""For each stream its chunks: (sent, seen), in seconds."""


class Tee:
    """Keeps the body beside what the load generator's reader does with it, to look up the sending times afterwards."""

    def __init__(self, reader: ReplyReader) -> None:
        self._reader = reader
        self.head = reader.head
        self.body: list[bytes] = []

    def data(self, piece: bytes, time_s: float) -> None:
        self._reader.data(piece, time_s)
        self.body.append(piece)


async def read_by_loadgen(port: int, num_streams: int) -> Streams:
    """Read with the load generator's client."""
    pool = ConnectionPool(Endpoint.parse(f"http://127.0.0.1:{port}"), api_key=None)

    async def read(index: int) -> tuple[Outcome, bytes]:
        outcome = Outcome(index=index, intended_s=0.0)
        reader = ReplyReader(outcome, is_streaming=True, origin_s=0.0)
        tee = Tee(reader)
        await pool.request("POST", "/v1/completions", b'{"prompt": "x"}', tee)
        reader.finish()
        return outcome, b"".join(tee.body)

    replies = await asyncio.gather(*(read(index) for index in range(num_streams)))
    pool.close()
    streams = []
    for outcome, body in replies:
        assert outcome.is_ok, outcome.error_message
        events = [event for event in body.split(b"\n\n") if event.startswith(b"data: {")]
        sent_s = [float(json.loads(event[6:])["choices"][0]["text"]) for event in events]
        streams.append(list(zip(sent_s, outcome.token_times_s, strict=True)))
    return streams


async def read_by_httpx(port: int, num_streams: int) -> Streams:
    """Read with httpx, as most load generators do."""

    async def read(client: httpx.AsyncClient) -> list[tuple[float, float]]:
        chunks = []
        async with client.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "x"}) as reply:
            async for line in reply.aiter_lines():
                now_s = time.perf_counter()
                if line.startswith("data: {"):
                    chunks.append((float(json.loads(line[6:])["choices"][0]["text"]), now_s))
        return chunks

    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
        return list(await asyncio.gather(*(read(client) for _ in range(num_streams))))


def measure(name: str, read: Callable[[int, int], Coroutine[Any, Any, Streams]], num_streams: int) -> list[str]:
    """One row of the table."""
    mine, theirs = multiprocessing.get_context("spawn").Pipe()
    sender = multiprocessing.get_context("spawn").Process(target=send_chunks, args=(theirs,))
    sender.start()
    port = mine.recv()
    cpu_s = cpu_time_s()
    streams = asyncio.run(read(port, num_streams))
    cpu_s = cpu_time_s() - cpu_s
    mine.send("end")
    sender.join()
    late = Distribution.of(seen - sent for stream in streams for sent, seen in stream)
    errors = Distribution.of(
        abs((after[1] - before[1]) - (after[0] - before[0])) for stream in streams for before, after in pairwise(stream)
    )
    assert late is not None
    assert errors is not None
    figures = [late.p50, late.p99, errors.p50, errors.p99, cpu_s / (num_streams * NUM_CHUNKS)]
    return [name, str(num_streams), *(f"{figure * 1e6:.0f}" for figure in figures)]


def cpu_time_s() -> float:
    """CPU seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> int:
    """Both clients at each number of streams."""
    load = os.getloadavg()[0]
    print(f"microseconds; {NUM_CHUNKS} chunks a stream, one each {GAP_S * 1e3:g} ms; load average {load:.2f}")
    rows = [["client", "streams", "noticed late p50", "p99", "gap error p50", "p99", "CPU a chunk"]]
    for num_streams in LEVELS:
        rows.append(measure("bench serve", read_by_loadgen, num_streams))
        rows.append(measure("httpx", read_by_httpx, num_streams))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
