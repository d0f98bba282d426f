"""Every error a user can meet, in one file: stable `code`, HTTP status, and the remedy.

The class docstring is the explanation printed in the documentation; the message says what was asked and what is
possible in this case; `remedy` says how to get there. The server turns these into OpenAI error bodies, the command
line prints them, the engine process sends them over its channel as (code, message).
"""

from __future__ import annotations

from typing import ClassVar


class VashistaError(Exception):
    """Root of all errors that are not bugs."""

    code: ClassVar[str] = "error"
    http_status: ClassVar[int] = 500
    remedy: ClassVar[str] = "Look at the server's log for the cause."

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    @property
    def kind(self) -> str:
        """OpenAI's `error.type` for this status."""
        fallback = "server_error" if self.http_status >= 500 else "invalid_request_error"
        return _OPENAI_TYPES.get(self.http_status, fallback)


_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


# --- requests -------------------------------------------------------------------------------------------------------


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
    remedy = "Send a smaller body, or ask the operator to raise max_body_bytes."


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


class RateLimitError(VashistaError):
    """The key has used up what it may use in a minute."""

    code = "rate_limit_exceeded"
    http_status = 429
    remedy = "Try again after the seconds that Retry-After gives."

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QuotaExceededError(RateLimitError):
    """The key has used up what it may use in a day or a month (UTC)."""

    code = "quota_exceeded"
    remedy = "Wait as long as Retry-After says, or ask the operator for more (`vashista keys limit`)."


class QueueFullError(VashistaError):
    """The server has as many requests or tokens waiting as it accepts."""

    code = "queue_full"
    http_status = 429
    remedy = "Try again after the seconds that Retry-After gives."

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


# --- the server's own state -----------------------------------------------------------------------------------------


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


# --- starting up ----------------------------------------------------------------------------------------------------


class SettingsError(VashistaError):
    """A setting is unknown, mistyped or out of range."""

    code = "invalid_settings"
    remedy = "Correct the setting; `vashista serve --help` lists them all."


class PortTakenError(VashistaError):
    """Another process listens on the address."""

    code = "port_taken"
    remedy = "Stop the other process or choose another --port."


class StateFolderError(VashistaError):
    """The state folder cannot be created or written."""

    code = "state_folder_not_writable"
    remedy = "Give the server's user write permission, or choose another --state-dir."


class StateFolderTakenError(StateFolderError):
    """Another server runs on the state folder; receipts and the limits of keys are counted by one server alone."""

    code = "state_folder_taken"
    remedy = "Stop the other server, or give this one a --state-dir of its own."


class KeyNotFoundError(VashistaError):
    """No API key has this id."""

    code = "key_not_found"
    http_status = 404
    remedy = "`vashista keys list` prints the ids."


class ModelError(VashistaError):
    """The model folder cannot be served."""

    code = "invalid_model"
    remedy = "Correct what the message names, or copy the model folder again."


class ModelFolderError(ModelError):
    """The model folder or one of its files is missing or unreadable."""

    code = "model_folder"
    remedy = "Give the path of a folder with config.json, tokenizer.json and *.safetensors."


class ModelConfigError(ModelError):
    """config.json is not valid or lacks something the model needs."""

    code = "model_config"
    remedy = "Copy config.json from the model's publisher again."


class UnsupportedArchitectureError(ModelError):
    """The architecture is none that this server runs."""

    code = "unsupported_architecture"
    remedy = "Use a model of a supported architecture; the message lists them."


class UnsupportedRopeError(ModelError):
    """The rotary position scaling is of a type that this server does not know."""

    code = "unsupported_rope"
    remedy = "Use a model with one of the rope types that the message lists."


class CheckpointError(ModelError):
    """The safetensors files do not match the index or the architecture."""

    code = "invalid_checkpoint"
    remedy = "Copy the model's safetensors files and index again and compare their checksums."


class PickleRefusedError(ModelError):
    """The folder holds weights as pickle files only; loading them would run code."""

    code = "pickle_refused"
    remedy = "Convert the weights to safetensors on a machine where running their code is acceptable."


