"""The bill of materials in CycloneDX 1.5: Debian packages and wheels, with the SHA-256 each came with.

`docker/build.py` puts it into the image as /usr/share/vashista/sbom.cdx.json and its SHA-256 into a label;
`deploy/bundle/build.py` puts one into the bundle, with the bundle's other files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from image.debian import Package
from image.wheels import Wheel

DESCRIPTION_PATH = "usr/share/vashista/sbom.cdx.json"


def bill(
    name: str,
    version: str,
    time: str,
    packages: Iterable[Package],
    wheels: Iterable[Wheel],
    *,
    kind: str = "container",
    files: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The document; the same for the same input. `files` are the SHA-256 of further files by their path."""
    components = [_package(package) for package in packages] + [_wheel(wheel) for wheel in wheels]
    components.sort(key=lambda component: component["purl"])
    components += [_file(path, sha256) for path, sha256 in sorted((files or {}).items())]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"timestamp": time, "component": {"type": kind, "name": name, "version": version}},
        "components": components,
    }


def _package(package: Package) -> dict[str, Any]:
    # Debian states licences as prose, in a file for each package.
    place = f"/usr/share/doc/{package.name}/copyright"
    return {
        **_component(package.name, package.version, package.sha256),
        "purl": f"pkg:deb/debian/{package.name}@{quote(package.version)}?arch={package.architecture}&distro=bookworm",
        "properties": [{"name": "vashista:copyright", "value": place}],
    }


def _wheel(wheel: Wheel) -> dict[str, Any]:
    component = _component(wheel.name, wheel.version, wheel.sha256)
    component["purl"] = f"pkg:pypi/{wheel.name.lower().replace('_', '-')}@{quote(wheel.version)}"
    if wheel.licence:
        component["licenses"] = [{"license": {"name": wheel.licence}}]
    return component


def _file(path: str, sha256: str) -> dict[str, Any]:
    return {"type": "file", "name": path, "hashes": [{"alg": "SHA-256", "content": sha256}]}


def _component(name: str, version: str, sha256: str) -> dict[str, Any]:
    hashes = [{"alg": "SHA-256", "content": sha256}]
    return {"type": "library", "name": name, "version": version, "hashes": hashes}
