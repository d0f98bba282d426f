"""Sample texts, the passages cut from them, and the positions that are measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from vashista.engine.errors import MeasurementError, SampleTextError
from vashista.engine.sample_text import SampleTokens, check_contexts, read_sample_text, spread_positions
from vashista.engine.tokenizer import Tokenizer

MODEL = Path(__file__).parents[1] / "data" / "plain" / "reference-26m"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(MODEL, 8192)


def test_the_bundled_text_gives_two_passages_of_the_bundled_models_context(tokenizer: Tokenizer) -> None:
    tokens = SampleTokens(read_sample_text(None), tokenizer)
    one, other = tokens.passages(2, 32768)
    assert len(one) == len(other) == 32768
    assert one != other


def test_passages_do_not_overlap_and_are_spread_over_the_text(tokenizer: Tokenizer) -> None:
    text = read_sample_text(None)[:20_000]
    all_ids = tokenizer.encode(text, add_special_tokens=False)
    tokens = SampleTokens(text, tokenizer)
    stride = len(all_ids) // 3
    assert tokens.longest(3) == stride
    for length in (1, 100, stride):
        assert tokens.passages(3, length) == [all_ids[start : start + length] for start in (0, stride, 2 * stride)]


def test_every_passage_begins_with_what_the_tokenizer_puts_before_a_text(tokenizer: Tokenizer) -> None:
    class WithStart(Tokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [7] * add_special_tokens + tokenizer.encode(text, add_special_tokens=False)

    tokens = SampleTokens("word " * 100, WithStart.__new__(WithStart))
    plain = tokenizer.encode("word " * 100, add_special_tokens=False)
    assert tokens.passages(2, 5) == [[7, *plain[:4]], [7, *plain[len(plain) // 2 :][:4]]]


def test_a_text_that_is_too_short_says_how_long_it_is(tokenizer: Tokenizer) -> None:
    tokens = SampleTokens("one two three", tokenizer)
    longest = tokens.longest(1)
    with pytest.raises(SampleTextError, match=rf"has {longest} tokens .* 1 passages of {longest + 1} do not fit"):
        tokens.passages(1, longest + 1)
    with pytest.raises(SampleTextError, match="at most 0 tokens"):
        SampleTokens("", tokenizer).passages(1, 1)


def test_a_file_that_is_missing_a_folder_or_no_utf8_has_a_named_error(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(SampleTextError, match="not UTF-8 text: byte 3"):
        read_sample_text(path)
    with pytest.raises(SampleTextError, match="cannot be read"):
        read_sample_text(tmp_path / "none")
    with pytest.raises(SampleTextError, match="not a plain file"):
        read_sample_text(tmp_path)
    path.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9")
    assert read_sample_text(path) == "café"


@pytest.mark.parametrize("contexts", [[], [0, 5], [5, 5], [6, 5], [-1]])
def test_contexts_must_be_positive_and_ascend(contexts: list[int]) -> None:
    with pytest.raises(MeasurementError, match="must be positive and ascend"):
        check_contexts(contexts, 100)


def test_a_context_beyond_the_models_limit_is_refused() -> None:
    check_contexts([50, 100], 100)
    with pytest.raises(MeasurementError, match="made for 100"):
        check_contexts([50, 101], 100)


@pytest.mark.parametrize(("context", "number"), [(1, 1), (8, 8), (10, 3), (2048, 16), (16384, 100), (17, 17)])
def test_positions_differ_end_at_the_last_token_and_stay_in_its_last_eighth(context: int, number: int) -> None:
    positions = spread_positions(context, number)
    assert len(set(positions)) == number
    assert positions == sorted(positions)
    assert positions[-1] == context - 1
    assert positions[0] >= context - max(context // 8, number)


def test_positions_of_a_long_context_fall_anywhere_in_their_groups_of_16() -> None:
    assert len({position % 16 for position in spread_positions(2048, 16)}) > 8


def test_more_positions_than_tokens_are_refused() -> None:
    with pytest.raises(MeasurementError, match="5 positions were asked for in a context of 4"):
        spread_positions(4, 5)
