"""docker/kubernetes.yaml: what it claims of rights and network; kubernetes-validate, where it is, judges its form."""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from vashista.server.settings import Settings, load_settings

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "docker/kubernetes.yaml"
OBJECTS: dict[tuple[str, str], Any] = {
    (part["kind"], part["metadata"]["name"]): part for part in yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))
}
POD = OBJECTS["Deployment", "vashista"]["spec"]["template"]
[CONTAINER] = POD["spec"]["containers"]
IMAGE = tomllib.loads((ROOT / "docker/image.toml").read_text(encoding="utf-8"))


@pytest.mark.skipif(importlib.util.find_spec("kubernetes_validate") is None, reason="kubernetes-validate is missing")
@pytest.mark.parametrize("version", ["1.25", "1.37"])
def test_the_schema_of_kubernetes_knows_every_field(version: str) -> None:
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", "-k", version, str(MANIFEST)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deployment/vashista" in done.stdout + done.stderr


def test_the_server_has_no_rights() -> None:
    """What the standard `restricted` of pod security asks for, and a root that cannot be written."""
    pod = POD["spec"]["securityContext"]
    assert pod["runAsNonRoot"] is True
    assert f"{pod['runAsUser']}:{pod['runAsGroup']}" == IMAGE["user"]
    assert pod["fsGroup"] == pod["runAsGroup"], "or it could not write its state"
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert POD["spec"]["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(POD["spec"])
    labels = OBJECTS["Namespace", "vashista"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_policies_let_the_lan_in_to_one_port_and_nothing_out() -> None:
    policies = [part["spec"] for (kind, _), part in OBJECTS.items() if kind == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies, "no rule: nothing is let through"
    assert not [policy for policy in policies if "egress" in policy], "rules of policies add up: one would open it"
    [rule] = [rule for policy in policies for rule in policy.get("ingress", [])]
    assert [list(peer) for peer in rule["from"]] == [["ipBlock"]]
    assert rule["ports"] == [{"protocol": "TCP", "port": CONTAINER["ports"][0]["containerPort"]}]
    [selector] = [policy["podSelector"] for policy in policies if "ingress" in policy]
    assert selector["matchLabels"].items() <= POD["metadata"]["labels"].items()
    assert all(
        part["metadata"].get("namespace") == "vashista" for (kind, _), part in OBJECTS.items() if kind != "Namespace"
    )


def settings() -> Settings:
    """Those that the container is started with."""
    values = {**IMAGE["environment"], **{entry["name"]: entry["value"] for entry in CONTAINER["env"]}}
    words = CONTAINER["args"]
    assert words[0] == "serve"
    flags = {name.removeprefix("--"): value for name, value in zip(words[1::2], words[2::2], strict=True)}
    return load_settings(flags, {name: value for name, value in values.items() if name.startswith("VASHISTA_")})


def test_the_server_takes_the_settings_and_lets_in_whom_the_policy_lets_in() -> None:
    found = settings()
    assert found.isolation == "lan"
    assert found.network_filter
    assert found.uds is None
    [lan] = [peer["ipBlock"]["cidr"] for peer in OBJECTS["NetworkPolicy", "lan"]["spec"]["ingress"][0]["from"]]
    assert found.client_networks is not None
    assert set(found.client_networks) == {ipaddress.ip_network(lan), ipaddress.ip_network("127.0.0.1/32")}
    assert found.port == CONTAINER["ports"][0]["containerPort"]
    assert POD["spec"]["enableServiceLinks"] is False, (
        "VASHISTA_PORT=tcp://… of the service would be taken for a setting"
    )


def test_what_is_written_lies_in_volumes_and_the_models_cannot_be_written() -> None:
    mounts = {mount["mountPath"]: mount for mount in CONTAINER["volumeMounts"]}
    assert {*IMAGE["volumes"], "/tmp"} <= set(mounts)
    assert mounts["/models"]["readOnly"] is True
    assert settings().model is not None
    assert str(settings().model).startswith("/models/")
    volumes = {volume["name"]: volume for volume in POD["spec"]["volumes"]}
    assert set(volumes) == {mount["name"] for mount in mounts.values()}
    claimed = {volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values()
               if "persistentVolumeClaim" in volume}  # fmt: skip
    assert claimed == {name for kind, name in OBJECTS if kind == "PersistentVolumeClaim"}


def test_the_probes_ask_from_within_and_are_those_of_the_image() -> None:
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        command = CONTAINER[name]["exec"]["command"]
        assert command[:3] == IMAGE["health"]["test"][1:], name
        assert command[3] == f"http://127.0.0.1:{settings().port}", name
    *_, path, key = CONTAINER["readinessProbe"]["exec"]["command"]
    assert path == "/ready", "/health is well before the model is loaded"
    assert key.startswith("/run/probe/")
    strategy = OBJECTS["Deployment", "vashista"]["spec"]
    assert (strategy["replicas"], strategy["strategy"]) == (1, {"type": "Recreate"}), "a state folder has one server"


def test_the_image_is_the_one_that_the_other_descriptions_run() -> None:
    images = {
        re.search(r"localhost/vashista:[^\s\"]+", (ROOT / "docker" / name).read_text())[0]  # type: ignore[index]
        for name in ("compose.yaml", "podman/vashista.service")
    }
    assert images == {CONTAINER["image"]}, json.dumps(sorted(images))
