"""The builder of the images, with a small package and a small wheel made here; podman loads the result where it is."""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="images are built with the Python they have")

CONTROL = "Package: tiny\nVersion: 1.0-1\nArchitecture: all\nDescription: first\n second\n"
BUILD = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1] + "/docker")
from image.archive import BuildError, Layer, write_archive
from image.debian import add_merged_links, unpack_package
from image.wheels import compile_python, unpack_wheel
folder = pathlib.Path(sys.argv[2])
layer = Layer()
add_merged_links(layer)
try:
    unpack_package(layer, folder / "tiny.deb", sys.argv[3])
    wheel = unpack_wheel(layer, folder / "tiny-2.0-py3-none-any.whl", "0" * 64, ["tiny/left/*"])
    compile_python(layer, "3.11")
    digest = layer.write(folder / "layer.tar", 1000000000)
    config = {"architecture": "amd64", "os": "linux", "config": {"User": "65532"}}
    write_archive(pathlib.Path(sys.argv[4]), "localhost/tiny:1", config, [(digest, folder / "layer.tar")])
except BuildError as error:
    sys.exit(str(error))
print(json.dumps([wheel.name, wheel.version, wheel.licence]))
"""


def tar_xz(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o4755
            tar.addfile(info, io.BytesIO(data))
    return lzma.compress(packed.getvalue())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": tar_xz({"./control": CONTROL.encode()}),
        "data.tar.xz": tar_xz({
            "./bin/tool": b"tool",
            "./usr/share/doc/tiny/changelog": b"long",
            "./usr/share/doc/tiny/copyright": b"free",
        }),
    }  # fmt: skip
    package = b"!<arch>\n"
    for name, data in members.items():
        package += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    (tmp_path / "tiny.deb").write_bytes(package)
    with zipfile.ZipFile(tmp_path / "tiny-2.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny/__init__.py", "x = 1\n")
        wheel.writestr("tiny/left/out.h", "")
        wheel.writestr("tiny-2.0.dist-info/METADATA", "Name: tiny\nVersion: 2.0\nLicense-Expression: MIT\n")
    return tmp_path


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """podman refuses folders with long paths."""
    with tempfile.TemporaryDirectory(prefix="img") as folder:
        yield Path(folder)


def build(source: Path, out: str = "image.tar", sha256: str | None = None) -> subprocess.CompletedProcess[str]:
    digest = sha256 or hashlib.sha256((source / "tiny.deb").read_bytes()).hexdigest()
    command = [sys.executable, "-c", BUILD, str(ROOT), str(source), digest, str(source / out)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_same_input_gives_the_same_bytes_and_only_what_an_image_needs(source: Path) -> None:
    first, second = build(source, "a.tar"), build(source, "b.tar")
    assert first.returncode == second.returncode == 0, first.stderr
    assert json.loads(first.stdout) == ["tiny", "2.0", "MIT"]
    assert (source / "a.tar").read_bytes() == (source / "b.tar").read_bytes()
    with tarfile.open(source / "layer.tar") as tar:
        members = {info.name: info for info in tar}
    assert members["usr/bin/tool"].mode == 0o755, "set-uid bits go"
    assert members["bin"].linkname == "usr/bin"
    assert "usr/share/doc/tiny/copyright" in members
    assert not [name for name in members if "changelog" in name or "left" in name]
    assert "var/lib/dpkg/status.d/tiny" in members
    assert "usr/lib/python3/dist-packages/tiny/__pycache__/__init__.cpython-311.pyc" in members


def test_a_package_that_is_not_the_pinned_one_is_refused(source: Path) -> None:
    result = build(source, sha256="0" * 64)
    assert result.returncode == 1
    assert "is pinned" in result.stderr
    assert not (source / "image.tar").exists()


def test_a_wheel_that_the_lock_does_not_know_is_refused(source: Path) -> None:
    command = [sys.executable, str(ROOT / "docker/build.py"), "cpu", "--packages", "packages", "--wheels", str(source)]
    command += ["--product", "none.whl", "--out", str(source / "out.tar")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=source, timeout=60)
    assert result.returncode == 1
    assert "cannot be read" in result.stderr, "the packages come first"
    script = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1] + '/docker')\n"
        "from image.wheels import find_wheels, read_lock\n"
        "lock = read_lock(pathlib.Path(sys.argv[1], 'deploy/lock/cpu.txt'))\n"
        "assert 'torch==2.13.0' in lock.values() and len(set(lock.values())) > 20, lock\n"
        "find_wheels(pathlib.Path(sys.argv[2]), lock)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), str(source)], capture_output=True, text=True, check=False, timeout=60
    )
    assert "which is not in the lock" in result.stderr


@pytest.mark.skipif(shutil.which("podman") is None or os.geteuid() != 0, reason="needs podman and root")
def test_podman_loads_the_plain_tar(source: Path, short_folder: Path) -> None:
    assert build(source).returncode == 0
    podman = ["podman", "--cgroup-manager", "cgroupfs", "--storage-driver", "vfs"]
    podman += ["--root", str(short_folder / "root"), "--runroot", str(short_folder / "run")]
    subprocess.run(
        [*podman, "load", "--input", str(source / "image.tar")], check=True, capture_output=True, timeout=120
    )
    shown = subprocess.run(
        [*podman, "image", "inspect", "localhost/tiny:1"], check=True, capture_output=True, text=True, timeout=60
    )
    assert json.loads(shown.stdout)[0]["User"] == "65532"
    subprocess.run([*podman, "rmi", "--all"], check=True, capture_output=True, timeout=60)


STRIP = """
import pathlib, sys
sys.path.insert(0, sys.argv[1] + "/docker")
from image.elf import strip
data = pathlib.Path(sys.argv[2]).read_bytes()
stripped = strip(data)
assert strip(stripped) == stripped and strip(b"text") == b"text" and strip(b"") == b""
pathlib.Path(sys.argv[3]).write_bytes(stripped)
"""


@pytest.mark.skipif(shutil.which("gcc") is None or shutil.which("readelf") is None, reason="needs gcc and binutils")
def test_a_library_loses_symbols_and_debugging_and_runs_as_before(tmp_path: Path) -> None:
    code = (
        "static int hidden(int x) { return x * 2; } int shown(int x) { static int calls; return hidden(x) + calls++; }"
    )
    (tmp_path / "a.c").write_text(code)
    before, after = tmp_path / "a.so", tmp_path / "b.so"
    subprocess.run(["gcc", "-g", "-O0", "-shared", "-fPIC", "-o", before, tmp_path / "a.c"], check=True, timeout=60)
    subprocess.run([sys.executable, "-c", STRIP, ROOT, before, after], check=True, timeout=60)

    def told(*flags: str) -> list[str]:
        command = ["readelf", "--wide", *flags]
        return [subprocess.run([*command, path], capture_output=True, text=True, check=True, timeout=60).stdout
                for path in (before, after)]  # fmt: skip

    assert [text.count("hidden") for text in told("--symbols")] == [1, 0]
    assert [".debug_info" in text for text in told("--sections")] == [True, False]
    assert after.stat().st_size < before.stat().st_size
    for flags in ("--dyn-syms", "--segments"):
        first, second = told(flags)
        assert [line for line in first.splitlines() if "GLOBAL" in line or "LOAD" in line] == [
            line for line in second.splitlines() if "GLOBAL" in line or "LOAD" in line
        ]
    library = ctypes.CDLL(str(after))
    assert [library.shown(3), library.shown(3)] == [6, 7]
    assert shutil.which("strip") is None or subprocess.run(["strip", after], check=False).returncode == 0, "well-formed"


def test_what_is_left_out_is_of_the_lock() -> None:
    described = tomllib.loads((ROOT / "docker/image.toml").read_text(encoding="utf-8"))
    for variant in described["variants"].values():
        lock = (ROOT / variant["wheels"]).read_text(encoding="utf-8")
        names = {*described["leave_out_wheels"], *variant.get("leave_out_wheels", [])}
        assert names <= set(re.findall(r"^([a-z0-9-]+)==", lock, re.MULTILINE))


def test_the_description_names_files_that_are_there_and_pins_each_package_once() -> None:
    described = tomllib.loads((ROOT / "docker/image.toml").read_text(encoding="utf-8"))
    assert set(described["variants"]) == {"cpu", "cuda"}
    assert described["user"] == "65532:65532"
    names: list[str] = []
    for variant in described["variants"].values():
        assert (ROOT / variant["wheels"]).is_file()
    for path in described["variants"]["cuda"]["packages"]:
        lines = [line for line in (ROOT / path).read_text().splitlines() if not line.startswith("#")]
        assert all(len(line.split("  ")[0]) == 64 for line in lines)
        names += [line.split("  ")[1].split("_")[0] for line in lines]
    assert len(names) == len(set(names)) > 30
    assert not {"bash", "dash", "apt", "dpkg"} & set(names)


def test_the_proxy_passes_on_both_ways_and_lets_a_client_stop_sending(tmp_path: Path) -> None:
    path = str(tmp_path / "inner.sock")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"got " + await reader.read())
        writer.close()

    async def check() -> bytes:
        inner = await asyncio.start_unix_server(answer, path)
        proxy = await asyncio.create_subprocess_exec(
            sys.executable, "-I", str(ROOT / "docker/forward.py"), "127.0.0.1:0", path, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert proxy.stdout is not None
            port = int((await proxy.stdout.readline()).decode().rsplit(":", 1)[1])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"question" * 20000)
            writer.write_eof()
            reply = await asyncio.wait_for(reader.read(), 20)
            writer.close()
        finally:
            proxy.terminate()
            inner.close()
        assert await proxy.wait() == 0
        return reply

    assert asyncio.run(check()) == b"got " + b"question" * 20000


HEALTH = [sys.executable, "-I", str(ROOT / "docker/health.py")]
LINES = (("200 OK", 0), ("503 Service Unavailable", 1))


def checked(listener: socket.socket, line: str, *words: str) -> tuple[str, int]:
    """What the health check sends to a server that answers with this status line, and its exit status."""
    with subprocess.Popen([*HEALTH, *words], stderr=subprocess.DEVNULL) as check:
        with listener.accept()[0] as connection:
            asked = connection.recv(4096).decode()
            connection.sendall(f"HTTP/1.1 {line}\r\ncontent-length: 0\r\n\r\n".encode())
        return asked, check.wait(20)


def test_the_health_check_fails_when_nobody_listens_and_when_the_answer_is_no(tmp_path: Path) -> None:
    path = str(tmp_path / "server.sock")
    assert subprocess.run([*HEALTH, path], capture_output=True, check=False, timeout=20).returncode == 1
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        for line, expected in LINES:
            asked, status = checked(listener, line, path)
            assert asked.startswith("GET /health ")
            assert "Authorization" not in asked
            assert status == expected


def test_the_health_check_asks_a_port_whether_it_is_ready_with_the_key_that_may_be_there(tmp_path: Path) -> None:
    key = tmp_path / "key"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        words = (f"http://127.0.0.1:{listener.getsockname()[1]}", "/ready", str(key))
        for line, expected in LINES:
            asked, status = checked(listener, line, *words)
            assert asked.startswith("GET /ready ")
            assert "Authorization" not in asked
            assert status == expected
        key.write_text("secret\n")
        assert "Authorization: Bearer secret\r\n" in checked(listener, "200 OK", *words)[0]
