"""Log probabilities of a prompt cross the channel as bytes, in pieces that are decoded one by one."""

from __future__ import annotations

import msgspec
import pytest

from vashista.engine.channel import HEADER, decode_from_engine, encode_frame
from vashista.engine.messages import EngineStats, StepReport, TokenEvent, TokenLogprobs
from vashista.engine.prompt_logprobs import PIECE_CANDIDATES, packed, unpacked


def entries(num_tokens: int, num_top: int) -> list[TokenLogprobs | None]:
    top = [(token, -0.25 * token) for token in range(num_top)]
    return [None, *(TokenLogprobs(token, -0.5, 1, top) for token in range(1, num_tokens))]


@pytest.mark.parametrize(
    ("num_tokens", "num_top"), [(1, 0), (5, 20), (PIECE_CANDIDATES + 1, 0), (3, PIECE_CANDIDATES + 5)]
)
def test_what_is_packed_comes_back_from_the_channel(num_tokens: int, num_top: int) -> None:
    whole = entries(num_tokens, num_top)
    event = TokenEvent("r", prompt_logprobs=packed(whole, num_top))
    report = decode_from_engine(encode_frame(StepReport([event], EngineStats()))[HEADER.size :])
    assert isinstance(report, StepReport)
    pieces = report.events[0].prompt_logprobs
    assert pieces is not None
    assert all(isinstance(piece, msgspec.Raw) for piece in pieces), "decoded where every message is, in the event loop"
    assert list(unpacked(pieces)) == whole


def test_no_piece_is_long() -> None:
    for num_top in (0, 1, 20, 1000):
        pieces = packed(entries(3000, num_top), num_top)
        lengths = [len(list(unpacked([piece]))) for piece in pieces]
        assert sum(lengths) == 3000
        assert max(lengths) * (num_top + 1) <= PIECE_CANDIDATES


def test_pieces_are_decoded_as_they_are_wanted() -> None:
    pieces = [*packed(entries(2, 1), 1), msgspec.Raw(b"\xc1")]
    read = unpacked(pieces)
    assert [next(read), next(read)] == entries(2, 1)
    with pytest.raises(msgspec.DecodeError):
        next(read)
