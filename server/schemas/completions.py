"""The body of POST /v1/completions; `server/routes/completions.py` parses it, `server/admission.py` admits it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vashista.server.schemas.fields import INT64_MAX, Prompt
from vashista.server.schemas.sampling import SamplingFields, no_op


class CompletionRequest(SamplingFields):
    """OpenAI's completion request with the usual extensions of open servers."""

    prompt: Prompt
    max_tokens: int | None = Field(
        default=None,
        ge=0,
        le=INT64_MAX,
        description="Default 16, or what the context leaves. 0 scores the prompt; only with echo or prompt_logprobs.",
    )
    logprobs: int | None = Field(
        default=None, ge=0, le=INT64_MAX, description="Log probabilities with so many alternatives."
    )
    echo: bool | None = Field(default=None, description="Put the prompt before the text.")
    suffix: Literal[""] | None = no_op("Filling in the middle is not supported.")
    best_of: Literal[1] | None = no_op("Choosing the best of many is not supported.")
