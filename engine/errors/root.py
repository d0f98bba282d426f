"""The root of all errors: what each of them has."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from vashista.engine.predict.prediction import Prediction


class VashistaError(Exception):
    """Root of all errors that are not bugs."""

    code: ClassVar[str] = "error"
    http_status: ClassVar[int] = 500
    remedy: ClassVar[str] = "Look at the server's log for the cause."

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.prediction: Prediction | None = None
        """What was predicted of the request, where that is why it is refused."""

    @property
    def kind(self) -> str:
        """OpenAI's `error.type` for this status."""
        fallback = "server_error" if self.http_status >= 500 else "invalid_request_error"
        return _OPENAI_TYPES.get(self.http_status, fallback)


_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
