"""Errors of certificates and their keys; found before the server listens."""

from __future__ import annotations

from vashista.engine.errors.startup import SettingsError


class TlsError(SettingsError):
    """The certificate, its key or the clients' CA cannot be used."""

    code = "invalid_tls"
    remedy = "Correct the file that the message names; docs/tls.md shows how one is made and looked at."


class TlsFileError(TlsError):
    """A file of the TLS settings is missing, unreadable, or not PEM of the right kind."""

    code = "tls_file"


class TlsKeyMismatchError(TlsError):
    """tls_key is not the private half of tls_certificate."""

    code = "tls_key_mismatch"
    remedy = "Give the key that the certificate was asked for with, and the server's own certificate first in its file."


class TlsKeyOpenError(TlsError):
    """Everyone on the machine may read the private key."""

    code = "tls_key_open"
    remedy = "Make it readable by the server's user or group alone: chmod 0640."


class TlsExpiredError(TlsError):
    """The certificate has expired, or is not valid yet."""

    code = "tls_expired"
    remedy = "Have your CA issue a new certificate, or set the machine's clock."
