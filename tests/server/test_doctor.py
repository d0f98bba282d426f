"""`vashista doctor` and `vashista attest`: against processes of the kernel's making, a real ledger, and openssl."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vashista.engine.clusters import Clusters
from vashista.engine.errors import AttestationError, DoctorOptionError
from vashista.engine.messages import DENSE, FinishReason
from vashista.server.cli import run
from vashista.server.doctor import evidence, machine
from vashista.server.doctor.attestation import hide_secrets, read_attestation
from vashista.server.doctor.controls import CONTROLS
from vashista.server.doctor.finding import State, not_checked
from vashista.server.doctor.process import Process
from vashista.server.ledger.ledger import Ledger
from vashista.server.ledger.receipt import Outcome, Receipt, utc_text

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "deploy/models/reference-26m"
Capture = pytest.CaptureFixture[str]

# As Linux 6.1 prints them in a namespace with an interface, and in one that is only a name.
NET_DEV = "Inter-|   Receive\n face |bytes\n    lo: 0 0\n"
ROUTE = "Iface\tDestination\tGateway\tFlags\n"
IPV6_LO = f"{'0' * 32} 00 {'0' * 32} 00 {'0' * 32} ffffffff 00000001 00000000 00200200       lo\n"
STATUS = (
    "Name:\tx\nUid:\t{user}\t{user}\t{user}\t{user}\nCapPrm:\t{caps}\nCapEff:\t{caps}\nCapAmb:\t0\nNoNewPrivs:\t{nnp}\n"
)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("VASHISTA_")]:
        monkeypatch.delenv(name)


def process(
    folder: Path, *, dev: str = "", routes: str = "", user: int = 998, caps: str = "0000000000000000", nnp: int = 1
) -> Process:
    net = folder / "7" / "net"
    net.mkdir(parents=True)
    (folder / "7" / "status").write_text(STATUS.format(user=user, caps=caps, nnp=nnp))
    (net / "dev").write_text(NET_DEV + dev)
    (net / "route").write_text(ROUTE + routes)
    (net / "ipv6_route").write_text(IPV6_LO)
    return Process(7, folder)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder with a ledger of three receipts."""
    folder = tmp_path / "state"
    ledger = Ledger(folder)
    for number in range(3):
        ledger.append(
            Receipt(
                time=utc_text(1_790_000_000.0 + number), request_id=f"r{number}", key_id=None, client="192.0.2.7",
                endpoint="/v1/completions", model="m", model_digest="ab" * 32, parameters={}, num_prompt_tokens=1,
                num_cached_tokens=0, num_output_tokens=1, attention=DENSE,
                outcome=Outcome(queue_s=0.0, ttft_s=0.1, total_s=0.2, busy_s=0.1, cost_nano=0, currency="EUR"),
                finish_reasons=(FinishReason.STOP,),
            )
        ).result(10)  # fmt: skip
    ledger.close()
    return folder


def test_a_process_without_interface_and_route_is_isolated(tmp_path: Path) -> None:
    assert process(tmp_path).isolation().state is State.OK


@pytest.mark.parametrize("change", [{"dev": "  eth0: 0 0\n"}, {"routes": "tun0\t00000000\t01020304\t0003\n"}])
def test_an_interface_or_a_route_is_named_with_a_remedy(tmp_path: Path, change: dict[str, str]) -> None:
    found = process(tmp_path, **change).isolation()
    assert found.state is State.NOT_OK
    assert found.remedy
    assert ("eth0" in found.detail) or ("1 routes" in found.detail)


def test_mode_lan_is_not_ok_and_said_loudly(tmp_path: Path) -> None:
    found = process(tmp_path, dev="  eth0: 0 0\n").isolation("lan")
    assert found.state is State.NOT_OK
    assert found.detail.startswith("MODE LAN: ")
    assert "eth0" in found.detail
    assert "isolation = required" in (found.remedy or "")


@pytest.mark.parametrize(
    ("change", "words"),
    [({"user": 0}, "root"), ({"caps": "0000000000200000"}, "200000"), ({"nnp": 0}, "set-uid")],
)
def test_each_right_too_many_is_named(tmp_path: Path, change: dict[str, object], words: str) -> None:
    found = process(tmp_path, **change).rights()  # type: ignore[arg-type]
    assert found.state is State.NOT_OK
    assert words in found.detail
    assert process(tmp_path / "other").rights().state is State.OK


