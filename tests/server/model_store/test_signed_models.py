"""Models from pack to load: what was signed comes through whole, anything else is refused by name."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.torch import save_file

from vashista.engine.errors import (
    ModelArchiveError,
    ModelChangedError,
    ModelDiskError,
    ModelError,
    ModelExistsError,
    ModelFileRefusedError,
    ModelFolderError,
    ModelInUseError,
    ModelKeyError,
    ModelNotInstalledError,
    ModelSignatureError,
    ModelUntrustedError,
    PickleRefusedError,
)
from vashista.server.cli import run
from vashista.server.model_store import startup
from vashista.server.model_store.keys import load_private, load_trusted
from vashista.server.model_store.manifest import SIGNATURE_NAME
from vashista.server.model_store.packing import pack
from vashista.server.model_store.store import check_installed, check_packed, in_use, install, remove
from vashista.server.settings import Settings

PROBE = Path(__file__).parents[3] / "deploy/models/reference-26m"


def write_key(folder: Path, name: str = "signer") -> Path:
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / f"{name}.key").write_bytes(private)
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pem").write_bytes(public)
    return folder / f"{name}.key"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The bundled model with fewer weights: nothing here loads them."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for path in PROBE.iterdir():
        if path.suffix in {".json", ".jinja"}:
            shutil.copy(path, folder)
    save_file({"weight": torch.arange(300_000.0)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def packed(model: Path, tmp_path: Path) -> Path:
    out = tmp_path / "tiny.model.tar"
    pack(model, out, load_private(write_key(tmp_path)), name="tiny")
    return out


@pytest.fixture
def installed(packed: Path, tmp_path: Path) -> Path:
    place, _, is_new = install(packed, tmp_path / "models", load_trusted(tmp_path / "signer.pem"))
    assert is_new
    return place


def test_a_packed_model_is_installed_as_it_was_and_any_tar_reads_it(model: Path, packed: Path, tmp_path: Path) -> None:
    keys = load_trusted(tmp_path)
    place, manifest, is_new = install(packed, tmp_path / "models", keys)
    assert is_new
    assert {path.name: path.read_bytes() for path in model.iterdir()} == {
        path.name: path.read_bytes() for path in place.iterdir() if path.name != SIGNATURE_NAME
    }
    assert check_packed(packed, keys) == check_installed(place, keys) == manifest
    assert install(packed, tmp_path / "models", keys)[2] is False
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny"]
    with tarfile.open(packed) as tar:
        assert {member.name for member in tar} == {f"tiny/{path.name}" for path in place.iterdir()}
    assert (place / "config.json").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json is truncated"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "config.json").rename(folder / "settings.json"), "settings.json is not in"),
        (lambda folder: (folder / "extra.json").write_text("{}"), "extra.json is not in the signed manifest"),
        (lambda folder: os.truncate(folder / "model.safetensors", 1000), "model.safetensors is truncated"),
        (lambda folder: flip(folder / "model.safetensors", 1_000_003), "model.safetensors was changed"),
        (lambda folder: flip(folder / "tokenizer.json", 77), "tokenizer.json was changed"),
    ],
)
def test_each_kind_of_damage_to_an_installed_model_is_named(
    installed: Path, tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    damage(installed)
    with pytest.raises(ModelChangedError, match=words):
        check_installed(installed, load_trusted(tmp_path))


def test_links_folders_and_pickles_in_an_installed_model_are_refused(installed: Path, tmp_path: Path) -> None:
    keys = load_trusted(tmp_path)
    (installed / "sub").mkdir()
    with pytest.raises(ModelFileRefusedError, match=r"sub in .* is a folder"):
        check_installed(installed, keys)
    (installed / "sub").rmdir()
    (installed / "config.json").rename(tmp_path / "config.json")
    (installed / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(ModelFileRefusedError, match=r"config\.json in .* is a link"):
        check_installed(installed, keys)


def test_pickles_code_and_folders_are_refused_by_name_and_can_be_left_out(model: Path, tmp_path: Path) -> None:
    key = load_private(write_key(tmp_path))
    for name, error in (("w.bin", PickleRefusedError), ("m.PT", PickleRefusedError), ("a.py", ModelFileRefusedError)):
        (model / name).write_bytes(b"x")
        with pytest.raises(error, match=name):
            pack(model, tmp_path / "out.tar", key, name="tiny")
        packed = pack(model, tmp_path / "out.tar", key, name="tiny", leave_out=[name])
        assert list(packed.left_out) == [name]
        (model / name).unlink()
    (model / "original").mkdir()
    with pytest.raises(ModelFileRefusedError, match=r"original in .* is a folder"):
        pack(model, tmp_path / "out.tar", key, name="tiny")
    assert "original" in pack(model, tmp_path / "out.tar", key, name="tiny", leave_out=["orig*"]).left_out
    (tmp_path / "out.tar").unlink()
    for pattern in ("*", "config.json", "tok*.json", "*.safetensors"):
        with pytest.raises(ModelFolderError, match="could not be served"):
            pack(model, tmp_path / "out.tar", key, name="tiny", leave_out=[pattern])
        assert not (tmp_path / "out.tar").exists()
    with pytest.raises(ModelFileRefusedError, match=r"cannot be named '\.\./up'"):
        pack(model, tmp_path / "out.tar", key, name="../up")


def test_another_key_a_bundle_key_and_no_key_are_named(installed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ModelKeyError, match="no key is trusted"):
        load_trusted(other)
    write_key(other, "stranger")
    with pytest.raises(ModelUntrustedError, match=r"trusted are .*stranger\.pem"):
        check_installed(installed, load_trusted(other))
    with pytest.raises(ModelKeyError, match="holds a private key"):
        load_trusted(tmp_path / "signer.key")
    (installed / SIGNATURE_NAME).unlink()
    with pytest.raises(ModelSignatureError, match="nobody has signed"):
        check_installed(installed, load_trusted(tmp_path))


def flip(path: Path, place: int, bit: int = 3) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))


def test_no_flipped_bit_of_the_signature_or_of_a_header_passes(installed: Path, packed: Path, tmp_path: Path) -> None:
    keys, source = load_trusted(tmp_path), random.Random(6)
    num_bytes = (installed / SIGNATURE_NAME).stat().st_size
    places = [*range(512), *(source.randrange(512, 1536 + num_bytes) for _ in range(400))]
    places += [packed.stat().st_size - 1 - source.randrange(1024) for _ in range(20)]
    for place in places:
        bit = source.randrange(8)
        flip(packed, place, bit)
        with pytest.raises(ModelError):
            check_packed(packed, keys)
        flip(packed, place, bit)
    check_packed(packed, keys)
    with packed.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ModelArchiveError, match="goes on behind"):
        check_packed(packed, keys)


def test_a_full_disk_and_a_changed_file_leave_nothing(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, models = load_trusted(tmp_path), tmp_path / "models"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(ModelDiskError, match=r"bytes are needed, 1 are free"):
            install(packed, models, keys)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: raise_(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(ModelDiskError, match="The disk is full"):
            install(packed, models, keys)
    flip(packed, packed.stat().st_size // 2)
    with pytest.raises(ModelChangedError, match="was changed after it was signed"):
        install(packed, models, keys)
    assert list(models.iterdir()) == []


def raise_(error: Exception) -> None:
    raise error


def test_an_import_that_is_killed_leaves_no_model_and_the_next_one_clears_up(packed: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from vashista.server.model_store import store\n"
        "from vashista.server.model_store.keys import load_trusted\n"
        "store._sync = lambda folder: os.kill(os.getpid(), signal.SIGKILL)\n"
        "store.install(Path(sys.argv[1]), Path(sys.argv[2]), load_trusted(Path(sys.argv[3])))\n"
    )
    command = [sys.executable, "-c", code, str(packed), str(models), str(tmp_path / "signer.pem")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    [left] = models.iterdir()
    assert left.name.startswith(".importing-tiny-")
    install(packed, models, load_trusted(tmp_path))
    assert [path.name for path in models.iterdir()] == ["tiny"]


def test_a_name_that_is_taken_is_never_overwritten(installed: Path, packed: Path, tmp_path: Path) -> None:
    models, keys = installed.parent, load_trusted(tmp_path)
    (models / "notes").mkdir()
    with pytest.raises(ModelExistsError, match="is not this model"):
        install(packed, models, keys, name="notes")
    flip(installed / "config.json", 5)
    with pytest.raises(ModelChangedError, match=r"config\.json was changed"):
        install(packed, models, keys)
    assert install(packed, models, keys, name="second")[0] == models / "second"


def test_a_served_model_is_not_removed(installed: Path) -> None:
    with in_use(installed), pytest.raises(ModelInUseError):
        remove(installed.parent, "tiny")
    assert installed.exists()
    remove(installed.parent, "tiny")
    assert list(installed.parent.iterdir()) == []
    with pytest.raises(ModelNotInstalledError):
        remove(installed.parent, "tiny")


def settings(model: Path, tmp_path: Path, **values: object) -> Settings:
    (tmp_path / "state").mkdir(exist_ok=True)
    return Settings.model_validate({"model": model, "state_dir": tmp_path / "state", **values})


def test_a_fast_check_reads_what_was_touched_and_a_full_one_everything(installed: Path, tmp_path: Path) -> None:
    fast = settings(installed, tmp_path, model_trust=tmp_path / "signer.pem")
    first, second = startup.check_before_load(fast), startup.check_before_load(fast)
    assert first is not None
    assert second is not None
    assert (first.is_full, second.is_full) == (True, False)
    assert first.root_digest == second.root_digest
    full = settings(installed, tmp_path, model_trust=tmp_path / "signer.pem", verify_model="full")
    checked = startup.check_before_load(full)
    assert checked is not None
    assert checked.is_full
    weights = installed / "model.safetensors"
    before = weights.stat()
    time.sleep(0.02)
    flip(weights, 1_000_003)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # the time of its change of any kind gives it away
    for each in (fast, full):
        with pytest.raises(ModelChangedError, match=r"model\.safetensors was changed"):
            startup.check_before_load(each)


def test_an_unsigned_model_is_served_only_where_no_key_is_trusted(model: Path, packed: Path, tmp_path: Path) -> None:
    assert startup.check_before_load(settings(model, tmp_path)) is None
    with pytest.raises(ModelSignatureError, match="nobody has signed"):
        startup.check_before_load(settings(model, tmp_path, model_trust=tmp_path / "signer.pem"))
    with pytest.raises(ModelKeyError, match="model_trust names no key"):
        startup.check_before_load(settings(model, tmp_path, verify_model="full"))


def test_what_was_learnt_of_a_signed_model_outlives_a_restart(
    installed: Path, tmp_path: Path, start_server: Callable[..., Any]
) -> None:
    trust = {"model": str(installed), "model_trust": str(tmp_path / "signer.pem"), "state_dir": str(tmp_path / "state")}
    for known in (0, 1):
        server = start_server(**trust).wait_ready()
        prediction = server.complete(model="tiny").json()["usage"]["vashista"]["prediction"]
        assert prediction["num_outcomes"] == known
        assert server.end() == 0


def test_a_server_names_the_signed_digest_and_does_not_load_what_was_changed(
    installed: Path, tmp_path: Path, start_server: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = check_installed(installed, load_trusted(tmp_path))
    trust = {"model": str(installed), "model_trust": str(tmp_path / "signer.pem"), "state_dir": str(tmp_path / "state")}
    server = start_server(**trust).wait_ready()
    [card] = httpx.get(server.url + "/v1/models").json()["data"]
    expected = ("tiny", manifest.root_digest, "signed_manifest", manifest.signer)
    assert (card["id"], card["digest"], card["digest_kind"], card["signed_by"]) == expected
    assert server.complete(model="tiny").status_code == 200
    with pytest.raises(ModelInUseError):
        remove(installed.parent, "tiny")
    server.end()
    assert run(["ledger", "export", "--state-dir", str(tmp_path / "state")]) == 0
    assert f'"model_digest":"{manifest.root_digest}"' in capsys.readouterr().out.replace('": "', '":"')
    flip(installed / "model.safetensors", 4321)
    broken = start_server(**trust)
    with pytest.raises(AssertionError, match=r"model\.safetensors was changed"):
        broken.wait_ready()
    assert broken.engine_messages("submit") == []


def test_the_commands_pack_import_verify_list_and_remove(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_key(tmp_path)
    where, trust = ["--models-dir", "models"], ["--model-trust", "signer.pem"]
    assert run(["models", "pack", "tiny", "--key", "signer.key"]) == 0
    assert run(["models", "import", "tiny.model.tar", *where, *trust]) == 0
    assert run(["models", "verify", "tiny.model.tar", *trust]) == 0
    shutil.rmtree(model)
    assert run(["models", "verify", "tiny", *where, *trust]) == 0
    capsys.readouterr()
    assert run(["models", "list", "models", *trust]) == 0
    assert "signed by " + load_trusted(tmp_path)[0].fingerprint[:16] in capsys.readouterr().out
    assert run(["models", "import", "tiny.model.tar", *where]) == 1
    assert "error[model_key]: No key to check models with" in capsys.readouterr().err
    (tmp_path / "models" / ".config").mkdir()
    for name in ("", ".", "..", "../models", "tiny/", ".config", "none"):
        assert run(["models", "remove", name, *where]) == 1
        assert f"error[model_not_installed]: models has no model {name!r}." in capsys.readouterr().err
    (tmp_path / "models" / ".config").rmdir()
    assert run(["models", "remove", "tiny", *where]) == 0
    assert not list((tmp_path / "models").iterdir())
