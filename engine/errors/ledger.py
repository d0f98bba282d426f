"""Errors of the ledger and of the commands that read it."""

from __future__ import annotations

from vashista.engine.errors.root import VashistaError
from vashista.engine.errors.startup import SettingsError


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


class LedgerLogUnreadError(LedgerError):
    """The ledger's newest receipts are in its log alone, on a medium where SQLite cannot read a log."""

    code = "ledger_log_unread"
    remedy = "Copy ledger.db and ledger.db-wal together into a folder that can be written; name the copy with --file."


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


class LedgerNewerError(LedgerError):
    """A newer version wrote the ledger, in a layout or format that this one does not know."""

    code = "ledger_newer"
    remedy = "Start the newer version again, restore the state folder from before it, or choose another --state-dir."


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
    """An option of `vashista ledger` or `attest` is mistyped, out of range, or names no receipt or no key."""

    code = "invalid_ledger_option"
    remedy = "Correct the option that the message names; `--help` lists them all."
