"""Log probabilities of a prompt on their way to the reply: encoded in pieces, which whoever reads them decodes.

They are hundreds of thousands of numbers for a long prompt. Decoded in one go, with the event that brings them, they
kept the server's event loop and all its streams for 77 ms (12,000 tokens with 20 alternatives each, on one core of a
virtual machine with AVX2); as bytes they pass through it, and the thread that writes the reply decodes one piece after
the other, between which the loop has its turn. The engine packs what a step found; `server/routes/` unpack it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from vashista.engine.messages import TokenLogprobs

PIECE_CANDIDATES = 4096
"""Candidates of a piece, at most, but for a single position that has more: they are decoded in about 1 ms."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[TokenLogprobs | None])


def packed(entries: Sequence[TokenLogprobs | None], num_top: int) -> list[msgspec.Raw]:
    """The entries, with `num_top` alternatives each, in as many pieces as they need."""
    size = max(1, PIECE_CANDIDATES // (num_top + 1))
    starts = range(0, len(entries), size)
    return [msgspec.Raw(_encoder.encode(entries[start : start + size])) for start in starts]


def unpacked(pieces: Sequence[msgspec.Raw]) -> Iterator[TokenLogprobs | None]:
    """The entries, one for each token of the prompt; None for the first, which nothing predicts."""
    for piece in pieces:
        yield from _decoder.decode(piece)
