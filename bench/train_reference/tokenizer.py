"""The reference model's tokenizer: byte-level BPE of 8,192 tokens, trained on the books it learns from.

    python bench/train_reference/tokenizer.py --corpus FOLDER --output tokenizer.json

Each digit is a token, a run of line ends is cut off from words, and a control token marks where a text begins, where a
text or a turn ends, and whose turn begins. `data.py` tokenises with the file, `export.py` puts it beside the weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import suite_path  # noqa: F401
from argument_kinds import new_file
from arguments import book_folder
from corpus import read_books
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
CONTROL_TOKENS = (BEGIN, END, PAD, SYSTEM, USER, ASSISTANT)
"""Ids 0 to 5, in this order."""
VOCAB_SIZE = 8192
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
"""What is never merged across, after GPT-2: words with the space before, single digits, marks, line ends."""


def train_tokenizer(texts: Iterator[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A tokenizer whose vocabulary is exactly `vocab_size`; it puts BEGIN before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, 0)]
    )
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the texts give {tokenizer.get_vocab_size()} tokens, {vocab_size} were asked for")
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=book_folder, required=True, help="folder of train-*.jsonl.xz")
    parser.add_argument("--output", type=new_file, required=True)
    options = parser.parse_args()
    train_tokenizer(entry["text"] for entry in read_books(options.corpus)).save(str(options.output), pretty=False)


if __name__ == "__main__":
    main()
