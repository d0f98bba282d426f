from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vashista.engine.errors import InvalidReceiptError, LedgerDamagedError
from vashista.engine.messages import AttentionMode, FinishReason
from vashista.server.ledger.receipt import MAX_BYTES, Outcome, Receipt, decode, encode, utc_text

DIGEST = b"ab" * 32
Make = Callable[..., Receipt]


def test_the_canonical_bytes_are_these(receipt: Make) -> None:
    assert encode(receipt(1)) == (
        b'{"v":1,"time":"2026-09-21T15:13:20.000000Z","request_id":"request-1","key_id":"4f0c2a9be1d7",'
        b'"client":"192.0.2.7","endpoint":"/v1/chat/completions","model":"reference-26m","model_digest":"'
        + DIGEST
        + b'",'
        b'"parameters":{"max_tokens":16,"stop":["\\n"],"temperature":0.7},"prompt_hash":null,"num_prompt_tokens":12,'
        b'"num_cached_tokens":4,"num_output_tokens":3,"attention":{},"support":null,"prediction":null,"outcome":{"queue_s":0.001,'
        b'"ttft_s":0.25,"total_s":1.5,"busy_s":0.5,"energy_j":null,"energy_source":null,"cost_nano":1500,'
        b'"currency":"EUR"},"finish_reasons":["stop"],"error_code":null}'
    )


def test_the_order_in_which_parameters_were_given_does_not_matter(receipt: Make) -> None:
    one, other = {"a": {"y": 1, "x": 2}, "b": 1}, {"b": 1, "a": {"x": 2, "y": 1}}
    assert encode(receipt(parameters=one)) == encode(receipt(parameters=other))


texts = st.text(st.characters(codec="utf-8"))
numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(parameters=st.dictionaries(texts, plain, max_size=4))
def test_what_was_encoded_is_decoded_and_any_json_reader_agrees(receipt: Make, parameters: dict[str, object]) -> None:
    made = receipt(parameters=parameters, attention=AttentionMode(token_budget=512))
    body = encode(made)
    assert decode(body, 1) == made
    assert encode(decode(body, 1)) == body
    assert json.loads(body)["parameters"] == parameters


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused_wherever_it_stands(receipt: Make, number: float) -> None:
    for changes in (
        {"outcome": Outcome(busy_s=number)},
        {"parameters": {"a": [{"b": number}]}},
        {"prediction": {"ttft_s": number}},
        {"attention": AttentionMode(max_dropped_mass=number)},
    ):
        with pytest.raises(InvalidReceiptError, match="not finite"):
            encode(receipt(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time": "2026-11-24 00:53"}, "is not like"),
        ({"finish_reasons": ()}, "finish reason or an error code"),
        ({"num_output_tokens": -1}, "negative"),
        ({"client": "\ud800"}, "JSON"),
        ({"model": "m" * MAX_BYTES}, "at most"),
    ],
)
def test_a_receipt_that_cannot_be_written_down_is_refused(
    receipt: Make, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidReceiptError, match=message):
        encode(receipt(**changes))


def test_a_refused_request_has_a_receipt_without_a_finish_reason(receipt: Make) -> None:
    refused = receipt(finish_reasons=(), error_code="queue_full", outcome=Outcome())
    assert decode(encode(refused), 1) == refused


def test_bytes_that_are_no_receipt_name_their_row() -> None:
    for body in (b"", b"{}", b'{"v":2}', b"\xff"):
        with pytest.raises(LedgerDamagedError, match="Receipt 7"):
            decode(body, 7)


def test_times_sort_as_texts_even_at_whole_seconds() -> None:
    assert utc_text(0.0) == "1970-01-01T00:00:00.000000Z"
    assert utc_text(1.5) < utc_text(2.0) < utc_text(2.000001)


def test_finish_reasons_are_the_engines(receipt: Make) -> None:
    assert decode(encode(receipt(finish_reasons=tuple(FinishReason))), 1).finish_reasons == tuple(FinishReason)
