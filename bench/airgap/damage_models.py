"""Damages a small signed model at random, 10,000 times, and counts what gets through; nothing may.

    python bench/airgap/damage_models.py [--rounds 10000] [--seed 1]

Half of the rounds damage the packed file (a flipped bit, a cut, bytes put in or taken out, a member of the tar left
out, added, renamed, cut, swapped or turned into a link) and import it; the other half damage the installed folder (a
flipped bit, a truncated, grown, renamed, removed, extra file, a link) and check it as a server does before it loads a
model, both with verify_model full and fast. Before the first and after the last round the sound model must pass, else
nothing is reported.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import random
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.torch import save_file

from vashista.engine.errors import ModelError
from vashista.server.model_store.keys import load_trusted
from vashista.server.model_store.packing import pack
from vashista.server.model_store.startup import check_before_load
from vashista.server.model_store.store import install
from vashista.server.settings import Settings

PROBE = Path(__file__).parents[2] / "deploy/models/reference-26m"


def flip(data: bytes, source: random.Random) -> bytes:
    place = source.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << source.randrange(8))]) + data[place + 1 :]


def rebuild(data: bytes, source: random.Random, kind: str) -> bytes:
    """The tar with one member damaged, its headers right again."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar, tarfile.open(fileobj=out, mode="w") as new:
        members = [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
        chosen = source.randrange(len(members))
        if kind == "swap":
            other = (chosen + 1) % len(members)
            members[chosen], members[other] = members[other], members[chosen]
        for index, (info, content) in enumerate(members):
            if index == chosen:
                if kind == "leave out":
                    continue
                if kind == "rename":
                    info.name += source.choice(["x", ".bin", "/../../etc/x"])
                if kind == "link":
                    info.type, info.linkname, info.size, content = tarfile.SYMTYPE, "/etc/passwd", 0, b""
                if kind == "cut":
                    content = content[: source.randrange(len(content))]
                    info.size = len(content)
                if kind == "add":
                    extra = tarfile.TarInfo(source.choice(["tiny/a.json", "../a.json", "/etc/a", "tiny/a.bin"]))
                    new.addfile(extra, io.BytesIO())
            new.addfile(info, io.BytesIO(content))
    return out.getvalue()


def damage_packed(data: bytes, source: random.Random) -> tuple[str, bytes]:
    kind = source.choice(["flip", "flip", "flip", "truncate", "insert", "delete", "append",
                          "leave out", "add", "rename", "cut", "swap", "link"])  # fmt: skip
    place = source.randrange(len(data))
    if kind == "flip":
        return kind, flip(data, source)
    if kind == "truncate":
        return kind, data[:place]
    if kind == "insert":
        return kind, data[:place] + source.randbytes(source.choice([1, 512])) + data[place:]
    if kind == "delete":
        return kind, data[:place] + data[place + source.choice([1, 512]) :]
    if kind == "append":
        return kind, data + bytes(source.choice([1, 512, 10240]))
    return kind, rebuild(data, source, kind)


def damage_folder(folder: Path, source: random.Random) -> str:
    path = source.choice(sorted(folder.iterdir()))
    kind = source.choice(["flip", "flip", "flip", "truncate", "rename", "remove", "extra", "link", "grow"])
    data = path.read_bytes()
    if kind == "flip":
        status = path.stat()
        path.write_bytes(flip(data, source))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif kind == "truncate":
        os.truncate(path, source.randrange(len(data)))
    elif kind == "rename":
        path.rename(path.with_name(source.choice(["x.json", path.name + "x", "weights.bin"])))
    elif kind == "remove":
        path.unlink()
    elif kind == "extra":
        (folder / source.choice(["a.json", "a.bin", ".hidden", "sub.py"])).write_bytes(b"x")
    elif kind == "link":
        away = folder.parent / "away"
        shutil.copy(path, away)
        path.unlink()
        path.symlink_to(away)
    else:
        path.write_bytes(data + b"\n")
    return kind


def make_model(folder: Path) -> None:
    folder.mkdir()
    for path in PROBE.iterdir():
        if path.suffix in {".json", ".jinja"} and path.stat().st_size < 1 << 22:
            shutil.copy(path, folder)
    save_file({"weight": torch.arange(20_000.0)}, folder / "model.safetensors")


def main() -> int:  # noqa: PLR0915
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    source = random.Random(options.seed)
    tried: collections.Counter[str] = collections.Counter()
    passed: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        key = ec.generate_private_key(ec.SECP384R1())
        (home / "signer.pem").write_bytes(key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))  # fmt: skip
        keys = load_trusted(home / "signer.pem")
        make_model(home / "tiny")
        pack(home / "tiny", home / "sound.tar", key, name="tiny")
        data = (home / "sound.tar").read_bytes()
        sound = install(home / "sound.tar", home / "sound", keys)[0]
        models = home / "models"
        models.mkdir()
        folder = home / "served"
        (home / "state").mkdir()
        common = {"model": folder, "state_dir": home / "state", "model_trust": home / "signer.pem"}
        fast, full = (Settings.model_validate({**common, "verify_model": mode}) for mode in ("fast", "full"))
        shutil.copytree(sound, folder)
        check_before_load(full)
        start_s = time.monotonic()
        for number in range(options.rounds):
            if number % 2:
                kind, damaged = damage_packed(data, source)
                if damaged == data:
                    continue
                tried["packed: " + kind] += 1
                (home / "damaged.tar").write_bytes(damaged)
                try:
                    install(home / "damaged.tar", models, keys)
                    passed.append(f"round {number}, packed: {kind}")
                except ModelError:
                    pass
                if any(models.iterdir()):
                    passed.append(f"round {number}, packed: {kind}: something was left behind")
            else:
                check_before_load(fast)  # now all of it is known to be right
                kind = damage_folder(folder, source)
                tried["installed: " + kind] += 1
                for settings in (fast, full):
                    try:
                        check_before_load(settings)
                        passed.append(f"round {number}, installed: {kind}, {settings.verify_model}")
                    except ModelError:
                        pass
                shutil.rmtree(folder)
                shutil.copytree(sound, folder)
        seconds = time.monotonic() - start_s
        install(home / "sound.tar", models, keys)
        check_before_load(full)
    report = {"rounds": sum(tried.values()), "passed": passed, "seconds": round(seconds, 1), "seed": options.seed}
    print(json.dumps(report | {"tried": dict(sorted(tried.items()))}, indent=1))
    return 1 if passed else 0


if __name__ == "__main__":
    sys.exit(main())
