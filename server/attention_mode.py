"""From the request's `vashista.attention` to the engine's `AttentionMode`, within what the operator allows.

Called by `server/admission.py`. Nothing is adjusted: what is not possible is an AttentionModeError that says what is.
"""

from __future__ import annotations

from vashista.engine.errors import AttentionModeError
from vashista.engine.messages import DENSE, AttentionMode, Ready
from vashista.server.schemas.fields import AttentionOptions
from vashista.server.schemas.predict import SizeRequest
from vashista.server.schemas.sampling import CommonFields
from vashista.server.settings import Settings

PARAM = "vashista.attention"


def attention_mode(request: CommonFields | SizeRequest, settings: Settings, ready: Ready) -> AttentionMode:
    """How the request attends. Raises AttentionModeError."""
    asked = request.vashista.attention if request.vashista is not None else None
    mode = _asked_mode(asked, settings) if asked is not None else default_mode(settings)
    if mode.is_sparse and ready.attention == "dense":
        raise AttentionModeError(
            f"{PARAM}: this server runs with attention = dense, so only the mode dense is possible.", param=PARAM
        )
    return mode


def default_mode(settings: Settings) -> AttentionMode:
    """How requests attend that do not say it."""
    return _server_limit(settings) if settings.attention_mode == "sparse" else DENSE


def _server_limit(settings: Settings) -> AttentionMode:
    if settings.token_budget is not None:
        return AttentionMode(token_budget=settings.token_budget)
    return AttentionMode(max_dropped_mass=settings.max_dropped_mass)


def _asked_mode(asked: AttentionOptions, settings: Settings) -> AttentionMode:
    limits = {"token_budget": asked.token_budget, "max_dropped_mass": asked.max_dropped_mass}
    given = [name for name, value in limits.items() if value is not None]
    if len(given) == 2:
        raise _refusal("token_budget and max_dropped_mass are both given; give one of them.")
    if asked.mode == "dense":
        if given:
            raise _refusal(f"{given[0]} is given with the mode dense, which leaves nothing out; ask for sparse.")
        return DENSE
    if not given:
        return _server_limit(settings) if asked.mode == "sparse" else default_mode(settings)
    least, most = settings.min_token_budget, settings.max_allowed_dropped_mass
    if asked.token_budget is not None and asked.token_budget < least:
        raise _refusal(f"token_budget is {asked.token_budget}; this server allows {least} and more.")
    if asked.max_dropped_mass is not None and asked.max_dropped_mass > most:
        raise _refusal(f"max_dropped_mass is {asked.max_dropped_mass}; this server allows up to {most}.")
    return AttentionMode(asked.token_budget, asked.max_dropped_mass)


def _refusal(text: str) -> AttentionModeError:
    return AttentionModeError(f"{PARAM}: {text}", param=PARAM)
