"""TLS with the operator's certificate, and clients' certificates where a CA for them is given.

`server/serve.py` makes one `Tls` before it listens; uvicorn encrypts with its context, whatever socket it was given. A
new certificate is taken on SIGHUP, and when a file's time changes: new connections get it, running streams go on with
the one they began with. A new one that cannot be used is named in the log and counted, and the old one stays.

TLS 1.3, and 1.2 with forward secrecy and authenticated ciphers alone; no compression, renegotiation or resumption, so
that a client's certificate is checked on every connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import ssl
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization

from vashista.engine.errors import TlsError, TlsExpiredError, TlsFileError, TlsKeyMismatchError, TlsKeyOpenError
from vashista.server.settings import Settings

logger = logging.getLogger(__name__)
WATCH_S = 5.0
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Of TLS 1.2; those of 1.3 are all of this kind."""


@dataclass(frozen=True)
class Certificate:
    """One certificate that can be used, and what a reader wants to know of it."""

    context: ssl.SSLContext
    subject: str
    fingerprint: str
    """SHA-256 of its DER."""
    expires_s: float
    """Unix time."""


def load(settings: Settings, now: Callable[[], float] = time.time) -> Certificate:
    """Read and check all files of the TLS settings. A TlsError names the one that is wrong."""
    assert settings.tls_certificate is not None
    assert settings.tls_key is not None
    chain = _read_certificates(settings.tls_certificate, "tls_certificate")
    key = _read_key(settings.tls_key)
    first = chain[0]
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if first.public_key().public_bytes(*form) != key:
        raise TlsKeyMismatchError(
            f"{settings.tls_key} is not the key of {first.subject.rfc4514_string()}, the first certificate in "
            f"{settings.tls_certificate}.",
            param="tls_key",
        )
    expires_s, starts_s = first.not_valid_after_utc.timestamp(), first.not_valid_before_utc.timestamp()
    if not starts_s <= now() < expires_s:
        state = f"expired at {first.not_valid_after_utc}" if now() >= expires_s else (
            f"is valid only from {first.not_valid_before_utc} on"
        )  # fmt: skip
        raise TlsExpiredError(f"The certificate {settings.tls_certificate} {state}.", param="tls_certificate")
    if settings.tls_client_ca is not None:
        _read_certificates(settings.tls_client_ca, "tls_client_ca")
    return Certificate(
        _context(settings), first.subject.rfc4514_string(), first.fingerprint(hashes.SHA256()).hex(), expires_s
    )


def _context(settings: Settings) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    context.num_tickets = 0
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(str(settings.tls_certificate), str(settings.tls_key), password=lambda: "")
        if settings.tls_client_ca is not None:
            context.load_verify_locations(str(settings.tls_client_ca))
            context.verify_mode = ssl.CERT_REQUIRED
    except (ssl.SSLError, OSError, ValueError) as error:
        raise TlsFileError(f"{settings.tls_certificate} cannot be used for TLS: {error}.") from error
    return context


def _read_certificates(path: Path, setting: str) -> list[x509.Certificate]:
    data = _read(path, setting)
    try:
        found = x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise TlsFileError(f"{path} of {setting} holds no certificates in PEM: {error}.", param=setting) from error
    return found


def _read_key(path: Path) -> bytes:
    """The public half in DER."""
    data = _read(path, "tls_key")
    if stat.S_IMODE(path.stat().st_mode) & 0o007:
        raise TlsKeyOpenError(f"Every user of this machine may use the private key {path}.", param="tls_key")
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except TypeError as error:
        raise TlsFileError(f"The key {path} is encrypted; a server has nobody to ask for a password.",
                           param="tls_key") from error  # fmt: skip
    except (ValueError, UnsupportedAlgorithm) as error:
        raise TlsFileError(f"{path} is not a private key in PEM.", param="tls_key") from error
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _read(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsFileError(f"{path} of {setting} cannot be read: {error.strerror}.", param=setting) from error


class Tls:
    """The certificate in force. `context` stays the same object; each handshake takes what is in force then."""

    def __init__(self, settings: Settings, now: Callable[[], float] = time.time) -> None:
        """Raises a TlsError when the files cannot be used."""
        self._settings, self._now = settings, now
        self.current = load(settings, now)
        self._times = self._file_times()
        self.num_reloads = 0
        self.num_failed_reloads = 0
        self.context = _context(settings)
        self.context.sni_callback = self._choose

    def reload(self) -> bool:
        """Take the files as they are now; False, with the reason in the log, when they cannot be used."""
        self._times = self._file_times()
        try:
            self.current = load(self._settings, self._now)
        except TlsError as error:
            self.num_failed_reloads += 1
            logger.error(
                "the old certificate stays in force: error[%s]: %s %s", error.code, error.message, error.remedy
            )
            return False
        self.num_reloads += 1
        fields = {"subject": self.current.subject, "fingerprint": self.current.fingerprint}
        logger.info("a new certificate is in force", extra={"fields": fields})
        return True

    async def watch(self) -> None:
        """Reload on SIGHUP and when a file changes, until cancelled."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        try:
            while True:
                await asyncio.sleep(WATCH_S)
                if self._file_times() != self._times:
                    await asyncio.sleep(WATCH_S / 5)  # certificate and key are rarely written at the same moment
                    self.reload()
        finally:
            loop.remove_signal_handler(signal.SIGHUP)

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self.current.context

    def _file_times(self) -> list[tuple[int, int]]:
        """Of what a path leads to now: links, as certbot and Kubernetes swap, are followed."""
        times = []
        for path in (self._settings.tls_certificate, self._settings.tls_key, self._settings.tls_client_ca):
            with contextlib.suppress(OSError):
                if path is not None:
                    status = os.stat(path)
                    times.append((status.st_mtime_ns, status.st_ino))
        return times
