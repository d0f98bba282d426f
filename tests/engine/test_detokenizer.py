import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece_style import save_sentencepiece_style
from tiny_models import BUNDLED, VOCAB_SIZE

from vashista.engine.detokenizer import StreamDetokenizer
from vashista.engine.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(BUNDLED, VOCAB_SIZE)
BYTE_IDS = [next(i for i in range(VOCAB_SIZE) if TOKENIZER.token_bytes(i) == bytes([byte])) for byte in range(256)]
any_ids = st.lists(st.integers(0, VOCAB_SIZE - 1) | st.sampled_from(BYTE_IDS), max_size=40)
letters = st.text("abc", min_size=1, max_size=4)


def ids_of(data):
    """One token a byte."""
    return [BYTE_IDS[byte] for byte in data]


def run(stream, ids):
    """(whole text, pieces) of a stream that ends at its stop string or with its last id."""
    pieces = []
    for token_id in ids:
        pieces.append(stream.push(token_id))
        if stream.matched_stop is not None:
            break
    else:
        pieces.append(stream.flush())
    return "".join(pieces), pieces


def cut(text, stops, first_end):
    """The specification: (text before the stop string that is complete first, that string), character by character."""
    for end in range(max(first_end, 1), len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@given(any_ids)
def test_the_pieces_together_are_the_text_of_all_tokens(ids):
    assert run(StreamDetokenizer(TOKENIZER), ids)[0] == TOKENIZER.decode(ids)


@given(st.binary(max_size=40))
def test_broken_utf_8_is_never_lost(data):
    whole, pieces = run(StreamDetokenizer(TOKENIZER), ids_of(data))
    assert whole == data.decode("utf-8", "replace")
    assert all(not "\ud800" <= character <= "\udfff" for piece in pieces for character in piece)


def test_an_emoji_split_over_tokens_comes_whole_with_its_last_byte():
    _, pieces = run(StreamDetokenizer(TOKENIZER), ids_of("a😀b".encode()))
    assert pieces == ["a", "", "", "", "😀", "b", ""]


def test_an_incomplete_character_at_the_end_becomes_u_fffd():
    assert run(StreamDetokenizer(TOKENIZER), ids_of("a😀".encode()[:-1]))[0] == "a\ufffd"


@given(st.text("abc", max_size=30), st.lists(letters, min_size=1, max_size=4), st.integers(0, 8), st.data())
def test_the_text_ends_before_the_first_complete_stop_string_however_tokens_cut_it(text, stops, min_tokens, data):
    pieces = []
    rest = text
    while rest:
        token_id = data.draw(
            st.sampled_from([i for i in PREFIXES[rest[0]] if rest.startswith(TOKENIZER.token_text(i))])
        )
        pieces.append(token_id)
        rest = rest[len(TOKENIZER.token_text(token_id)) :]
    stream = StreamDetokenizer(TOKENIZER, stops, min_tokens)
    whole, _ = run(stream, pieces)
    lengths = [len(TOKENIZER.token_text(token_id)) for token_id in pieces]
    expected = cut(text, stops, sum(lengths[: max(min_tokens - 1, 0)]) + 1)
    assert (whole, stream.matched_stop) == expected


PREFIXES = {
    first: [
        i
        for i in range(VOCAB_SIZE)
        if set(TOKENIZER.token_text(i)) <= set("abc") and TOKENIZER.token_text(i)[:1] == first
    ]
    for first in "abc"
}


def test_text_that_may_become_a_stop_string_is_held_back_until_it_cannot():
    stream = StreamDetokenizer(TOKENIZER, ("END.",))
    assert [stream.push(token_id) for token_id in ids_of(b"xENxEND")] == ["x", "", "", "ENx", "", "", ""]
    assert stream.flush() == "END"
    assert stream.matched_stop is None


def test_a_stop_string_within_one_token_leaves_what_is_before_it():
    stream = StreamDetokenizer(TOKENIZER, ("he",))
    assert stream.push(TOKENIZER.token_id("Ġthe")) == " t"
    assert stream.matched_stop == "he"


def test_of_two_stop_strings_the_first_complete_one_wins_and_of_equals_the_longer():
    for stops, text, stop in ((("bcd", "abcde"), "a", "bcd"), (("c", "abc"), "", "abc")):
        stream = StreamDetokenizer(TOKENIZER, stops)
        assert run(stream, ids_of(b"abcde"))[0] == text
        assert stream.matched_stop == stop


def test_a_stop_string_completed_by_a_replacement_character_at_the_end_counts():
    stream = StreamDetokenizer(TOKENIZER, ("a\ufffd",))
    assert run(stream, ids_of(b"xa\xf0"))[0] == "x"
    assert stream.matched_stop == "a\ufffd"


def test_control_tokens_say_nothing_and_count_as_tokens():
    stream = StreamDetokenizer(TOKENIZER, ("b",), 3)
    assert run(stream, [0, 0, *ids_of(b"ab")])[0] == "a"
    assert run(StreamDetokenizer(TOKENIZER, skip_special_tokens=False), [0, *ids_of(b"a")])[0] == "<|end|>a"


@given(any_ids, any_ids)
def test_after_a_prompt_the_text_continues_where_the_prompt_ended(context, ids):
    stream = StreamDetokenizer(TOKENIZER, context_ids=context)
    data = [b"" if i == 0 else TOKENIZER.token_bytes(i) for i in context + ids]
    prompt, both = b"".join(data[: len(context)]), b"".join(data)
    finished = prompt.decode("utf-8", "replace")
    try:
        prompt.decode()
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":  # an incomplete character, which the output completes
            finished = finished.removesuffix("\ufffd")
        elif both[error.start :]:
            incomplete = StreamDetokenizer(TOKENIZER)
            finished = "".join(incomplete.push(i) for i in context)
    assert finished + run(stream, ids)[0] == both.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    save_sentencepiece_style(folder)
    return Tokenizer.load(folder, 1000)


def test_the_space_before_a_word_stays_after_a_prompt_and_goes_without_one(sentencepiece):
    ids = sentencepiece.encode("the thing", add_special_tokens=False)
    prompt = sentencepiece.encode("a")
    assert run(StreamDetokenizer(sentencepiece), ids)[0] == "the thing"
    assert run(StreamDetokenizer(sentencepiece, context_ids=[1]), ids)[0] == "the thing"
    assert run(StreamDetokenizer(sentencepiece, context_ids=prompt), ids)[0] == " the thing"
    assert run(StreamDetokenizer(sentencepiece, context_ids=[*prompt, 2]), ids)[0] == " the thing"


@given(text=st.text(" ath", max_size=12))
def test_only_as_many_leading_spaces_go_as_the_tokenizer_adds(sentencepiece, text):
    ids = sentencepiece.encode(text, add_special_tokens=False)
    assert run(StreamDetokenizer(sentencepiece), ids)[0] == text
