"""The text that calibrate and diagnose run a model over, bundled or the operator's, and where in it they measure.

A text becomes passages of tokens, and in a passage queries are measured near each context length. No torch here, so
that a wrong file or number is found before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from vashista.engine.errors import MeasurementError, SampleTextError
from vashista.engine.tokenizer import Tokenizer

BUNDLED = "data/sample_text.txt"


def read_sample_text(path: Path | None) -> str:
    """The file's text, or the bundled one. Raises SampleTextError."""
    if path is None:
        return files("vashista.engine").joinpath(BUNDLED).read_text(encoding="utf-8")
    try:
        if path.exists() and not path.is_file():
            raise SampleTextError(f"{path} is not a plain file.")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SampleTextError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise SampleTextError(f"{path} is not UTF-8 text: byte {error.start} is wrong.") from error


class SampleTokens:
    """A text as tokens of one model."""

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        self._token_ids = tokenizer.encode(text, add_special_tokens=False)
        self._leading = tokenizer.encode("", add_special_tokens=True)
        """What the tokenizer puts before every text, such as a beginning-of-sequence token: an attention sink."""

    def longest(self, num_passages: int) -> int:
        """Tokens that each of so many passages can have at most; 0 for none."""
        own = len(self._token_ids) // num_passages
        return own + len(self._leading) if own else 0

    def passages(self, num_passages: int, num_tokens: int) -> list[list[int]]:
        """Passages of `num_tokens` tokens that do not overlap, spread over the text. Raises SampleTextError."""
        longest = self.longest(num_passages)
        if num_tokens > longest:
            raise SampleTextError(
                f"The sample text has {len(self._token_ids)} tokens of this model: {num_passages} passages of "
                f"{num_tokens} do not fit, at most {longest} tokens each are possible."
            )
        stride = len(self._token_ids) // num_passages
        length = max(num_tokens - len(self._leading), 0)
        starts = [passage * stride for passage in range(num_passages)]
        return [(self._leading + self._token_ids[start : start + length])[:num_tokens] for start in starts]


def check_contexts(contexts: Sequence[int], max_context: int) -> None:
    """Raise MeasurementError unless the contexts ascend and the model can have them."""
    if not contexts or any(b <= a for a, b in zip([0, *contexts], contexts, strict=False)):
        raise MeasurementError(f"contexts are {_listed(contexts)}; they must be positive and ascend.")
    if contexts[-1] > max_context:
        raise MeasurementError(
            f"A context of {contexts[-1]} was asked for; the model was made for {max_context} tokens."
        )


def spread_positions(context: int, num_positions: int) -> list[int]:
    """Positions of queries with about `context` tokens before them: the last one, and evenly through the last eighth.

    Raises MeasurementError when the context has not that many positions.
    """
    if num_positions < 1 or num_positions > context:
        raise MeasurementError(f"{num_positions} positions were asked for in a context of {context} tokens.")
    stride = (max(context // 8, num_positions) // num_positions - 1) | 1  # odd: positions fall anywhere in their groups
    return [context - 1 - i * stride for i in range(num_positions)][::-1]


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers)) or "empty"
