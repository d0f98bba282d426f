"""Errors that a client meets: what is wrong with its request, or why the server cannot answer it now."""

from __future__ import annotations

from vashista.engine.errors.root import VashistaError


class InvalidRequestError(VashistaError):
    """A field of the request is missing, unknown, mistyped or out of range."""

    code = "invalid_request"
    http_status = 400
    remedy = "Correct the field that the message names; the fields and their ranges are listed at /docs."


class InvalidBodyError(InvalidRequestError):
    """The body is not a JSON object in UTF-8, or it holds NaN or Infinity."""

    code = "invalid_body"
    remedy = "Send one JSON object, encoded in UTF-8, with Content-Type application/json."


class BodyTooLargeError(InvalidRequestError):
    """The body is larger than the server accepts."""

    code = "body_too_large"
    http_status = 413
    remedy = "Send a smaller body, or ask the operator to raise the limit that the message names."


class BodyTooDeepError(InvalidRequestError):
    """The JSON of the body is nested deeper than any valid request."""

    code = "body_too_deep"
    remedy = "Flatten the JSON: no valid request nests deeper than 64 levels."


class UnknownFieldError(InvalidRequestError):
    """The request has a field that this server does not know."""

    code = "unknown_field"
    remedy = "Remove the field or correct its spelling; the fields are listed at /docs."


class UnsupportedFieldError(InvalidRequestError):
    """The field belongs to the protocol, but this server cannot honour it."""

    code = "unsupported_field"
    remedy = "Remove the field; it is refused because ignoring it would change what you asked for."


class EmptyPromptError(InvalidRequestError):
    """The prompt has no tokens."""

    code = "empty_prompt"
    remedy = "Send at least one token or one character."


class TokenOutOfVocabularyError(InvalidRequestError):
    """A token id of the request is not in the model's vocabulary."""

    code = "token_out_of_vocabulary"
    remedy = "Use token ids of this model's tokenizer; /tokenize gives them."


class ContextLengthError(InvalidRequestError):
    """The prompt, or the prompt with max_tokens, does not fit into the model's context."""

    code = "context_length_exceeded"
    remedy = "Shorten the prompt or lower max_tokens until their sum fits."


class CacheCapacityError(InvalidRequestError):
    """The request alone needs more KV pages than the server has."""

    code = "kv_capacity_exceeded"
    remedy = "Shorten the prompt or lower max_tokens, or ask the operator to raise kv_cache_bytes."


class AttentionModeError(InvalidRequestError):
    """The request asks for a way to attend that does not exist or that this server does not allow."""

    code = "invalid_attention_mode"
    remedy = "Ask for dense, or for sparse within the limits that the message names; the operator sets them."


class TooManyStopsError(InvalidRequestError):
    """The request has more stop strings or stop token ids than allowed."""

    code = "too_many_stops"
    remedy = "Send fewer stops; the message says how many are allowed."


class GrammarError(InvalidRequestError):
    """The response_format cannot be compiled into a grammar."""

    code = "invalid_grammar"
    remedy = "Simplify the JSON schema or correct the part that the message names."


class ChatTemplateError(InvalidRequestError):
    """The messages cannot be rendered: a bad role or order, or no chat template."""

    code = "invalid_messages"
    remedy = "Use the roles and the order of the model's chat template, or call /v1/completions."


class ModelNotFoundError(VashistaError):
    """The request names a model that is not served."""

    code = "model_not_found"
    http_status = 404
    remedy = "Use a name that GET /v1/models lists."


class NotFoundError(VashistaError):
    """No such path."""

    code = "not_found"
    http_status = 404
    remedy = "The paths are listed at /docs."


class MethodNotAllowedError(VashistaError):
    """The path exists, but not with this method."""

    code = "method_not_allowed"
    http_status = 405
    remedy = "Use the method that /docs gives for the path."


class InvalidKeyError(VashistaError):
    """The API key is missing, wrong or revoked."""

    code = "invalid_api_key"
    http_status = 401
    remedy = "Send a valid key as `Authorization: Bearer KEY`; the operator makes keys with `vashista keys create`."


class KeysUnreadableError(VashistaError):
    """The server cannot read its API keys now, so it lets nobody in."""

    code = "keys_unreadable"
    http_status = 503
    remedy = "Try again later; the operator finds the cause in the server's log."