def test_a_process_that_is_gone_is_a_wrong_option(tmp_path: Path) -> None:
    with pytest.raises(DoctorOptionError, match="no process 7"):
        Process(7, tmp_path)


def test_a_namespace_of_the_kernel_is_isolated_and_seen_from_outside() -> None:
    command = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", "input(print('up', flush=True))"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as inside:
        assert inside.stdout is not None
        if inside.stdout.readline() != "up\n":
            pytest.skip("this machine lets nobody make network namespaces")
        found = Process(inside.pid).isolation()
        inside.communicate("\n", timeout=20)
    assert found.state is State.OK, found


def test_files_of_the_installation_are_compared_with_their_record() -> None:
    assert machine.installation("click").state is State.NOT_CHECKED, "it has no cli.py, and stands for a checkout"
    found = machine.installation("uvicorn")
    assert found.state is State.NOT_CHECKED
    assert machine.installation("no-such-distribution").state is State.NOT_OK


def test_a_changed_file_of_a_wheel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/cli.py").write_text("x = 1\n")
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"x = 1\n").digest()).rstrip(b"=").decode()
    info = tmp_path / "tiny-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"tiny/cli.py,sha256={digest},6\ntiny-1.0.dist-info/RECORD,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert machine.installation("tiny").state is State.OK
    (tmp_path / "tiny/cli.py").write_text("x = 2\n")
    found = machine.installation("tiny")
    assert found.state is State.NOT_OK
    assert "tiny/cli.py" in found.detail


def test_a_gpu_that_is_asked_for_and_absent_is_not_ok(tmp_path: Path) -> None:
    nowhere = {"driver": tmp_path / "version", "control": tmp_path / "nvidiactl"}
    assert machine.gpu("cuda:0", **nowhere).state is State.NOT_OK
    assert machine.gpu("auto", **nowhere).state is State.NOT_CHECKED
    (tmp_path / "version").write_text("NVRM version: 570.1\n")
    assert "unit or container" in str(machine.gpu("auto", **nowhere).remedy)
    (tmp_path / "nvidiactl").touch()
    assert "570.1" in machine.gpu("auto", **nowhere).detail


@pytest.mark.parametrize(
    ("found", "state", "words"),
    [
        (Clusters(("H100",), (), None), State.OK, "H100: sparse decode of few requests runs in clusters"),
        (Clusters(("H100",), ("L4 has",), "no NVRTC"), State.NOT_OK, "slower than it could be, without clusters"),
        (Clusters((), ("L4 has compute capability 8.9",), None), State.NOT_CHECKED, "not for this device: L4 has"),
        (OSError("NVML says: no"), State.NOT_CHECKED, "cannot be asked what they are: NVML says: no"),
    ],
)
def test_clusters_are_used_or_missed_or_not_for_the_device(
    monkeypatch: pytest.MonkeyPatch, found: Clusters | OSError, state: State, words: str
) -> None:
    def find() -> Clusters:
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr("vashista.engine.clusters.find_clusters", find)
    finding = machine.clusters("cuda")
    assert finding.state is state
    assert words in finding.detail
    if state is State.NOT_OK:
        assert finding.detail.endswith("everything works. no NVRTC.")
        assert "cuda-bindings" in str(finding.remedy)


def test_for_a_cpu_nobody_looks_for_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vashista.engine.clusters.find_clusters", lambda: pytest.fail("torch was imported"))
    assert machine.clusters("cpu") == not_checked("clusters", "not for a CPU")


def test_a_version_that_is_not_the_current_one_is_not_ok(tmp_path: Path) -> None:
    for name in ("1.0-aa", "1.1-bb"):
        (tmp_path / "versions" / name).mkdir(parents=True)
    assert machine.updates(tmp_path / "versions/1.0-aa").state is State.NOT_CHECKED
    (tmp_path / "current").symlink_to("versions/1.1-bb")
    assert machine.updates(tmp_path / "versions/1.1-bb").detail.startswith("1.1-bb is in use; also here: 1.0-aa")
    found = machine.updates(tmp_path / "versions/1.0-aa")
    assert found.state is State.NOT_OK
    assert "current leads to 1.1-bb" in found.detail