class TokenizerError(ModelError):
    """tokenizer.json is missing or cannot be read."""

    code = "invalid_tokenizer"
    remedy = "Copy tokenizer.json from the model's publisher; sentencepiece files alone must be converted first."


class NotEnoughMemoryError(ModelError):
    """The model and a minimal KV cache do not fit into the device's memory."""

    code = "not_enough_memory"
    remedy = "Use a smaller dtype or model, lower kv_cache_bytes or max_context, or free memory."


class DeviceError(ModelError):
    """The device that was asked for is not there or cannot run the model."""

    code = "device_unavailable"
    remedy = "Choose --device cpu, or make the GPU and its driver visible to this process."


class SupportProfileError(ModelError):
    """The support profile cannot be used with this model."""

    code = "invalid_support_profile"
    remedy = "Make it anew with `vashista calibrate MODEL`."


class SupportProfileFileError(SupportProfileError):
    """The file of the support profile is missing, or cannot be read or written."""

    code = "support_profile_file"
    remedy = "Correct the path or its permissions, or make a profile with `vashista calibrate MODEL --out FILE`."


class SupportProfileDamagedError(SupportProfileError):
    """The file of the support profile is not JSON, lacks a field, or contradicts itself."""

    code = "support_profile_damaged"


class SupportProfileVersionError(SupportProfileError):
    """The support profile was written by a version of this program with another format."""

    code = "support_profile_version"


class SupportProfileMismatchError(SupportProfileError):
    """The support profile was measured on another model."""

    code = "support_profile_mismatch"
    remedy = "Use the profile of this model, or make it with `vashista calibrate MODEL`."


# --- the ledger -------------------------------------------------------------------------------------------------------


class LedgerError(VashistaError):
    """The ledger cannot be read or written, so that nothing can be accounted for."""

    code = "ledger_unavailable"
    http_status = 503
    remedy = "The operator must correct what the message names; the server writes again as soon as it can."


class LedgerFullError(LedgerError):
    """The disk of the ledger is full, or its quota is used up."""

    code = "ledger_full"
    remedy = "The operator must free disk space, or prune old receipts with `vashista ledger prune`."


class LedgerLockedError(LedgerError):
    """Another process holds the ledger's database locked."""

    code = "ledger_locked"
    remedy = "The operator must end the process that locks the ledger, such as a database shell or a backup."


class LedgerReadOnlyError(LedgerError):
    """The ledger's file or folder may not be written."""

    code = "ledger_read_only"
    remedy = "The operator must give the server's user write permission to the state folder."


class LedgerDamagedError(LedgerError):
    """The ledger is no ledger, was removed while it was in use, or its end does not bear the server's signature."""

    code = "ledger_damaged"
    remedy = "`vashista ledger verify` says where; keep the file as evidence, then restore it or move it away."


class LedgerKeyError(LedgerError):
    """The key that signs the ledger is missing, damaged, readable by others, or not the one it began with."""

    code = "ledger_key"
    remedy = "Restore ledger.key beside ledger.db, mode 0600, or move both away to begin a new ledger."


class LedgerOverloadedError(LedgerError):
    """More receipts wait to be written than the queue of the ledger holds."""

    code = "ledger_overloaded"
    remedy = "Try again in a few seconds; the operator finds a disk that is too slow for the load."


class LedgerClosedError(LedgerError):
    """A receipt was handed to a ledger that is closed."""

    code = "ledger_closed"
    remedy = "Send the request again once the server is back."


class InvalidReceiptError(LedgerError):
    """A receipt cannot be written down: not a finite number, no Unicode text, too long, or no outcome."""

    code = "invalid_receipt"
    http_status = 500
    remedy = "Report the request id to the operator."


class PromptKeyError(LedgerError):
    """The key that seals or opens prompts in the ledger is missing, of another kind, or not the one they need."""

    code = "ledger_prompt_key"
    remedy = "Give an X25519 key in PEM, such as `openssl genpkey -algorithm X25519` makes; docs/ledger.md says how."


class LedgerVerificationError(VashistaError):
    """The ledger was changed since it was written, or it is not the one that was expected."""

    code = "ledger_verification"
    remedy = "Keep the file as evidence and compare it with the last backup or export that verifies."


