"""GET /v1/models and /v1/models/{id}: what is served here."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from vashista.engine.errors import ModelNotFoundError
from vashista.server.endpoint import Endpoint, json_response
from vashista.server.schemas.responses import ModelCard, ModelList
from vashista.server.services import Services


def endpoints() -> list[Endpoint]:
    """The endpoints of this file."""
    return [
        Endpoint(
            method="GET", path="/v1/models", handler=list_models, summary="List the served models", response=ModelList
        ),
        Endpoint(
            method="GET",
            path="/v1/models/{model}",
            handler=get_model,
            summary="Describe one model",
            response=ModelCard,
            errors=(ModelNotFoundError,),
        ),
    ]


async def list_models(services: Services, request: Request) -> Response:
    """The one model."""
    return json_response(ModelList(data=[_card(services)]))


async def get_model(services: Services, request: Request) -> Response:
    """The model of that name."""
    services.model.check_name(request.path_params["model"])
    return json_response(_card(services))


def _card(services: Services) -> ModelCard:
    return ModelCard(
        id=services.model.name,
        created=services.model.created,
        owned_by="vashista",
        max_model_len=services.max_context,
        digest=services.model.digest,
        digest_kind="sampled" if services.model.signed_by is None else "signed_manifest",
        signed_by=services.model.signed_by,
    )
