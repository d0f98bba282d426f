"""What a receipt says of a request's parameters: numbers, switches and counts, never a text of the client's.

`server/account.py` calls it. Of stop strings, schemas and biases the receipt has the number or the kind; `user`,
`metadata` and `cache_salt` are left out.
"""

from __future__ import annotations

from typing import Any

from vashista.engine.messages import DENSE, AttentionMode
from vashista.server.admission import Admitted
from vashista.server.schemas.sampling import CommonFields

_PLAIN = (
    *("stream", "n", "max_tokens", "max_completion_tokens", "min_tokens", "ignore_eos", "seed", "temperature"),
    *("top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "priority", "echo"),
    *("logprobs", "top_logprobs", "prompt_logprobs", "add_generation_prompt", "continue_final_message"),
)
_COUNTED = {
    "stop": "num_stops",
    "stop_sequences": "num_stops",
    "stop_token_ids": "num_stop_token_ids",
    "logit_bias": "num_biased_tokens",
    "messages": "num_messages",
}
_TERMS = ("deadline_s", "max_cost", "adapt", "stop_at_deadline")
_USED = (
    *("seed", "max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "min_tokens", "ignore_eos", "logprobs", "prompt_logprobs"),
)


def asked_parameters(request: CommonFields) -> dict[str, Any]:
    """Of a request that was refused: what it gave."""
    given = {name: getattr(request, name, None) for name in _PLAIN}
    parameters = {name: value for name, value in given.items() if value is not None}
    for name, count in _COUNTED.items():
        value = getattr(request, name, None)
        if value is not None:
            parameters[count] = len(value)
    response_format = getattr(request, "response_format", None)
    if response_format is not None:
        parameters["response_format"] = response_format.type
    options = request.vashista
    if options is not None:
        for name in _TERMS:
            value = getattr(options, name)
            if value not in (None, False):
                parameters[name] = value
    return parameters


def used_parameters(request: CommonFields, admitted: Admitted) -> dict[str, Any]:
    """Of a request that ran: what it gave, and what the defaults made of the rest; `seed` is that of choice 0."""
    first = admitted.submits[0]
    parameters = asked_parameters(request)
    # Two names of one thing; what ran has one.
    parameters.pop("max_completion_tokens", None)
    parameters |= {name: getattr(first.sampling, name) for name in _USED}
    parameters["max_tokens"] = max(submit.sampling.max_tokens for submit in admitted.submits)
    return parameters | {
        "stream": bool(request.stream),
        "n": admitted.num_choices,
        "num_prompts": len(admitted.prompts),
        "num_stops": len(first.sampling.stop),
        "num_stop_token_ids": len(first.sampling.stop_token_ids),
        "priority": first.priority,
        "has_cache_salt": bool(first.cache_salt),
        **({} if admitted.adapted is None else {"adapted_token_budget": admitted.adapted.token_budget}),
    }


def asked_attention(request: CommonFields) -> AttentionMode:
    """How a refused request wanted to attend."""
    asked = request.vashista.attention if request.vashista is not None else None
    return DENSE if asked is None else AttentionMode(asked.token_budget, asked.max_dropped_mass)
