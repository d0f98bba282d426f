"""Builds an offline bundle from this checkout. `vashista bundle build` calls it, with a settings file and a signer.

    python3.11 deploy/bundle/build.py cpu --settings vashista.toml --sign "COMMAND" --model MODEL --out dist

COMMAND gets two arguments: the manifest, and a folder where it puts ecdsa.pem, ecdsa.sig and where it can mldsa.pem and
mldsa.sig. With --signatures they come from an earlier bundle of the same content, so that who has no private key can
build the same bytes and compare. Standard library only; needs Python 3.11, pip, setuptools, gcc, openssl.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(CHECKOUT / "deploy"), str(CHECKOUT / "docker")]

from image.archive import BuildError, canonical  # noqa: E402
from image.debian import Package, read_pins  # noqa: E402
from image.sbom import bill  # noqa: E402
from image.wheels import Wheel, describe_wheel  # noqa: E402

from bundle import contents as table  # noqa: E402
from bundle import signature, sources  # noqa: E402
from bundle.archive import describe_all, read_member, split, write_tar  # noqa: E402
from bundle.contents import Contents  # noqa: E402
from bundle.manifest import NAME, BundleError, Manifest, describe, runtime_id  # noqa: E402
from bundle.runtime import make_runtime  # noqa: E402

TIME = "2026-01-01T00:00:00Z"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


class Bundle:
    """One bundle, put together piece by piece: `add_product`, `add_dependencies`, models and more, then `manifest`."""

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self.contents: Contents = {}
        self.packages: list[Package] = []
        self.wheels: list[Wheel] = []
        self.runtime = ""
        self.models: list[str] = []

    def pins(self) -> list[Path]:
        """Lists of the Debian packages of the variant's image; the runtime takes Python and its libraries of them."""
        return [CHECKOUT / f"docker/packages-{name}.txt" for name in ("cpu", "cuda")[: 1 + (self.variant == "cuda")]]

    def add_dependencies(self, wheels: Path, packages: Path, launcher: Path) -> None:
        """Python, what starts it, and the wheels of the lock."""
        data, self.packages = make_runtime(self.pins(), packages, with_headers=self.variant == "cuda")
        self.contents["runtime/runtime.tar.gz"] = data
        self.contents["runtime/launcher"] = launcher
        for path, sha256 in sources.wheels(wheels, CHECKOUT / f"deploy/lock/{self.variant}.txt"):
            self.wheels.append(describe_wheel(path, sha256))
            self.contents[f"wheels/{path.name}"] = path
        self.runtime = runtime_id(describe_all(_below(self.contents, ("runtime/", "wheels/"))))

    def forget_dependencies(self, base: Manifest) -> None:
        """Make it a delta against an installed version: runtime and wheels stay away, having to be the base's."""
        if base.fields.get("variant") != self.variant or base.fields.get("runtime") != self.runtime:
            raise BundleError(
                f"A delta holds the product alone, but the base has the runtime {base.fields.get('runtime')} of "
                f"{base.fields.get('variant')} and this one {self.runtime} of {self.variant}: build a whole bundle."
            )
        for path in _below(self.contents, ("runtime/", "wheels/")):
            del self.contents[path]

    def add_product(self, wheel: Path, settings: Path) -> None:
        """The wheel, and everything of the checkout that goes with it."""
        self.product = describe_wheel(wheel, describe(wheel.name, wheel).sha256)
        self.contents |= table.files_of(CHECKOUT)
        self.contents[f"product/{wheel.name}"] = wheel
        self.contents["settings/vashista.toml"] = settings

    def add_model(self, folder: Path) -> None:
        """A model; the first one is what a new installation serves."""
        name = folder.resolve().name
        if name in self.models:
            raise BundleError(f"Two models are called {name}: rename one's folder.")
        self.models.append(name)
        self.contents |= table.model(folder)

    def add_bill(self) -> None:
        """sbom.cdx.json of all that is there. Call it last."""
        listed = {path: describe(path, content).sha256 for path, content in self.contents.items()
                  if not path.startswith(("wheels/", "product/", "image/packages/"))}  # fmt: skip
        wheels = [*self.wheels, self.product]
        document = bill("vashista", self.product.version, TIME, self.packages, wheels, kind="application", files=listed)
        self.contents["sbom.cdx.json"] = canonical(document) + b"\n"

    def manifest(self, *, kind: str) -> Manifest:
        """Fields and files."""
        fields = {"version": self.product.version, "variant": self.variant, "kind": kind, "runtime": self.runtime}
        if self.models:
            fields["model"] = self.models[0]
        return Manifest(fields, describe_all(self.contents))


def _below(contents: Contents, tops: tuple[str, ...]) -> Contents:
    return {path: content for path, content in contents.items() if path.startswith(tops)}


