"""The books as token ids: prepared once on any machine, read by every worker of a training run.

    python bench/train_reference/corpus.py --books FOLDER --tokenizer tokenizer.json --output FOLDER --max-mb 58

reads `train-*.jsonl.xz` (one book a line: title, author, year, text), cleans the text, and writes xz-compressed shards
of 16-bit ids with a list of the books. `lessons.py` cuts its texts out of a `Corpus`.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import suite_path  # noqa: F401
from arguments import book_folder, existing_file, output_folder
from haystack import clean_text
from tokenizers import Tokenizer

Ids = npt.NDArray[np.uint16]
SHARD_TOKENS = 4_000_000
INDEX = "books.json"
TOKENS = "tokens.bin"
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 26, "lc": 0, "lp": 1, "pb": 1}]
"""For values of two bytes."""


@dataclass(frozen=True)
class Book:
    """One book, and where its tokens are."""

    title: str
    author: str
    year: int
    start: int
    num_tokens: int


class Corpus:
    """All books' tokens, one after the other, mapped into memory; opened once a process."""

    def __init__(self, folder: Path) -> None:
        """folder: as `unpack` left it."""
        self.books = [Book(**entry) for entry in json.loads((folder / INDEX).read_text(encoding="utf-8"))]
        self.tokens: Ids = np.memmap(folder / TOKENS, dtype=np.uint16, mode="r")

    def of(self, book: Book) -> Ids:
        """The book's ids: [num_tokens]."""
        return self.tokens[book.start : book.start + book.num_tokens]


def read_books(folder: Path) -> Iterator[dict[str, str]]:
    """The entries of the folder's training files, text cleaned."""
    for path in sorted(folder.glob("train-*.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                entry = json.loads(line)
                yield entry | {"text": clean_text(entry["text"])}


def prepare(entries: Iterator[dict[str, str]], tokenizer_path: Path, output: Path, max_bytes: int) -> None:
    """Write index, shards and tokenizer; ends with the last shard that leaves all below `max_bytes`."""
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    output.mkdir(parents=True, exist_ok=True)
    shutil.copy(tokenizer_path, output / "tokenizer.json")
    books: list[Book] = []
    kept: list[Book] = []
    shard: list[Ids] = []
    num_tokens = num_bytes = num_shards = 0

    def flush() -> bool:
        nonlocal num_bytes, num_shards, kept
        if not shard:
            return True
        packed = lzma.compress(np.concatenate(shard).tobytes(), format=lzma.FORMAT_XZ, filters=_FILTERS)
        num_bytes += len(packed)
        if num_bytes > max_bytes:
            return False
        (output / f"tokens-{num_shards:02}.xz").write_bytes(packed)
        kept, num_shards = list(books), num_shards + 1
        shard.clear()
        return True

    for entry in entries:
        ids = np.array(tokenizer.encode(entry["text"], add_special_tokens=False).ids, dtype=np.uint16)
        books.append(Book(entry["title"], entry["author"], int(entry["year"]), num_tokens, len(ids)))
        num_tokens += len(ids)
        shard.append(ids)
        if sum(map(len, shard)) >= SHARD_TOKENS and not flush():
            break
    else:
        flush()
    (output / INDEX).write_text(json.dumps([asdict(book) for book in kept], ensure_ascii=False), encoding="utf-8")
    print(f"{len(kept)} books, {sum(book.num_tokens for book in kept):,} tokens, {num_shards} shards")


def unpack(prepared: Path, folder: Path, num_processes: int) -> Corpus:
    """The prepared shards as one file of ids in `folder`, which may be in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(prepared / INDEX, folder / INDEX)
    with ProcessPoolExecutor(num_processes) as pool, (folder / TOKENS).open("wb") as out:
        for part in pool.map(_decompress, sorted(prepared.glob("tokens-*.xz"))):
            out.write(part)
    return Corpus(folder)


def _decompress(path: Path) -> bytes:
    return lzma.decompress(path.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=book_folder, required=True, help="folder of train-*.jsonl.xz")
    parser.add_argument("--tokenizer", type=existing_file, required=True)
    parser.add_argument("--output", type=output_folder, required=True)
    parser.add_argument("--max-mb", type=float, default=1e6, help="stop before the shards have more megabytes")
    options = parser.parse_args()
    prepare(read_books(options.books), options.tokenizer, options.output, int(options.max_mb * 1e6))


if __name__ == "__main__":
    main()
