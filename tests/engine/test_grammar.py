import json
import random

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece_style import save_sentencepiece_style
from tiny_models import BUNDLED, VOCAB_SIZE

from vashista.engine.errors import GrammarError
from vashista.engine.grammar import MAX_CACHED_GRAMMARS, MAX_SCHEMA_BYTES, GrammarFactory, compile_response_format
from vashista.engine.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(BUNDLED, VOCAB_SIZE)
PERSON = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["x", "yy"]},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["age", "kind", "flags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def factory():
    return GrammarFactory(TOKENIZER, VOCAB_SIZE, {0})


def of_schema(schema):
    return compile_response_format({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


def generate(matcher, choose, limit=400):
    """Token ids that a model would sample under the mask; the end of sequence is left out."""
    ids = []
    while not matcher.is_finished and len(ids) < limit:
        allowed = np.flatnonzero(matcher.allowed_tokens())
        token_id = int(choose(allowed))
        if token_id == 0:
            break
        assert matcher.consume(token_id)
        ids.append(token_id)
    return ids


@settings(max_examples=25)
@given(st.randoms(use_true_random=False))
def test_whatever_is_sampled_under_the_mask_fits_the_schema(factory, chance):
    text = TOKENIZER.decode(generate(factory.matcher(of_schema(PERSON)), chance.choice))
    jsonschema.validate(json.loads(text), PERSON)


def test_json_mode_gives_an_object(factory):
    matcher = factory.matcher(compile_response_format({"type": "json_object"}))
    first = np.flatnonzero(matcher.allowed_tokens())
    assert {TOKENIZER.token_text(int(i)).strip()[:1] for i in first} == {"{"}
    for token_id in TOKENIZER.encode('{"a": [1, {"b": null}]}'):
        assert matcher.allowed_tokens()[token_id]
        assert matcher.consume(token_id)
    assert matcher.is_finished


def test_plain_text_needs_no_grammar():
    assert compile_response_format(None) is None
    assert compile_response_format({"type": "text"}) is None


def test_the_end_is_allowed_exactly_where_the_output_is_complete(factory):
    matcher = factory.matcher(of_schema({"type": "integer"}))
    assert not matcher.allowed_tokens()[0]
    matcher.consume(TOKENIZER.encode("4")[0])
    assert matcher.is_accepting
    assert not matcher.is_finished
    assert matcher.allowed_tokens()[0]
    assert matcher.allowed_tokens()[TOKENIZER.encode("2")[0]]


def test_a_finished_output_allows_nothing_but_every_end_of_sequence():
    padded = Tokenizer.load(BUNDLED, VOCAB_SIZE + 100)
    matcher = GrammarFactory(padded, VOCAB_SIZE + 100, {0, VOCAB_SIZE + 50}).matcher(of_schema({"enum": [True]}))
    for token_id in padded.encode("true"):
        assert matcher.consume(token_id)
    assert matcher.is_finished
    allowed = matcher.allowed_tokens()
    assert allowed.shape == (VOCAB_SIZE + 100,)
    assert allowed.dtype == np.bool_
    assert np.flatnonzero(allowed).tolist() == [0, VOCAB_SIZE + 50]


def test_a_forced_token_that_does_not_fit_ends_in_an_error_that_allows_nothing(factory):
    matcher = factory.matcher(of_schema(PERSON))
    assert not matcher.consume(TOKENIZER.encode("%")[0])
    assert matcher.error is not None
    assert "%" in matcher.error
    assert not matcher.is_finished
    assert not matcher.allowed_tokens().any()


def test_a_matcher_can_be_replayed_and_forked(factory):
    first = factory.matcher(of_schema(PERSON))
    chance = random.Random(3)
    ids = generate(first, chance.choice, limit=6)
    fork = first.fork()
    expected = first.allowed_tokens()
    again = factory.matcher(of_schema(PERSON))
    assert again.consume(int(np.flatnonzero(again.allowed_tokens())[0]))
    assert again.replay(ids)
    generate(first, chance.choice)
    for matcher in (fork, again):
        assert (matcher.allowed_tokens() == expected).all()
    assert not again.replay([*ids, 5, 5, 5, 5])


def test_matchers_of_one_cached_grammar_do_not_share_state(factory):
    one, two = factory.matcher(of_schema(PERSON)), factory.matcher(of_schema(PERSON))
    before = two.allowed_tokens()
    generate(one, lambda allowed: allowed[-1], limit=5)
    assert (two.allowed_tokens() == before).all()


def test_more_grammars_than_the_cache_holds_all_work():
    factory = GrammarFactory(TOKENIZER, VOCAB_SIZE, {0})
    for number in range(MAX_CACHED_GRAMMARS + 5):
        matcher = factory.matcher(of_schema({"const": number}))
        assert TOKENIZER.decode(generate(matcher, lambda allowed: allowed[0])) == str(number)


def test_white_space_between_tokens_is_bounded(factory):
    matcher = factory.matcher(of_schema(PERSON))
    ids = generate(
        matcher, lambda allowed: max(allowed, key=lambda i: (TOKENIZER.token_text(int(i)).isspace(), int(i))), limit=200
    )
    assert "age" in TOKENIZER.decode(ids)


def test_a_sentencepiece_style_tokenizer_works_too(tmp_path):
    save_sentencepiece_style(tmp_path)
    tokenizer = Tokenizer.load(tmp_path, 300)
    matcher = GrammarFactory(tokenizer, 300, {2}).matcher(of_schema(PERSON))
    ids = []
    chance = random.Random(1)
    while not matcher.is_finished:
        ids.append(int(chance.choice(np.flatnonzero(matcher.allowed_tokens()))))
        assert matcher.consume(ids[-1])
    jsonschema.validate(json.loads(tokenizer.decode(ids)), PERSON)


def test_a_model_without_an_end_of_sequence_is_never_offered_one():
    matcher = GrammarFactory(TOKENIZER, VOCAB_SIZE, ()).matcher(of_schema({"type": "integer"}))
    assert matcher.consume(TOKENIZER.encode("4")[0])
    assert not matcher.allowed_tokens()[0]


def test_a_tokenizer_that_llguidance_cannot_use_is_named(monkeypatch):
    tokenizer = Tokenizer.load(BUNDLED, VOCAB_SIZE)
    monkeypatch.setattr(tokenizer, "to_json", lambda: "{}")
    with pytest.raises(GrammarError, match="cannot use this model's tokenizer"):
        GrammarFactory(tokenizer, VOCAB_SIZE, {0}).matcher(of_schema({}))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "objct"}, "objct"),
        ({"$ref": "#/nope"}, "nope"),
        ({"$ref": "file:///etc/passwd"}, "not fetch"),
        ({"$ref": "http://localhost/x.json"}, "not fetch"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"not": {}}, "not"),
        ({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}, "items"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, ""),
        ({"enum": []}, ""),
    ],
)
def test_a_schema_that_cannot_be_served_is_refused_with_the_reason(schema, words, factory):
    with pytest.raises(GrammarError, match=f"cannot be compiled.*{words}") as caught:
        factory.validate(of_schema(schema))
    assert caught.value.param == "response_format"
    assert "<state>" not in caught.value.message


def test_deep_nesting_is_refused(factory):
    schema = {"type": "integer"}
    for _ in range(400):
        schema = {"type": "array", "items": schema}
    with pytest.raises(GrammarError, match="recursion limit"):
        factory.validate(of_schema(schema))


@pytest.mark.parametrize(
    "schema",
    [{}, PERSON, {"type": "object"}, {"type": "string", "maxLength": 10**6}, {"enum": ["a", 1, None]}, {"const": ""}],
)
def test_a_schema_that_can_be_served_passes(schema, factory):
    factory.validate(of_schema(schema))


def test_a_huge_schema_is_refused_with_the_limit():
    with pytest.raises(GrammarError, match=f"at most {MAX_SCHEMA_BYTES}"):
        of_schema({"enum": ["x" * MAX_SCHEMA_BYTES]})


@pytest.mark.parametrize(
    "response_format",
    [
        {},
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"schema": "x"}},
        {"type": "json_schema", "json_schema": {"schema": {"const": float("nan")}}},
    ],
)
def test_a_malformed_response_format_is_refused(response_format):
    with pytest.raises(GrammarError):
        compile_response_format(response_format)
