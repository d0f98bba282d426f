"""Builds the image of one variant as a plain tar, without network, without a daemon and without root.

    python3.11 docker/build.py cpu --packages packages --wheels wheels --product dist/vashista-*.whl --out cpu.tar

Reads docker/image.toml, the lock of pip and docker/packages-*.txt; every file that goes in is checked against them. The
same input gives the same bytes. Standard library only; needs Python 3.11, which the image has too.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docker"))

from image.archive import BuildError, Layer, canonical, digest_file, write_archive  # noqa: E402
from image.debian import Package, add_merged_links, read_pins, unpack_package  # noqa: E402
from image.sbom import DESCRIPTION_PATH, bill  # noqa: E402
from image.wheels import Wheel, compile_python, distribution, find_wheels, read_lock, unpack_wheel  # noqa: E402

NANOSECONDS = 10**9
PASSWD = "root:x:0:0:root:/root:/nologin\nvashista:x:65532:65532:vashista:/var/lib/vashista:/nologin\n"
GROUP = "root:x:0:\nvashista:x:65532:\n"
START = """\
import sys

from vashista.server.cli import main

if __name__ == "__main__":
    sys.exit(main())
"""


class Image:
    """One variant, put together layer by layer: Debian and Python, the wheels, the product."""

    def __init__(self, variant: str, description: dict[str, Any]) -> None:
        self.description = description
        self.variant_name = variant
        self.variant = description["variants"][variant]
        self.time_s = int(description["created"].timestamp())
        self.time = description["created"].strftime("%Y-%m-%dT%H:%M:%SZ")
        self.packages: list[Package] = []
        self.wheels: list[Wheel] = []

    def left_out(self, kind: str) -> list[str]:
        """Of both images, and of this variant."""
        return [*self.description[kind], *self.variant.get(kind, [])]

    def base(self, folder: Path) -> Layer:
        """Debian's packages, the user, and the folders that a container writes to."""
        layer = Layer()
        add_merged_links(layer)
        for pins in self.variant["packages"]:
            for sha256, name in read_pins(ROOT / pins):
                self.packages.append(unpack_package(layer, folder / name, sha256, self.left_out("leave_out_of_debian")))
        for path, target in self.variant.get("links", {}).items():
            layer.add_link(path, target)
        # base-files and base-passwd would make these by scripts.
        layer.add_file("etc/passwd", PASSWD.encode())
        layer.add_file("etc/group", GROUP.encode())
        layer.add_file("etc/nsswitch.conf", b"passwd: files\ngroup: files\nhosts: files\n")
        layer.add_folder("tmp", 0o1777)
        for path in self.description["volumes"]:
            layer.add_folder(path, 0o700 if path.startswith("/var") else 0o755, owner=65532)
        compile_python(layer, self.description["python"])
        return layer

    def dependencies(self, folder: Path) -> Layer:
        """The wheels of the lock but for what the server never imports, of which the bill of materials says nothing."""
        layer = Layer()
        lock = read_lock(ROOT / self.variant["wheels"])
        for path, sha256 in find_wheels(folder, lock):
            if distribution(path) not in self.left_out("leave_out_wheels"):
                self.wheels.append(unpack_wheel(layer, path, sha256, self.left_out("leave_out")))
        compile_python(layer, self.description["python"])
        return layer

    def product(self, wheel: Path) -> Layer:
        """Vashista, how it starts, health check, proxy and bill of materials. Call it last."""
        layer = Layer()
        # As its wheel has it: `vashista doctor` compares each file with the RECORD.
        self.wheels.append(unpack_wheel(layer, wheel, digest_file(wheel), stripped=False))
        compile_python(layer, self.description["python"])
        layer.add_file("usr/bin/vashista", START.encode(), 0o755)
        for name in ("health.py", "forward.py"):
            layer.add_file(f"usr/lib/vashista/{name}", (ROOT / "docker" / name).read_bytes())
        layer.add_file(DESCRIPTION_PATH, self.sbom())
        return layer

    @property
    def version(self) -> str:
        """Of the product's wheel, which is unpacked last."""
        return self.wheels[-1].version

    @property
    def tag(self) -> str:
        """Name of the image once it is loaded."""
        return f"localhost/{self.description['name']}:{self.version}-{self.variant_name}"

    def sbom(self) -> bytes:
        """CycloneDX, in canonical JSON."""
        return canonical(bill(self.description["name"], self.version, self.time, self.packages, self.wheels))

    def config(self) -> dict[str, Any]:
        """The image's configuration, without its layers."""
        described, health = self.description, self.description["health"]
        environment = {**described["environment"], **self.variant.get("environment", {})}
        labels = {
            "org.opencontainers.image.title": described["name"],
            "org.opencontainers.image.version": self.version,
            "org.opencontainers.image.licenses": "Apache-2.0",
            "org.vashista.variant": self.variant_name,
            "org.vashista.sbom.path": f"/{DESCRIPTION_PATH}",
            "org.vashista.sbom.sha256": hashlib.sha256(self.sbom()).hexdigest(),
        }
        return {
            "architecture": described["architecture"],
            "os": "linux",
            "created": self.time,
            "config": {
                "User": described["user"],
                "Entrypoint": described["entrypoint"],
                "Cmd": described["command"],
                "WorkingDir": described["working_dir"],
                "Volumes": {path: {} for path in described["volumes"]},
                "StopSignal": described["stop_signal"],
                "Env": [f"{name}={value}" for name, value in sorted(environment.items())],
                "Labels": labels,
                "Healthcheck": {
                    "Test": health["test"],
                    "Interval": health["interval_s"] * NANOSECONDS,
                    "Timeout": health["timeout_s"] * NANOSECONDS,
                    "StartPeriod": health["start_period_s"] * NANOSECONDS,
                    "Retries": health["retries"],
                },
            },
        }


def build(variant: str, packages: Path, wheels: Path, product: Path, out: Path) -> str:
    """Write the image's tar and return the image id. BuildError says what is missing or not what was pinned."""
    description = tomllib.loads((ROOT / "docker/image.toml").read_text(encoding="utf-8"))
    image = Image(variant, description)
    steps = [
        ("base", image.base, packages),
        ("wheels", image.dependencies, wheels),
        ("product", image.product, product),
    ]
    aside = out.with_name(out.name + ".new")
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        layers = []
        for name, make, source in steps:
            path = Path(folder, f"{name}.tar")
            layers.append((make(source).write(path, image.time_s), path))
            print(f"{name:<9} {path.stat().st_size / 1e6:8.1f} MB  sha256:{layers[-1][0]}")
        image_id = write_archive(aside, image.tag, image.config(), layers)
    os.replace(aside, out)
    print(f"{'image':<9} {out.stat().st_size / 1e6:8.1f} MB  sha256:{image_id}  {image.tag}")
    print(f"{'file':<9} {'':>11}  sha256:{digest_file(out)}  {out}")
    return image_id


def main() -> int:
    """Build what the command line asks for."""
    parser = argparse.ArgumentParser(description="Build an image of Vashista as a plain tar, without network.")
    parser.add_argument("variant", choices=["cpu", "cuda"])
    parser.add_argument("--packages", type=Path, required=True, help="folder of the Debian packages that are pinned")
    parser.add_argument("--wheels", type=Path, required=True, help="folder of the wheels of the lock, and no others")
    parser.add_argument("--product", type=Path, required=True, help="wheel of Vashista")
    parser.add_argument("--out", type=Path, required=True, help="the tar to write")
    options = parser.parse_args()
    try:
        build(options.variant, options.packages, options.wheels, options.product, options.out)
    except (BuildError, OSError) as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