class RoleError(VashistaError):
    """The API key is good, but none of its roles opens this path."""

    code = "role_missing"
    http_status = 403
    remedy = "Use a key with a role that the message names; the operator makes one with `vashista keys create --role`."


class KeyLimitError(InvalidRequestError):
    """The request alone is larger than a limit of its key: no waiting helps."""

    code = "exceeds_key_limit"
    remedy = "Shorten the prompt or lower max_tokens, or ask the operator for more (`vashista keys limit`)."


class RetryableError(VashistaError):
    """Root of the errors that pass with time; it has no code of its own."""

    def __init__(self, message: str, *, retry_after_s: float, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class RateLimitError(RetryableError):
    """The key has used up what it may use in a minute."""

    code = "rate_limit_exceeded"
    http_status = 429
    remedy = "Try again after the seconds that Retry-After gives."


class QuotaExceededError(RateLimitError):
    """The key has used up what it may use in a day or a month (UTC)."""

    code = "quota_exceeded"
    remedy = "Wait as long as Retry-After says, or ask the operator for more (`vashista keys limit`)."


class QueueFullError(RetryableError):
    """The server has as many requests or tokens waiting as it accepts."""

    code = "queue_full"
    http_status = 429
    remedy = "Try again after the seconds that Retry-After gives."


class DeadlineError(RetryableError):
    """The request would miss its deadline_s if it were let in now; later it would not."""

    code = "deadline_not_met"
    http_status = 429
    remedy = "Try again after the seconds that Retry-After gives, raise deadline_s, or lower max_tokens."


class DeadlineImpossibleError(InvalidRequestError):
    """The request would miss its deadline_s even with the engine for itself: no waiting helps."""

    code = "deadline_impossible"
    remedy = "Raise deadline_s to what the message says, lower max_tokens, or shorten the prompt."


class CostLimitError(InvalidRequestError):
    """The request may cost more than its max_cost."""

    code = "max_cost_exceeded"
    remedy = "Raise max_cost to what the message says, lower max_tokens, or shorten the prompt."


class PredictionMissingError(VashistaError):
    """The request has a deadline_s or max_cost, and nothing can be said now of what it would take."""

    code = "prediction_missing"
    http_status = 503
    remedy = "Send the request without deadline_s and max_cost, or tell the operator, who finds the cause in the log."


class DrainingError(VashistaError):
    """The server is shutting down: it finishes accepted requests and takes no new ones."""

    code = "draining"
    http_status = 503
    remedy = "Send the request to another server, or again once this one is back."


class EngineNotReadyError(VashistaError):
    """The engine is loading the model or being restarted."""

    code = "engine_not_ready"
    http_status = 503
    remedy = "Try again in a few seconds; /ready answers 200 once the engine can answer."


class EngineDiedError(VashistaError):
    """The engine process ended while the request ran; the server has started a new one."""

    code = "engine_died"
    http_status = 503
    remedy = "Send the request again; the operator finds the cause in the server's log."


class StepMemoryError(VashistaError):
    """The engine had no memory for a step of the request; all requests of that step end, others go on."""

    code = "step_out_of_memory"
    http_status = 503
    remedy = "Send a shorter prompt, or try again; the operator lowers kv_cache_bytes or max_batch_tokens."


class EngineFailedError(VashistaError):
    """The engine cannot be started, or keeps dying, and the server has stopped trying."""

    code = "engine_failed"
    http_status = 503
    remedy = "The operator must correct the cause that the message names and restart the server."


class ClientGoneError(VashistaError):
    """The client closed the connection before its reply was complete; nobody reads this, receipts and logs name it."""

    code = "client_gone"
    http_status = 499
    remedy = "Look at the client's timeout, or for a proxy between that cuts connections."


class ClientStalledError(ClientGoneError):
    """The client read nothing of its reply for write_timeout_s and was cut off; receipts and logs name it."""

    code = "client_stalled"
    remedy = "Look for a client or a proxy that stopped reading; the operator may raise write_timeout_s."


class InternalError(VashistaError):
    """A bug of ours; the request id leads to the log entry."""

    code = "internal_error"
    http_status = 500
    remedy = "Report the request id to the operator."
