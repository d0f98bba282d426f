"""The words that tasks use as names: those of the evaluation, and two lists to compare with.

The reference model was taught recall with the words of the training; the evaluation's are 200-odd nouns of them, each
one token of its tokenizer. Codes, chains, pairings and texts are new in each sample, so a score is one of recall, not
of memory. The held-out words were never a name in a lesson: what a small model loses on them is in its card. As words
of the books, all are in the training's texts.
"""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent
EVALUATION_WORDS = tuple((_FOLDER / "words_evaluation.txt").read_text(encoding="utf-8").split())
HELD_OUT_WORDS = tuple((_FOLDER / "words_held_out.txt").read_text(encoding="utf-8").split())
TRAINING_WORDS = tuple((_FOLDER / "words_training.txt").read_text(encoding="utf-8").split())
