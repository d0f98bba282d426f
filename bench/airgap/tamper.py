"""Damages a bundle at random, thousands of times, and counts how often install.sh installs something of it.

    python bench/airgap/tamper.py [--runs 10000] [--seed 1] [--first 0] [--jobs N] [--bundle FILE.tar]

The bundle is a small one, of the code that builds real ones (small_bundle.py), or FILE.tar. Each run damages the
unpacked bundle once (a bit, a length, a name, a link, a file more or less) or a bit of the .tar, and runs the whole of
install.sh below an empty folder. It must refuse, and the folder must stay empty. Damage to install.sh itself is judged
by the commands that README.txt tells the operator to run before it. A bit of the .tar may lie in its padding: then what
was unpacked must be what was signed, byte for byte. What a run damages depends on the seed and on its number, of which
--first is the lowest. Exit status 1 when anything else happened.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from mutations import SELF, Damage, by_hand, install  # noqa: E402

TAR_SHARE = 0.1
Counts = collections.Counter[tuple[str, str]]


class Bundle(NamedTuple):
    """What is damaged."""

    tar: Path
    pristine: Path
    """Its folder, unpacked."""
    fingerprint: str


def unpacked(tar: Path, work: Path) -> Bundle:
    """The bundle of a .tar, unpacked into `work`. Exits unless it is installed as it is."""
    into = work / "pristine"
    with tarfile.open(tar) as archive:
        archive.extractall(into, filter="data")
    [pristine] = into.iterdir()
    keys = b"".join((pristine / "signature" / name).read_bytes() for name in ("ecdsa.pem", "mldsa.pem"))
    bundle = Bundle(tar, pristine, hashlib.sha256(keys).hexdigest())
    whole = work / "whole"
    whole.mkdir()
    if install(pristine, bundle.fingerprint, whole).returncode or not by_hand(pristine, bundle.fingerprint):
        sys.exit("The bundle itself is refused, so that refusals would prove nothing.")
    shutil.rmtree(whole)
    return bundle


def is_same(first: Path, second: Path) -> bool:
    """Whether two folders hold the same files."""
    command = ["diff", "--recursive", "--brief", "--no-dereference", str(first), str(second)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def damage_tar(bundle: Bundle, work: Path, rng: random.Random) -> str:
    """One bit of the tar; what came of it."""
    data = bytearray(bundle.tar.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    out, root = work / "out", work / "root"
    for folder in (out, root):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    (work / "bad.tar").write_bytes(data)
    unpack = ["tar", "--extract", "--file", str(work / "bad.tar"), "--directory", str(out)]
    if subprocess.run(unpack, capture_output=True, check=False).returncode:
        return "refused by tar"
    folder = out / bundle.pristine.name
    if not folder.is_dir() or not (folder / SELF).is_file():
        return "refused, not a bundle"
    if is_same(folder, bundle.pristine):
        return "padding: unpacked as signed"
    if (folder / SELF).read_bytes() != (bundle.pristine / SELF).read_bytes():
        return "ACCEPTED" if by_hand(folder, bundle.fingerprint) else "refused by the commands of README.txt"
    refused = install(folder, bundle.fingerprint, root).returncode != 0 and not any(root.iterdir())
    return "refused by install.sh" if refused else "ACCEPTED"


def damage_folder(damage: Damage, fingerprint: str, root: Path) -> tuple[str, str]:
    """One damage; its kind and what came of it."""
    with damage.one() as (kind, name):
        own = damage.copy / SELF
        if not own.is_file() or own.read_bytes() != (damage.pristine / SELF).read_bytes():
            return f"{kind} (install.sh)", "ACCEPTED" if by_hand(damage.copy, fingerprint) else "refused by README.txt"
        done = install(damage.copy, fingerprint, root)
        if done.returncode == 0 or any(root.iterdir()):
            print(f"ACCEPTED: {kind} {name}\n{done.stdout}{done.stderr}")
            return kind, "ACCEPTED"
        return kind, "refused by install.sh"


def play(bundle: Bundle, seed: int, runs: range) -> Counts:
    """These runs, one after the other, on a copy of their own."""
    counts: Counts = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="tamper") as name:
        work = Path(name)
        root = work / "empty"
        root.mkdir()
        damage = Damage(bundle.pristine, work / "copy" / bundle.pristine.name, random.Random())
        for run in runs:
            damage.rng.seed(f"{seed} {run}")
            if damage.rng.random() < TAR_SHARE:
                counts["bit of the .tar flipped", damage_tar(bundle, work, damage.rng)] += 1
            else:
                counts[damage_folder(damage, bundle.fingerprint, root)] += 1
        if not is_same(damage.copy, damage.pristine):
            sys.exit("A damage was not taken back, so that the later ones were not judged alone.")
    return counts


def main() -> int:
    """Play the damage and print what came of it."""
    parser = argparse.ArgumentParser(description="Damage a bundle at random; none of it may be installed.")
    parser.add_argument("--runs", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first run, to go on where another ended")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="how many at a time")
    parser.add_argument("--bundle", type=Path, help="a bundle's .tar; a small one is built unless given")
    options = parser.parse_args()
    counts: Counts = collections.Counter()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tamper") as name:
        work, tar = Path(name), options.bundle
        if tar is None:
            subprocess.run(
                [sys.executable, str(HERE / "small_bundle.py"), str(work / "b")], check=True, stdout=subprocess.DEVNULL
            )
            [tar] = work.glob("b/*.tar")
        bundle = unpacked(tar, work)
        last = options.first + options.runs
        with ProcessPoolExecutor(options.jobs) as pool:
            parts = [range(options.first + job, last, options.jobs) for job in range(options.jobs)]
            for part in [pool.submit(play, bundle, options.seed, runs) for runs in parts]:
                counts += part.result()
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{count:>6}  {kind:<40} {outcome}")
    accepted = sum(count for (_, outcome), count in counts.items() if outcome == "ACCEPTED")
    played, seconds = sum(counts.values()), time.monotonic() - started
    print(f"{played} runs from {options.first}, seed {options.seed}, {seconds:.0f} s: {accepted} accepted")
    return 1 if accepted or played != options.runs else 0


if __name__ == "__main__":
    sys.exit(main())
