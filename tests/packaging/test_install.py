"""install.sh and setup.sh with a small bundle, below a folder: what they refuse, and what any interruption leaves."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from vashista.server.settings import Settings, load_settings
from vashista.server.settings_table import settings_file

ROOT = Path(__file__).parents[2]
AIRGAP = ROOT / "bench/airgap"
SCRIPTS = ROOT / "deploy/install"
COUNTED = ("mv", "cp", "ln", "rm", "mkdir", "chmod", "tar", "rmdir")
SHIM = """#!/bin/sh
n=$(($(cat {count}) + 1))
echo $n >{count}
[ $n -ne {at} ] || kill -KILL 0
exec {program} "$@"
"""


class Bundle(NamedTuple):
    """A small bundle, unpacked."""

    folder: Path
    fingerprint: str


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, AIRGAP / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mutations = load("mutations")


def make(out: Path, *flags: str) -> Bundle:
    command = [sys.executable, str(AIRGAP / "small_bundle.py"), str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [folder] = [path for path in out.iterdir() if path.is_dir()]
    return Bundle(folder, done.stdout.strip())


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """Version 0.1.0, and 0.2.0 as a delta on its runtime, by the same key."""
    folder = tmp_path_factory.mktemp("bundles")
    make_keys = (
        "import sys, pathlib; from vashista.server.bundle_keys import make_keys; make_keys(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", make_keys, str(folder / "keys")], check=True)
    keys = ("--keys", str(folder / "keys"))
    return make(folder / "a", *keys), make(folder / "b", *keys, "--version", "0.2.0", "--delta")


def run(script: Path, root: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(script), *words, "--root", str(root)]
    return subprocess.run(
        command, env={**os.environ, **environ}, capture_output=True, text=True, check=False, timeout=120
    )


def install(bundle: Bundle, root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run(bundle.folder / "install.sh", root, *words, "--fingerprint", bundle.fingerprint)


def setup(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    [script] = root.glob("opt/vashista/current/bin/vashista-setup")
    return run(script, root, *words)


def snapshot(root: Path) -> dict[str, str]:
    """Every path with its mode, and content or target."""
    found = {}
    for path in sorted(root.rglob("*")):
        mode = oct(path.lstat().st_mode)
        if path.is_symlink():
            found[str(path.relative_to(root))] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[str(path.relative_to(root))] = mode + hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path.relative_to(root))] = mode
    return found


def version(root: Path) -> str:
    return os.readlink(root / "opt/vashista/current").removeprefix("versions/")[:5]


@pytest.fixture(scope="module")
def installed(bundles: tuple[Bundle, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with version 0.1.0 installed; copy it, do not change it."""
    root = tmp_path_factory.mktemp("installed") / "root"
    root.mkdir()
    done = install(bundles[0], root)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def machine(installed: Path, tmp_path: Path) -> Path:
    shutil.copytree(installed, tmp_path / "root", symlinks=True)
    return tmp_path / "root"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    scripts = [str(path) for path in SCRIPTS.glob("*.sh")]
    done = subprocess.run(["shellcheck", "--shell=sh", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_first_installation_wants_the_fingerprint_and_says_which_to_compare(
    bundles: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    script = bundles[0].folder / "install.sh"
    done = run(script, tmp_path)
    assert done.returncode == 1
    assert f"install.sh install --fingerprint {bundles[0].fingerprint}" in done.stderr
    wrong = run(script, tmp_path, "--fingerprint", "0" * 64)
    assert wrong.returncode == 1
    assert "NOT THE KEY YOU NAMED" in wrong.stderr
    assert not any(tmp_path.iterdir())
    spaced = " ".join(re.findall("....", bundles[0].fingerprint.upper()))
    assert run(script, tmp_path, "verify", "--fingerprint", spaced).returncode == 0
    assert not any(tmp_path.iterdir()), "verify changes nothing"


def test_an_installation_holds_product_units_settings_and_evidence(installed: Path) -> None:
    current = installed / "opt/vashista/current"
    assert (current / "lib/python3.11/site-packages/vashista/__init__.py").is_file()
    assert (current / "runtime/usr/lib/python3/dist-packages/small/__init__.py").is_file()
    for name in ("MANIFEST", "sbom.cdx.json", "vashista.toml", "docs/operator.md", "prometheus/alerts.yml"):
        assert (current / "share" / name).is_file(), name
    for name in ("vashista.service", "vashista.socket"):
        assert (installed / "etc/systemd/system" / name).read_bytes() == (ROOT / "deploy/systemd" / name).read_bytes()
    assert not (installed / "etc/systemd/system/vashista.service.d").exists(), "drop-ins are the operator's"
    assert (installed / "etc/vashista/vashista.toml").read_text() == 'model = "/srv/vashista/models/tiny"\n'
    assert (installed / "var/lib/vashista").stat().st_mode & 0o777 == 0o700
    assert (installed / "srv/vashista/models/tiny/config.json").is_file()
    assert not (installed / "opt/vashista/staging").exists()
    assert not (installed / "opt/vashista/unfinished").exists()


def test_the_settings_file_has_every_setting_with_a_comment(tmp_path: Path) -> None:
    config = tmp_path / "vashista.toml"
    config.write_text(settings_file({"model": "/srv/model"}))
    lines = config.read_text().splitlines()
    for name in Settings.model_fields:
        (at,) = [at for at, line in enumerate(lines) if re.match(rf"#?{name} = ", line)]
        assert lines[at - 1].startswith("# "), f"{name} has no comment"
        assert (lines[at][0] != "#") == (name == "model")
    assert load_settings({}, {}, config=config).model == Path("/srv/model")


def test_a_second_run_changes_nothing(bundles: tuple[Bundle, Bundle], machine: Path) -> None:
    (machine / "etc/vashista/vashista.toml").write_text("# mine\n")
    before = snapshot(machine)
    done = run(bundles[0].folder / "install.sh", machine)
    assert done.returncode == 0, done.stderr
    assert snapshot(machine) == before


def test_upgrade_rollback_and_the_way_back_keep_state_and_settings(
    bundles: tuple[Bundle, Bundle], machine: Path
) -> None:
    (machine / "var/lib/vashista/ledger.db").write_text("receipts")
    (machine / "etc/vashista/vashista.toml").write_text("# mine\n")
    done = run(bundles[1].folder / "install.sh", machine)  # the key is known by now
    assert done.returncode == 0, done.stderr
    assert version(machine) == "0.2.0"
    assert setup(machine, "rollback").returncode == 0
    assert version(machine) == "0.1.0"
    assert setup(machine, "check").returncode == 0
    assert setup(machine, "rollback").returncode == 0
    assert version(machine) == "0.2.0"
    assert (machine / "var/lib/vashista/ledger.db").read_text() == "receipts"
    assert (machine / "etc/vashista/vashista.toml").read_text() == "# mine\n"


def test_a_bundle_by_another_key_is_refused_until_its_fingerprint_is_given(machine: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", "--version", "0.3.0")
    before = snapshot(machine)
    done = run(other.folder / "install.sh", machine)
    assert done.returncode == 1
    assert "ANOTHER KEY" in done.stderr
    assert snapshot(machine) == before
    assert install(other, machine).returncode == 0
    assert version(machine) == "0.3.0"


def test_a_delta_without_its_runtime_is_refused(bundles: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    done = install(bundles[1], tmp_path)
    assert done.returncode == 1
    assert "Take the whole bundle" in done.stderr
    assert not (tmp_path / "opt/vashista/current").exists()


def test_check_names_damage_and_repair_mends_it(bundles: tuple[Bundle, Bundle], machine: Path) -> None:
    whole = snapshot(machine)
    current = (machine / "opt/vashista/current").resolve()
    (current / "lib/python3.11/site-packages/vashista/__init__.py").write_text("evil = 1\n")
    (current / "runtime/usr/lib/python3/dist-packages/small/__init__.py").unlink()
    (machine / "srv/vashista/models/tiny/model.safetensors").write_bytes(b"other")
    (machine / "etc/systemd/system/vashista.socket").unlink()
    done = setup(machine, "check")
    assert done.returncode == 1
    assert "vashista/__init__.py: FAILED" in done.stderr
    assert install(bundles[1], machine, "repair").returncode == 1, "another bundle does not mend this one"
    done = install(bundles[0], machine, "repair")
    assert done.returncode == 0, done.stderr
    assert "put back in" in done.stdout
    assert snapshot(machine) == whole


@pytest.mark.parametrize("place", ["lib/python3.11/site-packages", "runtime/usr/lib/python3.11"])
def test_check_names_a_file_that_was_added_and_repair_takes_it_away(
    bundles: tuple[Bundle, Bundle], machine: Path, place: str
) -> None:
    whole = snapshot(machine)
    folder = machine / "opt/vashista/current" / place
    (folder / "sitecustomize.py").write_text("evil = 1\n")
    done = setup(machine, "check")
    assert done.returncode == 1
    assert "Files that were not installed" in done.stderr
    assert "sitecustomize.py\n" in done.stderr
    (folder / "sitecustomize.py").unlink()
    (folder / "linked.py").symlink_to("/tmp/evil.py")
    assert "linked.py\n" in setup(machine, "check").stderr
    done = install(bundles[0], machine, "repair")
    assert done.returncode == 0, done.stderr
    assert snapshot(machine) == whole
    assert setup(machine, "check").returncode == 0


def test_uninstall_keeps_the_ledger_and_purge_leaves_nothing(machine: Path) -> None:
    (machine / "var/lib/vashista/ledger.db").write_text("receipts")
    (machine / "srv/vashista/models/mine").mkdir()
    other = machine.with_name("purged")
    shutil.copytree(machine, other, symlinks=True)
    done = setup(machine, "uninstall")
    assert done.returncode == 0, done.stderr
    left = {name for name in snapshot(machine) if not (machine / name).is_dir()}
    assert left == {"var/lib/vashista/ledger.db"}
    assert (machine / "srv/vashista/models/mine").is_dir(), "models of others stay"
    assert setup(other, "uninstall", "--purge").returncode == 0
    assert [path for path in other.rglob("*") if "vashista" in str(path.relative_to(other))] == []


def test_damage_of_any_kind_is_refused_before_anything_is_written(
    bundles: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    """bench/airgap/tamper.py plays ten thousand; here some of each kind, on a bundle that is good without them."""
    bundle, root = bundles[0], tmp_path / "root"
    root.mkdir()
    assert mutations.by_hand(bundle.folder, bundle.fingerprint)
    damage = mutations.Damage(bundle.folder, tmp_path / "copy", random.Random(6))
    for _ in range(100):
        with damage.one() as (kind, name):
            own = damage.copy / "install.sh"
            if not own.is_file() or own.read_bytes() != (bundle.folder / "install.sh").read_bytes():
                assert not mutations.by_hand(damage.copy, bundle.fingerprint), (kind, name)
                continue
            done = mutations.install(damage.copy, bundle.fingerprint, root)
            assert done.returncode != 0, (kind, name, done.stdout)
            assert not any(root.iterdir()), (kind, name)
    assert install(bundle, root).returncode == 0, "refusals prove something only if the bundle itself is good"


def interrupted(bundle: Bundle, root: Path, at: int) -> bool:
    """Run install.sh and kill all of it at the `at`-th command that changes a file; whether it came so far."""
    tools = root.with_name(f"{root.name}-tools")
    tools.mkdir()
    (tools / "count").write_text("0")
    for name in COUNTED:
        program = shutil.which(name)
        (tools / name).write_text(SHIM.format(count=tools / "count", at=at, program=program))
        (tools / name).chmod(0o755)
    command = ["sh", str(bundle.folder / "install.sh"), "--fingerprint", bundle.fingerprint, "--root", str(root)]
    path = f"{tools}:{os.environ['PATH']}"
    done = subprocess.run(
        command, env={**os.environ, "PATH": path}, capture_output=True, check=False, start_new_session=True, timeout=120
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


@pytest.mark.parametrize("at", [1, 5, 10, 18, 25, 33, 41])
def test_an_installation_that_is_killed_is_finished_by_the_next_run(
    bundles: tuple[Bundle, Bundle], installed: Path, tmp_path: Path, at: int
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    assert interrupted(bundles[0], root, at)
    done = install(bundles[0], root)
    assert done.returncode == 0, done.stderr
    assert snapshot(root) == snapshot(installed)


@pytest.mark.parametrize("at", [3, 12, 22, 30, 34])
def test_an_upgrade_that_is_killed_leaves_a_whole_version_and_is_finished_by_the_next_run(
    bundles: tuple[Bundle, Bundle], machine: Path, tmp_path: Path, at: int
) -> None:
    straight = tmp_path / "straight"
    shutil.copytree(machine, straight, symlinks=True)
    assert install(bundles[1], straight).returncode == 0
    assert interrupted(bundles[1], machine, at)
    assert version(machine) in ("0.1.0", "0.2.0")
    assert setup(machine, "check").returncode == 0
    assert install(bundles[1], machine).returncode == 0
    assert snapshot(machine) == snapshot(straight)
