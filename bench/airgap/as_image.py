"""Makes an environment what the image has: takes away what docker/image.toml leaves out of wheels, and symbol tables.

    python bench/airgap/as_image.py cuda SITE-PACKAGES

For a machine that has a GPU but no container engine: what runs afterwards runs in the image. There is no way back but a
new environment; pip and setuptools are among what goes. Prints how many files and bytes went.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docker"))

from image.elf import strip  # noqa: E402


def take_away(variant: str, site: Path) -> tuple[int, int]:
    """Files that went or shrank, and their bytes."""
    described = tomllib.loads((ROOT / "docker/image.toml").read_text(encoding="utf-8"))
    patterns, wheels = (
        [*described[kind], *described["variants"][variant].get(kind, [])] for kind in ("leave_out", "leave_out_wheels")
    )
    num_files = num_bytes = 0
    for package in list(distributions(path=[str(site)])):
        name = re.sub(r"[-_.]+", "-", package.name).lower()
        for file in package.files or []:
            path = site / file
            if ".." in file.parts or not path.is_file() or name == "vashista":
                continue
            size = path.stat().st_size
            if name in wheels or any(fnmatch.fnmatchcase(str(file), pattern) for pattern in patterns):
                path.unlink()
                left = 0
            else:
                data = path.read_bytes() if path.suffix not in (".py", ".pyc") else b""
                stripped = strip(data)
                left = size - (len(data) - len(stripped))
                if left != size:
                    mode = path.stat().st_mode
                    path.unlink()  # another environment may share the file
                    path.write_bytes(stripped)
                    path.chmod(mode)
            num_files += left != size
            num_bytes += size - left
    return num_files, num_bytes


def main() -> None:
    """Do it."""
    parser = argparse.ArgumentParser(description="Take away what the image leaves out; there is no way back.")
    parser.add_argument("variant", choices=["cpu", "cuda"])
    parser.add_argument("site", type=Path, metavar="SITE-PACKAGES")
    options = parser.parse_args()
    num_files, num_bytes = take_away(options.variant, options.site)
    print(f"{num_files} files went or shrank, {num_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