def parse_size(text: str) -> int:
    """Bytes of 700M, 4Gi or 650000000; ValueError."""
    match = re.fullmatch(r"(\d+)([KMG]i?|)B?", text)
    if match is None or int(match[1]) == 0:
        raise ValueError(f"{text!r} is no size such as 700M, 4Gi or 650000000")
    return int(match[1]) * UNITS[match[2]]


def gather(options: argparse.Namespace, folder: Path) -> tuple[Bundle, str]:
    """Everything in the bundle but the manifest and its signatures; and its kind, full or delta."""
    bundle = Bundle(options.variant)
    sources.packages(options.packages, CHECKOUT / "docker/packages.sh")
    bundle.add_dependencies(options.wheels, options.packages, sources.launcher(CHECKOUT, folder))
    bundle.add_product(options.product or sources.product(CHECKOUT, folder), options.settings)
    for path in options.model:
        bundle.add_model(path)
    if options.base is not None:
        bundle.forget_dependencies(read_base(options.base))
    else:
        names = [name for pins in bundle.pins() for _, name in read_pins(pins)]
        bundle.contents |= table.image_sources(CHECKOUT, [options.packages / name for name in names])
    if options.image is not None:
        bundle.contents[f"image/vashista-{options.variant}.tar"] = options.image
    if options.kernel_cache is not None:
        bundle.contents |= table.kernel_cache(options.kernel_cache)
    bundle.add_bill()
    return bundle, "full" if options.base is None else "delta"


def read_base(path: Path) -> Manifest:
    """The manifest of a bundle, or a MANIFEST file, as /opt/vashista/current/share/MANIFEST of the machine is one."""
    data = path.read_bytes() if path.name == NAME else read_member(path, NAME)
    if data is None:
        raise BundleError(f"{path} has no {NAME}: give a bundle, or the {NAME} of an installed version.")
    return Manifest.parse(data.decode())


def build(options: argparse.Namespace) -> list[Path]:
    """Write the bundle and return its file or parts. BundleError or image.archive.BuildError says what is wrong."""
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out) as name:
        bundle, kind = gather(options, Path(name))
        text = bundle.manifest(kind=kind).text().encode()
        top = f"vashista-{bundle.product.version}-{options.variant}" + ("-delta" if kind == "delta" else "")
        if options.manifest_only:
            out = options.out / f"{top}.{NAME}"
            out.write_bytes(text)
            return [out]
        contents: Contents = {**bundle.contents, NAME: text}
        contents |= sign(options, text, Path(name))
        out = options.out / f"{top}.tar"
        write_tar(out, top, contents)
    print(f"sha256       {describe(out.name, out).sha256}  {out}")
    print(f"bytes        {out.stat().st_size}")
    print(f"fingerprint  {signature.fingerprint(contents)}  of the public key: tell it to the operator another way")
    return split(out, options.parts) if options.parts else [out]


def sign(options: argparse.Namespace, text: bytes, folder: Path) -> Contents:
    """The files of signature/, made or taken over, and checked with openssl."""
    if options.signatures is not None:
        return signature.taken_over(options.signatures, text)
    return signature.made_by(shlex.split(options.sign), text, folder)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="build.py", description="Build an offline bundle of Vashista.")
    cache = CHECKOUT / "build/bundle"
    parser.add_argument("variant", choices=["cpu", "cuda"])
    parser.add_argument("--settings", type=Path, required=True, help="settings file for new installations")
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder for the bundle (dist)")
    parser.add_argument("--model", type=Path, action="append", default=[], help="model folder; the first is served")
    parser.add_argument("--wheels", type=Path, help="folder of wheels; what it lacks is downloaded into it")
    parser.add_argument("--packages", type=Path, default=cache / "packages", help="folder of Debian packages, likewise")
    parser.add_argument("--product", type=Path, help="wheel of Vashista instead of one from this checkout")
    parser.add_argument("--image", type=Path, help="tar of docker/build.py to take along")
    parser.add_argument("--kernel-cache", type=Path, help="folder of kernels that Triton has compiled")
    parser.add_argument("--base", type=Path, help="bundle or MANIFEST to build a delta against")
    parser.add_argument("--parts", type=parse_size, help="cut into parts of this size, such as 700M")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--sign", metavar="COMMAND", help="command that signs; gets the manifest and a folder")
    how.add_argument("--signatures", type=Path, help="bundle or folder with the signatures of the same content")
    how.add_argument("--manifest-only", action="store_true", help="write the text to sign, and no bundle")
    options = parser.parse_args(arguments)
    options.wheels = options.wheels or cache / f"wheels-{options.variant}"
    for name in ("wheels", "packages", "out"):  # pip runs in another folder
        setattr(options, name, getattr(options, name).resolve())
    return options


def main() -> int:
    """Build what the command line asks for."""
    try:
        for path in build(parse()):
            print(f"wrote        {path}")
    except (BundleError, BuildError, OSError, tomllib.TOMLDecodeError, subprocess.SubprocessError) as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
