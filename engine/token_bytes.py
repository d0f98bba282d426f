"""The exact bytes a token stands for, from the decoder of tokenizer.json.

`engine/tokenizer.py` asks here; its text, its streams and its logprobs are all made of these bytes. Two families of
tokenizers exist among the supported architectures: byte-level BPE (Llama 3, Qwen), whose tokens spell bytes with 256
printable characters, and sentencepiece style (Llama 2, Mistral), whose tokens are text with U+2581 for a space and
`<0x0A>` for single bytes.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import decoders

from vashista.engine.errors import TokenizerError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-ins: a character for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_CHARACTER_BYTES = _byte_characters()


class TokenBytes:
    """Turns a token as tokenizer.json spells it into bytes."""

    def __init__(self, decoder: decoders.Decoder | None) -> None:
        self.num_leading_spaces = 0
        """Spaces that decoding takes off the start of a whole text (sentencepiece puts one before it)."""
        self._is_byte_level = False
        self._has_byte_fallback = False
        self._replacements: list[tuple[str, str]] = []
        if decoder is None:
            raise TokenizerError("tokenizer.json has no decoder, so its tokens cannot be turned into text.")
        spec = json.loads(decoder.__getstate__())
        parts = spec["decoders"] if spec["type"] == "Sequence" else [spec]
        for position, part in enumerate(parts):
            self._add(part, is_fused=any(before["type"] == "Fuse" for before in parts[:position]))

    def of(self, token: str) -> bytes:
        """The token's bytes; they may be a part of a character."""
        if self._is_byte_level:
            spelled = [_CHARACTER_BYTES.get(character, -1) for character in token]
            return token.encode() if -1 in spelled else bytes(spelled)
        for old, new in self._replacements:
            token = token.replace(old, new)
        match = _BYTE_TOKEN.fullmatch(token) if self._has_byte_fallback else None
        return bytes([int(match[1], 16)]) if match else token.encode()

    def _add(self, part: dict[str, Any], *, is_fused: bool) -> None:
        match part:
            case {"type": "ByteLevel"}:
                self._is_byte_level = True
            case {"type": "ByteFallback"}:
                self._has_byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                self._replacements.append((old, new))
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if is_fused:
                self.num_leading_spaces = start
            case {"type": "Metaspace", "replacement": str(old)}:
                self._replacements.append((old, " "))
                self.num_leading_spaces = int(part.get("prepend_scheme", "always") != "never")
            case _:
                raise TokenizerError(
                    f"tokenizer.json has the decoder {json.dumps(part)[:200]}, which is not supported; supported are "
                    "ByteLevel, and sequences of Replace, ByteFallback, Fuse, Strip and Metaspace."
                )
