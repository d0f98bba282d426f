"""POST /v1/predict: what a request would take if it came now, and whether it would be let in; nothing runs."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response

from vashista.engine.errors import (
    ChatTemplateError,
    ChatTemplateFileError,
    EmptyPromptError,
    ModelNotFoundError,
    RetryableError,
    TokenOutOfVocabularyError,
    VashistaError,
)
from vashista.server.account import account_of
from vashista.server.endpoint import BODY, ENGINE, TERMS, Endpoint, json_response, request_id_of
from vashista.server.openai_errors import error_body
from vashista.server.schemas.predict import PredictRequest, kind_of
from vashista.server.schemas.responses import AdmissionVerdict, PredictReply
from vashista.server.services import Services


def endpoints() -> list[Endpoint]:
    """The one endpoint of this file."""
    return [
        Endpoint(
            method="POST",
            path="/v1/predict",
            handler=predict,
            summary="What a request would take",
            request=PredictRequest,
            response=PredictReply,
            errors=(
                *BODY,
                ChatTemplateError,
                ChatTemplateFileError,
                ModelNotFoundError,
                EmptyPromptError,
                TokenOutOfVocabularyError,
                *TERMS,
                *ENGINE,
            ),
            is_accounted=False,
        )
    ]


async def predict(services: Services, request: Request) -> Response:
    """The prediction, and what admission would say. A body that could never run is an error, as it would be there."""
    arrival_s = time.monotonic()
    body = await services.bodies.read_as(request, kind_of)
    preview = await services.admission.preview(body, arrival_s, account_of(request).key)
    return json_response(
        PredictReply(
            model=services.model.name,
            admission=_verdict(preview.refusal, request_id_of(request)),
            prediction=None if preview.run.foresight is None else preview.run.foresight.prediction,
            adapted=preview.run.adapted,
        )
    )


def _verdict(refusal: VashistaError | None, request_id: str | None) -> AdmissionVerdict:
    if refusal is None:
        return AdmissionVerdict(would_admit=True, error=None, retry_after_s=None)
    return AdmissionVerdict(
        would_admit=False,
        error=error_body(refusal, request_id),
        retry_after_s=refusal.retry_after_s if isinstance(refusal, RetryableError) else None,
    )
