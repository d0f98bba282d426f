"""POST /tokenize and /detokenize: the model's tokenizer and chat template without the model."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from vashista.engine.chat_template import require_chat_template
from vashista.engine.errors import (
    ChatTemplateError,
    ChatTemplateFileError,
    ContextLengthError,
    ModelNotFoundError,
    TokenOutOfVocabularyError,
)
from vashista.server.chat_prompts import messages_for_template
from vashista.server.endpoint import BODY, Endpoint, json_response
from vashista.server.schemas.responses import Text, Tokens
from vashista.server.schemas.tokens import DetokenizeRequest, TokenizeRequest
from vashista.server.services import Services

CONTEXTS = 4
"""So many contexts' tokens are counted of a text, or turned into one; what is longer is taken to pieces by who asks."""


def endpoints() -> list[Endpoint]:
    """The endpoints of this file."""
    return [
        Endpoint(
            method="POST",
            path="/tokenize",
            handler=tokenize,
            summary="Turn a text or a chat into token ids",
            request=TokenizeRequest,
            response=Tokens,
            errors=(*BODY, ModelNotFoundError, ChatTemplateError, ChatTemplateFileError, ContextLengthError),
        ),
        Endpoint(
            method="POST",
            path="/detokenize",
            handler=detokenize,
            summary="Turn token ids into text",
            request=DetokenizeRequest,
            response=Text,
            errors=(*BODY, ModelNotFoundError, TokenOutOfVocabularyError, ContextLengthError),
        ),
    ]


async def tokenize(services: Services, request: Request) -> Response:
    """Token ids, as a completion or chat request with the same text would use them."""
    body = await services.bodies.read(request, TokenizeRequest)
    services.model.check_name(body.model)
    if body.messages is None:
        text = body.prompt or ""
    else:
        template = require_chat_template(services.model.chat_template)
        messages = await messages_for_template(body.messages)
        opens_turn = body.add_generation_prompt is not False
        text = await template.render(messages, body.chat_template_kwargs or {}, opens_turn=opens_turn)
    adds_special = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
    most = CONTEXTS * services.max_context
    param = "prompt" if body.messages is None else "messages"
    (token_ids,) = await services.admission.encode([text], most, add_special_tokens=adds_special, param=param)
    labels = [services.model.token_label(token_id) for token_id in token_ids] if body.return_token_strs else None
    return json_response(
        Tokens(count=len(token_ids), max_model_len=services.max_context, tokens=token_ids, token_strs=labels)
    )


async def detokenize(services: Services, request: Request) -> Response:
    """The text of the ids, control tokens included."""
    body = await services.bodies.read(request, DetokenizeRequest)
    services.model.check_name(body.model)
    most = CONTEXTS * services.max_context
    if len(body.tokens) > most:
        raise ContextLengthError(
            f"tokens: {len(body.tokens)} token ids, where at most {most} are taken.", param="tokens"
        )
    try:
        services.model.tokenizer.check_ids(body.tokens)
    except TokenOutOfVocabularyError as error:
        raise TokenOutOfVocabularyError(f"tokens: {error.message}", param="tokens") from None
    text = await asyncio.to_thread(services.model.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return json_response(Text(prompt=text))
