import asyncio
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vashista.engine.errors import WorkloadError
from vashista.server.loadgen.lengths import LengthSpec
from vashista.server.loadgen.workload import FittedText, JsonLines, RandomWords, TextFile, read_dataset


class SpacedCounter:
    """A tokenizer in which a word costs by its letters, plus a template around the text."""

    def __init__(self, letters_a_token=3, overhead=0):
        self.letters = letters_a_token
        self.overhead = overhead
        self.num_calls = 0

    async def count(self, text):
        self.num_calls += 1
        return self.overhead + sum(-(-len(word) // self.letters) for word in text.split())


def draw(workload, num, seed=0, usage=None):
    async def main():
        if isinstance(workload, FittedText):
            await workload.prepare(random.Random(f"{seed}/words"), usage)
        rng = random.Random(seed)
        return [await workload.draw(rng) for _ in range(num)]

    return asyncio.run(main())


def fitted(counter, input_len="100", source=None, **options):
    return FittedText(
        source or RandomWords(),
        counter,
        input_len=LengthSpec.parse(input_len, param="input_len"),
        output_len=LengthSpec.parse("7", param="output_len"),
        **options,
    )


def count(counter, text):
    return asyncio.run(counter.count(text))


@settings(max_examples=40, deadline=None)
@given(st.integers(20, 3000), st.integers(1, 8), st.integers(0, 15), st.integers(0, 99))
def test_prompts_have_exactly_the_tokens_asked_for(length, letters, overhead, seed):
    counter = SpacedCounter(letters, overhead)
    (prompt,) = draw(fitted(counter, str(length)), 1, seed)
    assert count(counter, prompt.text) == length == prompt.num_tokens_asked
    assert prompt.max_tokens == 7


def test_fitting_asks_the_server_only_a_few_times_a_prompt():
    counter = SpacedCounter()
    draw(fitted(counter, "50:2000"), 50)
    assert counter.num_calls < 50 * 5


def test_prompts_differ_from_each_other_and_the_same_seed_makes_the_same_ones():
    first = [prompt.text for prompt in draw(fitted(SpacedCounter()), 20, seed=3)]
    again = [prompt.text for prompt in draw(fitted(SpacedCounter()), 20, seed=3)]
    other = [prompt.text for prompt in draw(fitted(SpacedCounter()), 20, seed=4)]
    assert first == again
    assert len({*first, *other}) == 40
    assert len({prompt[:20] for prompt in first}) == 20


def test_shared_prefixes_have_their_length_and_are_part_of_the_prompts_length():
    counter = SpacedCounter()
    prompts = draw(fitted(counter, "100:200", num_prefix_tokens=60, num_prefixes=2), 30)
    heads = set()
    for prompt in prompts:
        assert count(counter, prompt.text) == prompt.num_tokens_asked
        words = prompt.text.split()
        size = next(n for n in range(len(words)) if count(counter, " ".join(words[:n])) == 60)
        heads.add(" ".join(words[:size]))
    assert len(heads) == 2


def test_a_prefix_as_long_as_a_prompt_is_refused():
    with pytest.raises(WorkloadError, match="prefix_len 100"):
        fitted(SpacedCounter(), "100:200", num_prefix_tokens=100)


def test_a_length_shorter_than_the_chat_template_is_refused():
    with pytest.raises(WorkloadError, match="even a one-word prompt has 21 tokens"):
        draw(fitted(SpacedCounter(overhead=20), "10"), 1)


def test_without_tokenizer_the_ratio_is_learned_from_usage():
    usage = SpacedCounter(letters_a_token=2, overhead=10)
    prompts = draw(fitted(None, "1000"), 10, usage=usage)
    for prompt in prompts:
        assert abs(count(usage, prompt.text) - 1000) < 60
    assert usage.num_calls == 2 + 10


def test_a_text_gives_windows_of_its_own_words():
    text = " ".join(f"w{number}" for number in range(500))
    counter = SpacedCounter(letters_a_token=9)
    for prompt in draw(fitted(counter, "40", source=TextFile(text, name="t")), 5):
        numbers = [int(word[1:]) for word in prompt.text.split()]
        assert len(numbers) == 40
        assert all((after - before) % 500 == 1 for before, after in pairwise(numbers))


def test_lines_are_sent_in_order_and_their_own_lengths_win():
    data = '{"prompt": "a", "max_tokens": 3}\n\n{"text": "b"}\n'
    workload = JsonLines(data, name="f", output_len=LengthSpec.parse("9", param="output_len"), is_chat=False)
    prompts = draw(workload, 3)
    assert [(prompt.text, prompt.max_tokens) for prompt in prompts] == [("a", 3), ("b", 9), ("a", 3)]
    assert prompts[0].num_tokens_asked is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "f:2 is not JSON"),
        ("[]", "f:2 must be an object"),
        ("{}", "with one of"),
        ('{"prompt": "a", "text": "b"}', "with one of"),
        ('{"prompt": 3}', "wrong type"),
        ('{"prompt": ""}', "empty prompt"),
        ('{"messages": [{"role": "user"}]}', "need --endpoint chat"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens 0"),
        ('{"prompt": "a", "max_tokens": true}', "max_tokens True"),
    ],
)
def test_a_wrong_line_is_named_with_its_number(line, message):
    length = LengthSpec.parse("9", param="output_len")
    with pytest.raises(WorkloadError, match=message):
        JsonLines('{"prompt": "a"}\n' + line, name="f", output_len=length, is_chat=False)


def test_empty_or_unreadable_data_sets_are_named(tmp_path):
    length = LengthSpec.parse("9", param="output_len")
    with pytest.raises(WorkloadError, match="no lines"):
        JsonLines("\n", name="f", output_len=length, is_chat=False)
    with pytest.raises(WorkloadError, match="no words"):
        TextFile(" \n", name="f")
    with pytest.raises(WorkloadError, match="cannot be read"):
        read_dataset(tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(WorkloadError, match="not UTF-8"):
        read_dataset(tmp_path / "latin.txt")
