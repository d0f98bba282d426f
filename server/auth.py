"""Who may call: once an API key was ever made, every route but /health needs one, with a role that opens it.

The gate asks this before it looks at anything else of a request. A key comes as `Authorization: Bearer KEY`, or as the
password of HTTP Basic, so that a browser can open /docs and Prometheus can use either.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Sequence

from starlette.datastructures import Headers

from vashista.engine.errors import InvalidKeyError, KeysUnreadableError, RoleError, StateFolderError
from vashista.server.keys import Key, KeyStore, Role

logger = logging.getLogger(__name__)
OPEN_PATHS = frozenset({"/health"})
MAX_HEADER_CHARS = 1024


class Authenticator:
    """Checks the key of a request against the store."""

    def __init__(self, keys: KeyStore) -> None:
        self._keys = keys

    def check(self, path: str, headers: Headers) -> Key | None:
        """The caller's key, None where none is needed; InvalidKeyError when it is missing, wrong or revoked.

        Which paths it opens, `check_role` says. KeysUnreadableError when nobody can be let in.
        """
        if path in OPEN_PATHS:
            return None
        try:
            if not self._keys.are_needed():
                return None
            text = _presented_key(headers)
            key = None if text is None else self._keys.verify(text)
        except StateFolderError as error:
            # Its message names files of this machine, which callers need not know.
            logger.error("error[%s]: %s %s", error.code, error.message, error.remedy)
            raise KeysUnreadableError("The API keys of this server cannot be read now.") from None
        if text is None:
            raise InvalidKeyError("No API key was sent; this server asks for one.")
        if key is None:
            raise InvalidKeyError("The API key is wrong or was revoked.")
        return key


def check_role(key: Key | None, roles: Sequence[Role], path: str) -> None:
    """RoleError unless the key has one of the roles; without keys everything is open."""
    if key is not None and not key.opens(roles):
        needed = " or ".join(dict.fromkeys([*roles, Role.ADMIN]))
        raise RoleError(f"The key {key.id} has the role {' and '.join(key.roles)}; {path[:200]} needs {needed}.")


def _presented_key(headers: Headers) -> str | None:
    scheme, _, value = headers.get("authorization", "")[:MAX_HEADER_CHARS].partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer" and value:
        return value
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2] or None
        except (binascii.Error, UnicodeDecodeError):
            return None
    return headers.get("x-api-key")
