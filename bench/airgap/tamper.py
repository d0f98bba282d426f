"""Damages a small bundle at random, thousands of times, and counts how often install.sh installs something of it.

    python bench/airgap/tamper.py [--runs 10000] [--seed 1]

Each run damages the unpacked bundle once (a bit, a length, a name, a link, a file more or less) or a bit of the .tar,
and runs the whole of install.sh below an empty folder. It must refuse, and the folder must stay empty. Damage to it
itself is judged by the commands that README.txt tells the operator to run before it. A bit of the .tar may lie in its
padding: then what was unpacked must be what was signed, byte for byte. Exit status 1 when anything else happened.
"""

from __future__ import annotations

import argparse
import collections
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from mutations import SELF, Damage, by_hand, install  # noqa: E402

TAR_SHARE = 0.1


def is_same(first: Path, second: Path) -> bool:
    """Whether two folders hold the same files."""
    command = ["diff", "--recursive", "--brief", "--no-dereference", str(first), str(second)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def damage_tar(tar: Path, pristine: Path, fingerprint: str, work: Path, rng: random.Random) -> str:
    """One bit of the tar; what came of it."""
    data = bytearray(tar.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    out, root = work / "out", work / "root"
    for folder in (out, root):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    (work / "bad.tar").write_bytes(data)
    unpack = ["tar", "--extract", "--file", str(work / "bad.tar"), "--directory", str(out)]
    if subprocess.run(unpack, capture_output=True, check=False).returncode:
        return "refused by tar"
    folder = out / pristine.name
    if not folder.is_dir() or not (folder / SELF).is_file():
        return "refused, not a bundle"
    if is_same(folder, pristine):
        return "padding: unpacked as signed"
    if (folder / SELF).read_bytes() != (pristine / SELF).read_bytes():
        return "ACCEPTED" if by_hand(folder, fingerprint) else "refused by the commands of README.txt"
    refused = install(folder, fingerprint, root).returncode != 0 and not any(root.iterdir())
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


def main() -> int:
    """Play the damage and print what came of it."""
    parser = argparse.ArgumentParser(description="Damage a small bundle at random; none of it may be installed.")
    parser.add_argument("--runs", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tamper") as name:
        work = Path(name)
        built = subprocess.run([sys.executable, str(HERE / "small_bundle.py"), str(work / "b")],
                               capture_output=True, text=True, check=True)  # fmt: skip
        fingerprint = built.stdout.strip()
        [tar], [pristine] = work.glob("b/*.tar"), [path for path in work.glob("b/*") if path.is_dir()]
        root = work / "empty"
        root.mkdir()
        whole = work / "whole"
        whole.mkdir()
        if install(pristine, fingerprint, whole).returncode or not by_hand(pristine, fingerprint):
            sys.exit("The bundle itself is refused, so that refusals would prove nothing.")
        damage = Damage(pristine, work / "copy" / pristine.name, rng)
        for _ in range(options.runs):
            if rng.random() < TAR_SHARE:
                counts["bit of the .tar flipped", damage_tar(tar, pristine, fingerprint, work, rng)] += 1
            else:
                counts[damage_folder(damage, fingerprint, root)] += 1
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{count:>6}  {kind:<40} {outcome}")
    accepted = sum(count for (_, outcome), count in counts.items() if outcome == "ACCEPTED")
    print(f"{options.runs} runs, seed {options.seed}, {time.monotonic() - started:.0f} s: {accepted} accepted")
    return 1 if accepted else 0


if __name__ == "__main__":
    sys.exit(main())
