"""POST /v1/completions: one or many prompts, each continued `n` times, whole or as a stream."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response

from vashista.engine.errors import EmptyPromptError, TokenOutOfVocabularyError, VashistaError
from vashista.engine.messages import TokenEvent
from vashista.engine.prompt_logprobs import unpacked
from vashista.server.account import account_of
from vashista.server.endpoint import COMPLETION, Endpoint, json_response
from vashista.server.generation import Generation
from vashista.server.logprobs import CompletionLogprobsWriter, join_completion_logprobs, prompt_logprobs
from vashista.server.openai_errors import encode_error
from vashista.server.reply import DONE, ChoiceParts, Reply, collect, encode_json, error_event, usage_chunk, written
from vashista.server.schemas.completions import CompletionRequest
from vashista.server.schemas.responses import Completion, CompletionChoice, CompletionLogprobs, PromptLogprobs
from vashista.server.served_model import ServedModel
from vashista.server.services import Services
from vashista.server.sse import StreamResponse, run_until_disconnect


def endpoints() -> list[Endpoint]:
    """The one endpoint of this file."""
    return [
        Endpoint(
            method="POST",
            path="/v1/completions",
            handler=create_completion,
            summary="Continue prompts",
            request=CompletionRequest,
            response=Completion,
            streams=True,
            errors=(*COMPLETION, EmptyPromptError, TokenOutOfVocabularyError),
        )
    ]


async def create_completion(services: Services, request: Request) -> Response:
    """Parse, admit, generate, answer."""
    arrival_s = time.monotonic()
    body = await services.bodies.read(request, CompletionRequest)
    admitted = await services.admission.admit(body, arrival_s, account_of(request).key)
    generation = Generation(admitted, services.engine, services.metrics, services.prices, services.forecaster)
    account_of(request).run(generation)
    reply = Reply.new("cmpl", services.model.name)
    writers = [ChoiceWriter(body, generation, services.model, index) for index in range(len(admitted.submits))]
    if body.stream:
        chunks = CompletionChunks(reply, writers, include_usage=body.includes_usage)
        return StreamResponse(generation, chunks, services.metrics, request)
    with generation:
        choices = await run_until_disconnect(request.receive, collect(generation))
        usage = generation.usage()

        def write() -> Response:
            return json_response(
                Completion(
                    id=reply.id,
                    created=reply.created,
                    model=reply.model,
                    choices=[writer.choice(parts) for writer, parts in zip(writers, choices, strict=True)],
                    usage=usage,
                )
            )

        return await written(write, choices)


class ChoiceWriter:
    """Text and log probabilities of one choice, the echoed prompt included."""

    def __init__(self, request: CompletionRequest, generation: Generation, model: ServedModel, index: int) -> None:
        self._request = request
        self._prompt = generation.admitted.prompts[index // generation.admitted.num_choices]
        self._model = model
        self._index = index
        self._writer = None if request.logprobs is None else CompletionLogprobsWriter(model, request.logprobs)

    def echo(self) -> str:
        """The text that stands before the generated one."""
        if not self._request.echo:
            return ""
        if self._prompt.text is not None:
            return self._prompt.text
        return self._model.tokenizer.decode(self._prompt.token_ids, skip_special_tokens=False)

    def logprobs(self, parts: TokenEvent | ChoiceParts) -> CompletionLogprobs | None:
        """Of the tokens in `parts`, and of the echoed prompt with the first of them."""
        if self._writer is None:
            return None
        pieces = []
        if self._request.echo and parts.prompt_logprobs is not None:
            pieces.append(self._writer.write(unpacked(parts.prompt_logprobs), self._prompt.token_ids))
        pieces.append(self._writer.write(parts.logprobs or [], [entry.token_id for entry in parts.logprobs or []]))
        return join_completion_logprobs(pieces)

    def prompt_logprobs(self, parts: TokenEvent | ChoiceParts) -> PromptLogprobs | None:
        """The field of that name, if it was asked for and is there."""
        if self._request.prompt_logprobs is None or parts.prompt_logprobs is None:
            return None
        return prompt_logprobs(self._model, unpacked(parts.prompt_logprobs), self._request.prompt_logprobs)

    def choice(self, parts: ChoiceParts) -> CompletionChoice:
        """The finished choice."""
        return CompletionChoice(
            index=self._index,
            text=self.echo() + "".join(parts.text),
            logprobs=self.logprobs(parts),
            finish_reason=parts.reason,
            stop_reason=parts.stop_reason,
            prompt_logprobs=self.prompt_logprobs(parts),
        )


class CompletionChunks:
    """The stream of /v1/completions."""

    def __init__(self, reply: Reply, writers: list[ChoiceWriter], *, include_usage: bool) -> None:
        self._prefix = reply.chunk_prefix("text_completion")
        self._writers = writers
        self._suffix = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        self._include_usage = include_usage
        self._has_begun = [False] * len(writers)

    def encode(self, index: int, event: TokenEvent) -> bytes:
        """One chunk, unless the event brings nothing that the client can see."""
        writer, text = self._writers[index], event.text
        if not self._has_begun[index]:
            self._has_begun[index] = True
            text = writer.echo() + text
        if not text and event.logprobs is None and event.prompt_logprobs is None and event.finish_reason is None:
            return b""
        reported = writer.prompt_logprobs(event)
        return b"".join(
            [
                self._prefix + b'[{"index":%d,"text":' % index,
                encode_json(text),
                b',"logprobs":' + encode_json(writer.logprobs(event)),
                b',"finish_reason":' + encode_json(event.finish_reason),
                b',"stop_reason":' + encode_json(event.stop_reason),
                b"" if reported is None else b',"prompt_logprobs":' + encode_json(reported),
                self._suffix,
            ]
        )

    def end(self, generation: Generation) -> bytes:
        """Usage if it was asked for, and the mark of the end."""
        return (usage_chunk(self._prefix, generation) if self._include_usage else b"") + DONE

    def error(self, error: VashistaError, request_id: str | None) -> bytes:
        """The error as an event."""
        return error_event(encode_error(error, request_id))