def test_a_signed_model_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = evidence.digest_files(MODEL)
    monkeypatch.setattr(evidence, "digest_files", lambda folder: pytest.fail("its files were read again"))
    found, facts = evidence.model(MODEL, {**digests, "README.md": "00"})
    assert found.state is State.OK
    assert facts is not None
    assert facts["sha256"] == digests
    assert evidence.model(MODEL, {**digests, "config.json": "00"})[0].state is State.NOT_OK


def test_doctor_has_a_line_for_each_thing_that_operators_ask_for(state: Path, capfd: Capture) -> None:
    run(["doctor", "--state-dir", str(state), "--json"])
    names = {finding["name"] for finding in json.loads(capfd.readouterr().out)}
    asked = {"isolation", "signatures", "model", "GPU", "kernels", "clusters", "ledger", "clock", "certificates"}
    asked |= {"disk", "updates"}
    assert asked <= names


def test_a_state_folder_that_this_user_may_not_enter_is_not_ok_with_a_remedy(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stat(path: Path, **flags: bool) -> os.stat_result:
        if path.parent == state:
            raise PermissionError(13, "Permission denied")
        return os.stat(path, **flags)

    monkeypatch.setattr(Path, "stat", stat)
    found, verdict = evidence.ledger(state)
    assert (found.state, verdict) == (State.NOT_OK, None)
    assert "may not be entered" in found.detail
    assert "root" in (found.remedy or "")
    assert {evidence.signing_key(state).state, evidence.clock(state).state} == {State.NOT_CHECKED}


def test_a_clock_behind_the_ledger_is_not_ok(state: Path) -> None:
    assert evidence.clock(state).state is State.OK
    assert evidence.clock(state, now=lambda: 1_600_000_000.0).state is State.NOT_OK


def test_a_model_with_a_changed_file_or_a_pickle_is_not_ok(tmp_path: Path) -> None:
    assert evidence.model(MODEL)[0].state is State.OK
    assert evidence.model(tmp_path)[0].state is State.NOT_OK
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (folder / "weights.pt").touch()
    assert "weights.pt" in evidence.model(folder)[0].detail
    (folder / "weights.pt").unlink()
    with (folder / "tokenizer_config.json").open("a") as file:
        file.write("\n")
    assert "tokenizer_config.json" in evidence.model(folder)[0].detail


def test_a_key_that_others_can_read_and_a_changed_ledger_are_not_ok(state: Path) -> None:
    assert evidence.signing_key(state).state is State.OK
    (state / "ledger.key").chmod(0o644)
    assert "0644" in evidence.signing_key(state).detail
    subprocess.run(
        [sys.executable, "-c", f"import sqlite3; c = sqlite3.connect({str(state / 'ledger.db')!r}); "
         "c.execute('drop trigger if exists x'); c.execute('delete from receipts where seq = 2'); c.commit()"],
        check=True,
    )  # fmt: skip
    found, verdict = evidence.ledger(state)
    assert found.state is State.NOT_OK
    assert verdict is not None
    assert not verdict.is_intact


def test_doctor_ends_with_1_and_prints_remedies_and_json(state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (state / "ledger.key").chmod(0o640)
    assert run(["doctor", "--state-dir", str(state), "--model", str(MODEL), "--device", "cpu"]) == 1
    out, err = capfd.readouterr()
    assert "NOT OK   signatures" in out
    assert out.count("remedy: ") == out.count("NOT OK")
    assert err.startswith("error[doctor_failed]: ")
    assert run(["doctor", "--state-dir", str(state), "--json"]) == 1
    findings = json.loads(capfd.readouterr().out)
    assert [finding["name"] for finding in findings][:3] == ["isolation", "network filter", "rights"]
    assert all(finding["remedy"] for finding in findings if finding["state"] == "not ok")


def test_an_attestation_is_good_for_us_for_the_standard_library_and_for_openssl(
    state: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, public = tmp_path / "attestation.json", state / "ledger.pub"
    assert run(["attest", "write", str(out), "--state-dir", str(state), "--model", str(MODEL)]) == 0
    assert run(["attest", "verify", str(out), "--key", str(public)]) == 0
    assert "Signature good" in capfd.readouterr().out
    statement, _ = read_attestation(out)
    assert statement["ledger"]["last"] == 3
    assert statement["model"]["sha256"]["config.json"]
    assert statement["settings"]["values"]["port"] == 8000
    names = {finding["name"] for finding in statement["findings"]}
    assert {name for control in CONTROLS for name in control.findings} <= names
    states = {finding["name"]: finding["state"] for finding in statement["findings"]}
    for control in statement["controls"]:
        assert control["state"] != "ok" or all(states[name] == "ok" for name in control["findings"])
    assert "validated" not in json.dumps(statement)
    script = [sys.executable, str(ROOT / "deploy/verify_attestation.py"), str(out)]
    alone = subprocess.run(
        [*script, "--key", str(public), "--parts", str(tmp_path / "parts")], capture_output=True, text=True, check=True
    )
    assert json.loads(alone.stdout) == statement
    command = "openssl pkeyutl -verify -pubin -inkey key.pem -rawin -in statement -sigfile signature"
    assert subprocess.run(command.split(), cwd=tmp_path / "parts", capture_output=True, check=False).returncode == 0


def test_an_attestation_of_an_installation_holds_its_bill_of_materials(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The bundle puts it into share/ beside the version's Python (deploy/install/unpack.py)."""
    out, bill = tmp_path / "attestation.json", tmp_path / "version/share/sbom.cdx.json"
    bill.parent.mkdir(parents=True)
    bill.write_text('{"bomFormat":"CycloneDX","name":"Ünit"}\n', encoding="utf-8")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "version"))
    assert run(["attest", "write", str(out), "--state-dir", str(state)]) == 0
    assert run(["attest", "verify", str(out)]) == 0
    digest = hashlib.sha256(bill.read_bytes()).hexdigest()
    assert f"{bill}, SHA-256 {digest}" in capfd.readouterr().out
    statement, _ = read_attestation(out)
    assert statement["sbom"] == {"path": str(bill), "sha256": digest, "text": bill.read_text(encoding="utf-8")}
    assert next(control["state"] for control in statement["controls"] if control["control"].endswith("CM-8")) == "ok"
    script = [sys.executable, str(ROOT / "deploy/verify_attestation.py"), str(out), "--parts", str(tmp_path / "parts")]
    told = json.loads(subprocess.run(script, capture_output=True, text=True, check=True).stdout)
    assert told["sbom"]["text"] == f"{len(bill.read_text(encoding='utf-8'))} characters"
    assert (tmp_path / "parts/sbom.cdx.json").read_bytes() == bill.read_bytes()


def test_a_changed_attestation_or_another_key_is_refused_by_both(state: Path, tmp_path: Path) -> None:
    out = tmp_path / "attestation.json"
    assert run(["attest", "write", str(out), "--state-dir", str(state)]) == 0
    Ledger(tmp_path / "other").close()
    script = [sys.executable, str(ROOT / "deploy/verify_attestation.py"), str(out)]
    other = str(tmp_path / "other/ledger.pub")
    assert run(["attest", "verify", str(out), "--key", other]) == 1
    assert subprocess.run([*script, "--key", other], capture_output=True, check=False).returncode == 1
    found = json.loads(out.read_text())
    statement = base64.b64decode(found["statement"]).replace(b'"ok"', b'"OK"')
    out.write_text(json.dumps({**found, "statement": base64.b64encode(statement).decode()}))
    with pytest.raises(AttestationError, match="changed"):
        read_attestation(out)
    assert subprocess.run(script, capture_output=True, check=False).returncode == 1
    deep = '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}"
    for text in ("{}", "[]", "x", json.dumps({**found, "public_key": "AA=="}), deep):
        out.write_text(text)
        with pytest.raises(AttestationError):
            read_attestation(out)
        result = subprocess.run(script, capture_output=True, check=False, text=True)
        assert (result.returncode, "Traceback" in result.stderr) == (1, False)


def test_values_of_secrets_are_not_in_the_statement() -> None:
    shown = hide_secrets({"admin_password": "x", "api_key": "y", "ledger_prompt_key": "/k.pub", "tls_passphrase": None})
    hidden = "(not shown)"
    assert shown == {
        "admin_password": hidden,
        "api_key": hidden,
        "ledger_prompt_key": "/k.pub",
        "tls_passphrase": None,
    }
