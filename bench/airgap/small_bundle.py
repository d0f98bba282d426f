"""A bundle like the real one, but small: real scripts, units and documents, a tiny wheel, product and model.

    python bench/airgap/small_bundle.py OUT [--version 0.1.0] [--keys FOLDER] [--delta] [--note TEXT]

Writes OUT/vashista-VERSION-cpu.tar and the same unpacked, and prints the fingerprint of the key. Its runtime is this
Python behind a script in the place of the loader, so that install.sh runs as on a machine, in a second, below a folder
(--root). For tests/packaging/test_install.py and bench/airgap/tamper.py.
"""

from __future__ import annotations

import argparse
import gzip
import io
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(CHECKOUT / "deploy"), str(CHECKOUT / "docker")]

from bundle import contents as table  # noqa: E402
from bundle import signature  # noqa: E402
from bundle.archive import TIME_S, describe_all, write_tar  # noqa: E402
from bundle.build import Bundle  # noqa: E402
from bundle.manifest import NAME, runtime_id  # noqa: E402

from vashista.server.bundle_keys import make_keys, sign  # noqa: E402

LOADER = """#!/bin/sh
while [ $# -gt 0 ]; do case $1 in --argv0 | --library-path) shift 2 ;; *) break ;; esac; done
shift
exec {python} "$@"
"""
METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nLicense-Expression: MIT\n"


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    """A wheel of these files; the same bytes from the same ones."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info/METADATA"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in {**files, info: METADATA.format(name=name, version=version)}.items():
            archive.writestr(zipfile.ZipInfo(member), text)
    return path


def runtime() -> bytes:
    """A runtime.tar.gz whose loader is a script that starts this Python."""
    packed = io.BytesIO()
    files = {
        "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2": LOADER.format(python=sys.executable),
        "usr/bin/python3.11": "",
        "usr/lib/python3.11/os.py": "x = 1\n",
    }
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path, text in files.items():
            info = tarfile.TarInfo(path)
            info.size, info.mode, info.mtime = len(text), 0o755, TIME_S
            tar.addfile(info, io.BytesIO(text.encode()))
    return gzip.compress(packed.getvalue(), mtime=0)


def compose(folder: Path, version: str, *, note: str = "") -> Bundle:
    """Everything but manifest and signature."""
    bundle = Bundle("cpu")
    (folder / "vashista.toml").write_text('model = "/srv/vashista/models/tiny"\n')
    model = folder / "tiny"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(range(256)) * 4)
    product = wheel(folder, "vashista", version, {"vashista/__init__.py": f"note = {note!r}\n"})
    bundle.contents |= {
        "runtime/runtime.tar.gz": runtime(),
        "runtime/launcher": b"#!/bin/sh\nexit 0\n",
        "wheels/small-1.0-py3-none-any.whl": wheel(folder, "small", "1.0", {"small/__init__.py": "x = 1\n"}),
    }
    bundle.runtime = runtime_id(describe_all(bundle.contents))
    bundle.add_product(product, folder / "vashista.toml")
    bundle.add_model(model)
    bundle.contents |= table.kernel_cache(model)
    bundle.add_bill()
    return bundle


def write(out: Path, version: str, keys: Path | None, *, delta: bool, note: str) -> str:
    """Write the tar and the folder; returns the fingerprint."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = compose(folder, version, note=note)
        if delta:
            bundle.forget_dependencies(bundle.manifest(kind="full"))
        text = bundle.manifest(kind="delta" if delta else "full").text().encode()
        if keys is None:
            keys = folder / "keys"
            make_keys(keys)
        (folder / "signature").mkdir()
        sign(text, keys, folder / "signature")
        contents = {**bundle.contents, NAME: text, **signature.taken_over(folder / "signature", text)}
        top = f"vashista-{version}-cpu"
        out.mkdir(parents=True, exist_ok=True)
        write_tar(out / f"{top}.tar", top, contents)
        with tarfile.open(out / f"{top}.tar") as tar:
            tar.extractall(out, filter="data")
        return signature.fingerprint(contents)


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description="Write a small bundle.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--version", default="0.1.0")
    parser.add_argument("--keys", type=Path, help="folder of keys; new ones unless given")
    parser.add_argument("--delta", action="store_true")
    parser.add_argument("--note", default="", help="text in the product, so that two bundles differ")
    options = parser.parse_args()
    print(write(options.out, options.version, options.keys, delta=options.delta, note=options.note))


if __name__ == "__main__":
    main()
