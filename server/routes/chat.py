"""POST /v1/chat/completions: the next message of a conversation, `n` times, whole or as a stream."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response

from vashista.engine.errors import VashistaError
from vashista.engine.messages import TokenEvent
from vashista.engine.prompt_logprobs import unpacked
from vashista.server.account import account_of
from vashista.server.endpoint import COMPLETION, Endpoint, json_response
from vashista.server.generation import Generation
from vashista.server.logprobs import chat_logprobs, prompt_logprobs
from vashista.server.openai_errors import encode_error
from vashista.server.reply import DONE, ChoiceParts, Reply, collect, encode_json, error_event, usage_chunk, written
from vashista.server.schemas.chat import ChatRequest
from vashista.server.schemas.responses import AssistantMessage, ChatChoice, ChatCompletion, ChatLogprobs, PromptLogprobs
from vashista.server.served_model import ServedModel
from vashista.server.services import Services
from vashista.server.sse import StreamResponse, run_until_disconnect


def endpoints() -> list[Endpoint]:
    """The one endpoint of this file."""
    return [
        Endpoint(
            method="POST",
            path="/v1/chat/completions",
            handler=create_chat_completion,
            summary="Continue a conversation",
            request=ChatRequest,
            response=ChatCompletion,
            streams=True,
            errors=COMPLETION,
        )
    ]


async def create_chat_completion(services: Services, request: Request) -> Response:
    """Parse, admit, generate, answer."""
    arrival_s = time.monotonic()
    body = await services.bodies.read(request, ChatRequest)
    admitted = await services.admission.admit(body, arrival_s, account_of(request).key)
    generation = Generation(admitted, services.engine, services.metrics, services.prices, services.forecaster)
    account_of(request).run(generation)
    reply = Reply.new("chatcmpl", services.model.name)
    writer = ChatWriter(body, services.model)
    if body.stream:
        chunks = ChatChunks(reply, writer, len(admitted.submits), include_usage=body.includes_usage)
        return StreamResponse(generation, chunks, services.metrics, request)
    with generation:
        choices = await run_until_disconnect(request.receive, collect(generation))
        usage = generation.usage()

        def write() -> Response:
            return json_response(
                ChatCompletion(
                    id=reply.id,
                    created=reply.created,
                    model=reply.model,
                    choices=[writer.choice(index, parts) for index, parts in enumerate(choices)],
                    usage=usage,
                    prompt_logprobs=writer.prompt_logprobs(choices[0]),
                )
            )

        return await written(write, choices)


class ChatWriter:
    """Log probabilities and messages as the request asks for them."""

    def __init__(self, request: ChatRequest, model: ServedModel) -> None:
        self._request = request
        self._model = model

    def logprobs(self, parts: TokenEvent | ChoiceParts) -> ChatLogprobs | None:
        """Of the tokens in `parts`."""
        if not self._request.logprobs:
            return None
        return chat_logprobs(self._model, parts.logprobs or [], self._request.top_logprobs or 0)

    def prompt_logprobs(self, parts: TokenEvent | ChoiceParts) -> PromptLogprobs | None:
        """The field of that name, if it was asked for and is there."""
        if self._request.prompt_logprobs is None or parts.prompt_logprobs is None:
            return None
        return prompt_logprobs(self._model, unpacked(parts.prompt_logprobs), self._request.prompt_logprobs)

    def choice(self, index: int, parts: ChoiceParts) -> ChatChoice:
        """The finished choice."""
        return ChatChoice(
            index=index,
            message=AssistantMessage(content="".join(parts.text)),
            logprobs=self.logprobs(parts),
            finish_reason=parts.reason,
            stop_reason=parts.stop_reason,
        )


class ChatChunks:
    """The stream of /v1/chat/completions: the role with the first token of a choice, then content."""

    def __init__(self, reply: Reply, writer: ChatWriter, num_choices: int, *, include_usage: bool) -> None:
        self._prefix = reply.chunk_prefix("chat.completion.chunk")
        self._writer = writer
        self._suffix = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._include_usage = include_usage
        self._has_begun = [False] * num_choices

    def encode(self, index: int, event: TokenEvent) -> bytes:
        """One chunk, unless the event brings nothing that the client can see; one more before a choice's first."""
        first = b""
        if not self._has_begun[index]:
            self._has_begun[index] = True
            first = self._first_chunk(index, event)
        if not event.text and event.logprobs is None and event.finish_reason is None:
            return first
        delta = b'{"content":' + encode_json(event.text) + b"}" if event.text or event.logprobs else b"{}"
        return b"".join(
            [
                first,
                self._prefix + b'[{"index":%d,"delta":' % index,
                delta,
                b',"logprobs":' + encode_json(self._writer.logprobs(event)),
                b',"finish_reason":' + encode_json(event.finish_reason),
                b',"stop_reason":' + encode_json(event.stop_reason),
                b"}]" + self._suffix,
            ]
        )

    def end(self, generation: Generation) -> bytes:
        """Usage if it was asked for, and the mark of the end."""
        return (usage_chunk(self._prefix, generation) if self._include_usage else b"") + DONE

    def error(self, error: VashistaError, request_id: str | None) -> bytes:
        """The error as an event."""
        return error_event(encode_error(error, request_id))

    def _first_chunk(self, index: int, event: TokenEvent) -> bytes:
        reported = self._writer.prompt_logprobs(event)
        return b"".join(
            [
                self._prefix + b'[{"index":%d,"delta":{"role":"assistant","content":""}' % index,
                b',"logprobs":null,"finish_reason":null}]',
                b"" if reported is None else b',"prompt_logprobs":' + encode_json(reported),
                self._suffix,
            ]
        )
