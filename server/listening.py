"""The socket that the server listens on: made here, or inherited; and how a client addresses it.

`server/serve.py` asks for it before anything else is started, so that a taken port is reported at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from vashista.engine.errors import PortTakenError, SettingsError
from vashista.server.settings import Settings

BACKLOG = 2048
ANY_ADDRESSES = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True)
class Listener:
    """A listening socket, and what to type to reach it."""

    socket: socket.socket
    url: str
    """Base URL for a client on this machine."""
    curl_options: str = ""
    """What curl needs besides the URL, with a blank at the end."""
    path: Path | None = None
    """The Unix socket's file, when this server made it."""
    is_inherited: bool = False
    """Whether another process, as systemd, holds the socket too and keeps it for the next server."""

    def close(self) -> None:
        """Close the socket and remove its file."""
        self.socket.close()
        if self.path is not None:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()


def listen(settings: Settings, passed: int | None = None) -> Listener:
    """A listening socket as the settings say, with https in its URL where there is a certificate.

    Raises PortTakenError or SettingsError when that is not possible.

    `passed` is the descriptor of a socket that systemd passed; it is taken unless the settings say otherwise.
    """
    listener = _listen(settings, passed)
    if settings.tls_certificate is None:
        return listener
    return replace(listener, url=listener.url.replace("http://", "https://", 1))


def _listen(settings: Settings, passed: int | None) -> Listener:
    if passed is not None and settings.fd is None:
        other = sorted({"host", "port", "uds"} & settings.model_fields_set)
        if other:
            raise SettingsError(
                f"systemd passed a listening socket, but the setting {other[0]} is given: choose one way to listen.",
                param=other[0],
            )
        return _inherited(passed)
    if settings.fd is not None:
        return _inherited(settings.fd)
    if settings.uds is not None:
        return _unix(settings.uds)
    return _tcp(settings.host, settings.port)


def _tcp(host: str, port: int) -> Listener:
    """On an address, or `localhost`. Other names are not looked up: the question would leave the machine, by DNS."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            "127.0.0.1" if host == "localhost" else host,
            port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE | socket.AI_NUMERICHOST,
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise SettingsError(
            f"The host {host!r} is no IP address, and this server looks up no names: give an address of this machine, "
            "such as 0.0.0.0 for all of IPv4, :: for all, or 127.0.0.1.",
            param="host",
        ) from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTakenError(f"Another process listens on {_join(host, port)}.", param="port") from error
        raise SettingsError(
            f"The server cannot listen on {_join(host, port)}: {error.strerror}.", param="host"
        ) from error
    return Listener(sock, "http://" + _join(ANY_ADDRESSES.get(host, host), sock.getsockname()[1]))


def _unix(path: Path) -> Listener:
    if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
        raise SettingsError(f"{path} exists and is not a socket; it is left alone.", param="uds")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists():
            _remove_stale(path)
        sock.bind(str(path))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise SettingsError(f"The server cannot listen on {path}: {error.strerror or error}.", param="uds") from error
    except PortTakenError:
        sock.close()
        raise
    return Listener(sock, "http://localhost", f"--unix-socket {path} ", path)


def _remove_stale(path: Path) -> None:
    """Remove the socket file of a server that is gone; PortTakenError when one answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise PortTakenError(f"Another process listens on {path}.", param="uds")


def _inherited(fd: int) -> Listener:
    try:
        sock = socket.socket(fileno=os.dup(fd))
        is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise SettingsError(f"File descriptor {fd} is not a socket: {error.strerror}.", param="fd") from error
    if not is_listening:
        sock.close()
        raise SettingsError(f"The socket of file descriptor {fd} does not listen.", param="fd")
    if sock.family == socket.AF_UNIX:
        return Listener(sock, "http://localhost", f"--unix-socket {sock.getsockname()} ", is_inherited=True)
    host, port = sock.getsockname()[:2]
    return Listener(sock, "http://" + _join(ANY_ADDRESSES.get(host, host), port), is_inherited=True)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
