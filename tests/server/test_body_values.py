"""Values of a JSON text are counted before it is decoded: as many as there are, whatever strings hold."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vashista.engine.errors import InvalidRequestError, UnknownFieldError
from vashista.server.body_values import NUMBERS, has_more_values, most_values
from vashista.server.schemas.chat import ChatRequest
from vashista.server.schemas.completions import CompletionRequest
from vashista.server.schemas.fields import MAX_ERRORS, parse

Text = st.text(alphabet='"\\[]{},:ab\n\u00e9', max_size=8)
Value = st.recursive(
    st.none() | st.booleans() | st.integers() | Text,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(Text, children, max_size=4),
    max_leaves=20,
)


def count(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(1 + count(member) for member in value.values())
    if isinstance(value, list):
        return 1 + sum(map(count, value))
    return int(isinstance(value, str))


@pytest.mark.parametrize("text", ["", "a,b," * 1000, '","' * 1000])
def test_of_values_in_all_there_may_be_eight_times_as_many(text: str) -> None:
    for num_ids, is_more in ((NUMBERS * 50, False), (NUMBERS * 50 + 1, True)):
        assert has_more_values(json.dumps({"text": text, "prompt": [7] * num_ids}).encode(), 50) == is_more


@given(Value, st.booleans())
def test_strings_lists_and_objects_are_counted_and_nothing_else(value: Any, is_ascii: bool) -> None:
    text, num_values = json.dumps(value, ensure_ascii=is_ascii).encode(), count(value)
    assert most_values(text) >= num_values
    assert not has_more_values(bytearray(text), max(num_values, text.count(b",") // NUMBERS + 1))
    if num_values:
        assert has_more_values(bytearray(text), num_values - 1)


@pytest.mark.parametrize(
    "text", ["hello", '"' * 20_000, "\\" * 20_001, "[{" * 20_000, 'a\\"' * 9_000, "a" * 20_000 + '"' * 10_000]
)
def test_a_text_is_one_value_however_long_and_whatever_it_says(text: str) -> None:
    body = json.dumps({"prompt": text}).encode()
    assert not has_more_values(body, 3)
    assert has_more_values(body, 2)


@given(st.binary(max_size=64), st.integers(0, 10))
def test_what_is_no_json_is_read_to_an_end(text: bytes, most: int) -> None:
    assert has_more_values(text, most) in {True, False}


def test_a_list_of_wrong_values_is_left_at_the_first() -> None:
    with pytest.raises(InvalidRequestError, match=r"^messages\.0: [^(]*, got 1\.$"):
        parse(ChatRequest, {"model": "m", "messages": [1] * 100_000})
    with pytest.raises(InvalidRequestError, match=r"^stop\.1: [^(]*, got 1\.$"):
        parse(CompletionRequest, {"model": "m", "prompt": "a", "stop": ["a", 1, 2]})


def test_a_wrong_value_is_repeated_no_further_than_it_is_shown() -> None:
    with pytest.raises(InvalidRequestError, match=r"got \[true, true, .*…\.$") as caught:
        parse(CompletionRequest, {"model": "m", "prompt": [True] * 100_000})
    assert len(caught.value.message) < 300
    with pytest.raises(InvalidRequestError, match=r'got "5"\.$'):
        parse(CompletionRequest, {"model": "m", "prompt": "a", "n": "5"})


def test_the_first_of_very_many_wrong_fields_is_not_looked_for() -> None:
    body = {"model": "m", "prompt": "a", **{f"u{number}": 1 for number in range(MAX_ERRORS)}}
    with pytest.raises(UnknownFieldError, match="'u0'"):
        parse(CompletionRequest, body)
    with pytest.raises(InvalidRequestError, match=f"^{MAX_ERRORS + 1} fields of the body are unknown"):
        parse(CompletionRequest, {**body, "v": 1})
