import json
import threading
import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece_style import save_sentencepiece_style
from tiny_models import BUNDLED, VOCAB_SIZE
from transformers import PreTrainedTokenizerFast

from vashista.engine.errors import (
    InvalidRequestError,
    ModelFolderError,
    TokenizerError,
    TokenOutOfVocabularyError,
)
from vashista.engine.tokenizer import Tokenizer

BYTE_LEVEL = Tokenizer.load(BUNDLED, VOCAB_SIZE)
JUDGE = tokenizers.Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """(ours, the library's) of a tokenizer like Llama 2's."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    backend = save_sentencepiece_style(folder)
    return Tokenizer.load(folder, 1000), backend


@given(st.text(max_size=60))
def test_byte_level_text_survives_the_way_through_tokens(text):
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text)) == text


@given(st.text(alphabet="ab \né日😀", max_size=300), st.integers(1, 40), st.booleans())
def test_encoding_with_a_limit_is_that_without_or_the_text_has_more(text, most, adds):
    ids = BYTE_LEVEL.encode(text, adds)
    bounded = BYTE_LEVEL.encode_at_most(text, most, adds)
    assert bounded == ids if bounded is not None else len(ids) > most
    assert bounded is None or len(text) <= 4 * most or len(ids) <= 8 * most


def test_a_text_of_15_megabytes_is_not_read_to_its_end_to_say_that_it_is_too_long(monkeypatch):
    num_read = []
    encode = BYTE_LEVEL.encode
    monkeypatch.setattr(BYTE_LEVEL, "encode", lambda text, adds=True: num_read.append(len(text)) or encode(text, adds))
    assert BYTE_LEVEL.encode_at_most("word " * 3_000_000, 1000) is None
    assert sum(num_read) <= 4 * 4000 + 4000


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40), st.booleans())
def test_byte_level_decoding_equals_the_library_on_any_ids(ids, skip):
    assert BYTE_LEVEL.decode(ids, skip) == JUDGE.decode(ids, skip_special_tokens=skip)


@given(st.lists(st.integers(1, 259), max_size=30))
def test_single_bytes_decode_like_the_library_however_broken_the_utf_8(ids):
    assert BYTE_LEVEL.decode(ids) == JUDGE.decode(ids)


@given(text=st.text(max_size=40), skip=st.booleans())
def test_sentencepiece_style_text_equals_the_library_and_itself(sentencepiece, text, skip):
    ours, judge = sentencepiece
    ids = ours.encode(text)
    assert ids == judge.encode(text).ids
    assert ours.decode(ids, skip) == judge.decode(ids, skip_special_tokens=skip)
    assert ours.decode(ours.encode(text, add_special_tokens=False)) == text


def test_the_post_processor_alone_decides_about_a_beginning_token(sentencepiece):
    ours, _ = sentencepiece
    assert ours.encode("ab")[0] == ours.token_id("<s>") == 1
    assert ours.encode("ab", add_special_tokens=False)[0] != 1
    assert BYTE_LEVEL.encode("ab") == BYTE_LEVEL.encode("ab", add_special_tokens=False)


def test_the_bytes_of_a_text_are_the_bytes_of_its_tokens(sentencepiece):
    text = "naïve 😀 日本 x"
    for tokenizer, prefix in ((BYTE_LEVEL, b""), (sentencepiece[0], b" ")):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(tokenizer.token_bytes(token_id) for token_id in ids) == prefix + text.encode()


def test_a_token_with_a_part_of_a_character_shows_u_fffd_and_its_exact_bytes():
    parts = BYTE_LEVEL.encode("😀")
    assert len(parts) > 1
    assert b"".join(map(BYTE_LEVEL.token_bytes, parts)) == "😀".encode()
    assert BYTE_LEVEL.token_text(parts[0]) == "\ufffd"


def test_control_tokens_are_left_out_of_text_unless_asked_for():
    ids = [*BYTE_LEVEL.encode("one"), 0]
    assert BYTE_LEVEL.special_ids == {0}
    assert BYTE_LEVEL.decode(ids) == "one"
    assert BYTE_LEVEL.decode(ids, skip_special_tokens=False) == "one<|end|>"
    assert BYTE_LEVEL.token_text(0) == "<|end|>"


def test_an_added_token_outside_the_byte_alphabet_keeps_its_text(tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    backend.add_tokens(["<|a b|>", "<｜tool▁call｜>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path, VOCAB_SIZE + 2)
    ids = ours.encode("x<|a b|><｜tool▁call｜>y")
    assert ours.decode(ids) == backend.decode(ids) == "x<|a b|><｜tool▁call｜>y"


def test_ids_above_the_tokenizer_but_within_the_model_have_no_text():
    padded = Tokenizer.load(BUNDLED, VOCAB_SIZE + 64)
    assert padded.token_bytes(VOCAB_SIZE + 1) == b""
    assert padded.decode([VOCAB_SIZE + 1, *padded.encode("a")]) == "a"


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 1 << 40])
def test_an_id_outside_the_vocabulary_is_named(token_id):
    for refused in (BYTE_LEVEL.check_ids, BYTE_LEVEL.decode):
        with pytest.raises(TokenOutOfVocabularyError, match=rf"{token_id} is not in the vocabulary.*8191"):
            refused([5, token_id])


def test_an_unpaired_surrogate_is_refused_with_its_place():
    with pytest.raises(InvalidRequestError, match="character 2"):
        BYTE_LEVEL.encode("ab\ud83dc")


def test_other_threads_run_while_a_long_text_is_encoded():
    text = "It was a dark night. " * 50_000
    thread = threading.Thread(target=BYTE_LEVEL.encode, args=(text,))
    num_turns = 0
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        num_turns += 1
    assert num_turns > 20


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=7)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "one two three four five six seven eight nine ten"
    assert Tokenizer.load(tmp_path, VOCAB_SIZE).encode(text) == BYTE_LEVEL.encode(text)


def test_encoding_equals_that_of_transformers():
    judge = PreTrainedTokenizerFast.from_pretrained(BUNDLED, local_files_only=True)
    text = "It was 1849,\r\n  and naïve 😀 <|end|> again"
    assert BYTE_LEVEL.encode(text) == judge.encode(text)


def test_a_tokenizer_larger_than_the_model_is_refused():
    with pytest.raises(TokenizerError, match=r"up to 8191.*vocabulary is 8000"):
        Tokenizer.load(BUNDLED, 8000)


@pytest.mark.parametrize("text", ["", "{}", "garbage", '{"version": "1.0", "model": {"type": "Nope"}}', "[" * 9999])
def test_a_damaged_tokenizer_is_refused(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path, VOCAB_SIZE)


def test_a_post_processor_with_a_token_that_is_not_there_is_refused(tmp_path):
    save_sentencepiece_style(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["post_processor"]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(TokenizerError, match="not a tokenizer"):
        Tokenizer.load(tmp_path, 300)


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}])
def test_a_decoder_that_is_not_understood_is_refused(decoder, tmp_path):
    spec = json.loads((BUNDLED / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {"decoder": decoder}))
    with pytest.raises(TokenizerError, match="decoder"):
        Tokenizer.load(tmp_path, VOCAB_SIZE)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path, VOCAB_SIZE)
    with pytest.raises(ModelFolderError):
        Tokenizer.load(tmp_path / "nowhere", VOCAB_SIZE)


@settings(max_examples=30)
@given(st.binary(max_size=200))
def test_random_bytes_as_tokenizer_end_in_a_named_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("random")
    (folder / "tokenizer.json").write_bytes(data)
    with pytest.raises((TokenizerError, ModelFolderError)):
        Tokenizer.load(folder, VOCAB_SIZE)