class LedgerMisdatedError(VashistaError):
    """Nothing can be pruned by date: the oldest receipt is dated in the future, as the clock was wrong."""

    code = "ledger_misdated"
    remedy = "Compare `vashista ledger export` around that receipt; prune by number with --through, or wait."


class LedgerOptionError(SettingsError):
    """An option of `vashista ledger` is mistyped, out of range, or names no receipt of the ledger."""

    code = "invalid_ledger_option"
    remedy = "Correct the option that the message names; `--help` lists them all."


# --- calibrate and diagnose -------------------------------------------------------------------------------------------


class SampleTextError(SettingsError):
    """The sample text is missing, unreadable, or too short for the contexts that were asked for."""

    code = "sample_text"
    remedy = "Give a longer UTF-8 text with --text, or ask for shorter --contexts."


class MeasurementError(SettingsError):
    """A context, position, layer or head that was asked for is not one of this model's."""

    code = "invalid_measurement"
    remedy = "Correct the option that the message names; `--help` lists them all."


# --- selftest ---------------------------------------------------------------------------------------------------------


class SelftestAnswersError(VashistaError):
    """The known answers of a model are missing, damaged, or of another version."""

    code = "selftest_answers"
    remedy = (
        "Give --model the bundled model, copy selftest.json again, or make it with `vashista selftest --write` on a "
        "machine that you trust."
    )


class SelftestModelError(ModelError):
    """A file of the model is not the one that the known answers were made with, or cannot be read."""

    code = "selftest_model"
    remedy = "Copy the model folder again from the medium that it came on."


class SelftestFailedError(VashistaError):
    """A check of the installation failed."""

    code = "selftest_failed"
    remedy = "Do what the lines marked `remedy` say; do not serve with this installation before."


# --- doctor and attest ------------------------------------------------------------------------------------------------


class DoctorFailedError(VashistaError):
    """A check of `vashista doctor` found something that is not as it should be."""

    code = "doctor_failed"
    remedy = "Do what the lines marked `remedy` say, and run it again."


class DoctorOptionError(SettingsError):
    """An option of `vashista doctor` or `vashista attest` names something that is not there."""

    code = "invalid_doctor_option"
    remedy = "Correct the option that the message names; `--help` lists them all."


class AttestationError(VashistaError):
    """The file is no attestation, was changed since it was signed, or is signed by another key."""

    code = "attestation_invalid"
    remedy = "Do not believe the file; have `vashista attest write` run again on the machine, and compare fingerprints."


# --- bench serve ------------------------------------------------------------------------------------------------------


class WorkloadError(SettingsError):
    """An option of the load generator is mistyped, out of range, or contradicts another one."""

    code = "invalid_workload"
    remedy = "Correct the option that the message names; `vashista bench serve --help` lists them all."


class ServerUnreachableError(VashistaError):
    """The load generator gets no connection to the server, or the connection ends without a reply."""

    code = "server_unreachable"
    http_status = 502
    remedy = "Start the server, or correct --url; `curl URL/v1/models` must answer."


class UnexpectedReplyError(VashistaError):
    """The server answers, but not as an OpenAI-compatible server does."""

    code = "unexpected_reply"
    http_status = 502
    remedy = "Give the base URL of an OpenAI-compatible server, without /v1, and an --endpoint that it has."


class WarmUpFailedError(VashistaError):
    """A warm-up request of the load generator failed, so the measured ones most likely would too."""

    code = "warm_up_failed"
    http_status = 502
    remedy = "Correct what the server's message names, or measure nevertheless with --warmup 0."


class ReportFileError(VashistaError):
    """The file for the results cannot be written."""

    code = "report_file"
    remedy = "Choose a path in a folder that exists and that you may write to."


ERRORS: dict[str, type[VashistaError]] = {}


def _register(error: type[VashistaError]) -> None:
    assert error.code not in ERRORS, f"two errors share the code {error.code}"
    ERRORS[error.code] = error
    for child in error.__subclasses__():
        _register(child)


_register(VashistaError)
