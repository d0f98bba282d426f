"""`vashista doctor`: one screen on this machine, a line for each check; the checks are in `server/doctor/`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
import msgspec

from vashista.engine.errors import DoctorFailedError
from vashista.server.commands.options import given, setting_options
from vashista.server.doctor.examination import Examination, examine
from vashista.server.doctor.finding import State
from vashista.server.doctor.process import Process
from vashista.server.settings import Settings, load_settings

SETTINGS = [
    *("model", "device", "model_trust", "tls_certificate", "tls_key", "tls_client_ca", "state_dir", "isolation"),
]
ROW = "{:<8} {:<14} {}"
WORDS = {State.OK: "ok", State.NOT_OK: "NOT OK", State.NOT_CHECKED: "-"}
NO_MODEL = "(no model is set)"
pid_option = click.option(
    "--pid",
    type=click.IntRange(min=1),
    help="Process whose isolation and rights count, as the server's; else this one.",
)
EPILOG = """\b
Examples:
  vashista doctor --config /etc/vashista/vashista.toml
  vashista doctor --pid "$(systemctl show --property MainPID --value vashista)"
  podman exec vashista /usr/bin/python3.11 -P /usr/bin/vashista doctor

\b
Nothing is sent and nothing is changed. A line with `-` was not checked, and says why.
"""


@click.command("doctor", epilog=EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pid_option
@setting_options(SETTINGS)
def doctor(*, as_json: bool, pid: int | None, config: Path | None, **flags: Any) -> None:
    """Check isolation, rights, installation, model, GPU, kernels, clusters, ledger, signatures, clock, disk; exit
    status 1 when something is not ok.

    Isolation and rights are those of the process that runs this, unless --pid names the server's.
    """
    settings = settings_of(flags, config)
    found = examination_of(settings, pid)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found.findings), indent=1).decode())
    else:
        for finding in found.findings:
            click.echo(ROW.format(WORDS[finding.state], finding.name, finding.detail))
            if finding.remedy is not None:
                click.echo(ROW.format("", "", f"remedy: {finding.remedy}"))
    if found.failed:
        raise DoctorFailedError(f"{len(found.failed)} of {len(found.findings)} checks: {', '.join(found.failed)}.")


def settings_of(flags: dict[str, Any], config: Path | None) -> Settings:
    """Settings as the server reads them; a model need not be set."""
    return load_settings(given(flags), os.environ, config=config, defaults={"model": NO_MODEL})


def examination_of(settings: Settings, pid: int | None) -> Examination:
    """Everything, looked at once."""
    model = None if str(settings.model) == NO_MODEL else settings.model
    return examine(
        state_dir=settings.state_dir, model=model, device=settings.device, process=Process(pid), settings=settings
    )
