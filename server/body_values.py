"""How many values a JSON text has, counted before it is decoded: `server/body.py` refuses bodies of too many.

A body of 16 MiB may hold millions of small values. Decoding, checking and freeing so many Python objects keeps the
interpreter busy for seconds, in whatever thread, and halts every stream; a text of the same size costs nothing. What
counts are strings (also names of members), lists and objects. Numbers, such as token ids, are small and cheap: of
values in all there may be NUMBERS times as many.
"""

from __future__ import annotations

import re

NUMBERS = 8
_PART = re.compile(rb'(?:[^"\\]++|\\.){0,4096}+', re.DOTALL)
"""A part of a string, short enough that other threads get their turn between two."""


def most_values(text: bytes | bytearray) -> int:
    """A bound on the values, at the speed of reading; too high where strings hold brackets or quotes."""
    return (text.count(b'"') + 1) // 2 + text.count(b"[") + text.count(b"{")


def has_more_values(text: bytes | bytearray, most: int) -> bool:
    """Whether there are more than `most`, or commas for NUMBERS times as many; of what is no JSON, anything."""
    if most_values(text) <= most and text.count(b",") <= NUMBERS * most:
        return False
    num_values = num_commas = end = 0
    while num_values <= most and num_commas <= NUMBERS * most:
        start = text.find(b'"', end)
        outside = len(text) if start < 0 else start
        num_values += text.count(b"[", end, outside) + text.count(b"{", end, outside)
        num_commas += text.count(b",", end, outside)
        if start < 0:
            return num_values > most or num_commas > NUMBERS * most
        num_values += 1
        end = _end_of_string(text, start + 1)
    return True


def _end_of_string(text: bytes | bytearray, position: int) -> int:
    """Behind the closing quote of a string, from any position within; the end of the text if there is none."""
    while True:
        part = _PART.match(text, position)
        assert part is not None, "it matches nothing at all, too"
        if text[part.end() : part.end() + 1] == b'"':
            return part.end() + 1
        if part.end() == position:
            return len(text)
        position = part.end()
