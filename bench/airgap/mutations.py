"""Random damage to an unpacked bundle, one at a time, and taken back: for the proof that none of it is installed.

`tests/packaging/test_install.py` plays some hundred, `bench/airgap/tamper.py` ten thousand.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SELF = "install.sh"
"""Judges all others; it is judged by the commands of README.txt, as an operator would."""


class Damage:
    """Damages a copy of one pristine folder; what was touched is put back, so that it is copied but once."""

    def __init__(self, pristine: Path, copy: Path, rng: random.Random) -> None:
        self.pristine, self.copy, self.rng = pristine, copy, rng
        self.touched: set[str] = set()
        shutil.copytree(pristine, copy)
        self.files = sorted(str(path.relative_to(pristine)) for path in pristine.rglob("*") if path.is_file())
        self.kinds: dict[str, Callable[[str], None]] = {
            "bit flipped": self._flip,
            "truncated": self._truncate,
            "byte appended": self._append,
            "bytes inserted": self._insert,
            "removed": self._remove,
            "renamed": self._rename,
            "exchanged with another": self._exchange,
            "replaced by a link": self._link,
            "file added beside it": self._add,
            "emptied": self._empty,
        }

    @contextmanager
    def one(self) -> Iterator[tuple[str, str]]:
        """(kind, file) of one damage, there while the context lasts."""
        while True:
            kind, name = self.rng.choice(list(self.kinds)), self.rng.choice(self.files)
            self.touched = {name}
            self.kinds[kind](name)
            if self._differs():
                break
        try:
            yield kind, name
        finally:
            self._restore()

    def _path(self, name: str) -> Path:
        """Of a file that is about to be touched."""
        self.touched.add(name)
        return self.copy / name

    def _flip(self, name: str) -> None:
        data = bytearray((self.copy / name).read_bytes())
        if data:
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
            (self.copy / name).write_bytes(data)

    def _truncate(self, name: str) -> None:
        path = self.copy / name
        os.truncate(path, self.rng.randrange(max(path.stat().st_size, 1)))

    def _append(self, name: str) -> None:
        with (self.copy / name).open("ab") as file:
            file.write(self.rng.choice([b"\0", b"\n", b" ", self.rng.randbytes(1)]))

    def _insert(self, name: str) -> None:
        data = (self.copy / name).read_bytes()
        at = self.rng.randrange(len(data) + 1)
        (self.copy / name).write_bytes(data[:at] + self.rng.choice([b"\0", b"\n", b"\r"]) + data[at:])

    def _remove(self, name: str) -> None:
        (self.copy / name).unlink()

    def _empty(self, name: str) -> None:
        (self.copy / name).write_bytes(b"")

    def _rename(self, name: str) -> None:
        (self.copy / name).rename(self._beside(name))

    def _beside(self, name: str) -> Path:
        """A file in the same folder, of a name that is like this one."""
        folder, slash, last = name.rpartition("/")
        at = self.rng.randrange(len(last))
        other = self.rng.choice(
            [last[:at] + self.rng.choice("abXY09") + last[at + 1 :], last + "~", f"-{last}", f"{last}\n{last}"]
        )
        return self._path(folder + slash + other)

    def _exchange(self, name: str) -> None:
        first, second, aside = self.copy / name, self._path(self.rng.choice(self.files)), self.copy / ".aside"
        first.rename(aside)
        if second.exists():
            second.rename(first)
        aside.rename(second)

    def _link(self, name: str) -> None:
        path = self.copy / name
        path.unlink()
        path.symlink_to(self.pristine / name)

    def _add(self, name: str) -> None:
        path = self._beside(name)
        if not path.exists():
            shutil.copy(self.copy / name, path)

    def _differs(self) -> bool:
        return any(not self._is_pristine(name) for name in self.touched)

    def _is_pristine(self, name: str) -> bool:
        was, now = self.pristine / name, self.copy / name
        if was.is_file() and now.is_file() and not now.is_symlink():
            return was.stat().st_size == now.stat().st_size and was.read_bytes() == now.read_bytes()
        return not was.exists() and not os.path.lexists(now)

    def _restore(self) -> None:
        for name in self.touched:
            (self.copy / name).unlink(missing_ok=True)
            if (self.pristine / name).is_file():
                shutil.copy2(self.pristine / name, self.copy / name)


def by_hand(folder: Path, fingerprint: str) -> bool:
    """Whether the folder passes the commands that README.txt of the pristine bundle gives to the operator."""
    text = (Path(__file__).resolve().parents[2] / "deploy/install/README.txt").read_text()
    keys, signature, files = re.findall(r"^       ((?:cat sig|.cat MAN|sed).*)$", text, re.MULTILINE)

    def said(command: str) -> str:
        done = subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    return said(keys).split()[:1] == [fingerprint] and said(signature) == "Verified OK\n" and said(files) == ""


def install(folder: Path, fingerprint: str, root: Path, *, verb: str = "install") -> subprocess.CompletedProcess[str]:
    """Run the folder's install.sh below `root`."""
    command = ["sh", str(folder / SELF), verb, "--fingerprint", fingerprint, "--root", str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
