"""`vashista attest write|verify`: the signed statement of `server/doctor/attestation.py`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import click
import msgspec

from vashista.server.commands.doctor import examination_of, pid_option, settings_of
from vashista.server.commands.measuring import check_writable, write_whole
from vashista.server.commands.options import setting_options
from vashista.server.doctor.attestation import bill_of_materials, make_statement, read_attestation, sign
from vashista.server.doctor.evidence import SIGNING_KEY_NAME
from vashista.server.doctor.finding import State
from vashista.server.doctor.machine import settings_sources
from vashista.server.ledger.signing import expected_key, load_signing
from vashista.server.settings import Settings


@click.command(
    "write",
    epilog="\b\nExamples:\n  vashista attest write attestation.json --config /etc/vashista/vashista.toml\n"
    '  vashista attest write attestation.json --pid "$(systemctl show --property MainPID --value vashista)"\n',
)
@click.argument("out", type=click.Path(path_type=Path))
@pid_option
@setting_options(Settings.model_fields)
def write(out: Path, *, pid: int | None, config: Path | None, **flags: Any) -> None:
    """Look at this machine as `vashista doctor` does and write a statement to OUT, signed with the ledger's key.

    It holds the SBOM, the model's digests, the ledger's end, the settings in force, and which controls the findings
    speak to. What is not ok is in it too. Settings are read as `vashista serve` would: give the same flags.
    """
    settings = settings_of(flags, config)
    key = load_signing(settings.state_dir / SIGNING_KEY_NAME)
    check_writable(out)
    found = examination_of(settings, pid)
    sources = settings_sources(os.environ, config)
    statement = make_statement(found, settings, now_s=time.time(), bill=bill_of_materials(), sources=sources)
    write_whole(out, msgspec.json.format(msgspec.json.encode(sign(statement, key)), indent=1).decode() + "\n")
    click.echo(f"Wrote {out}, signed by {key.public.fingerprint}.")
    if found.failed:
        click.echo(f"Not ok, and so stated: {', '.join(found.failed)}.")


@click.command(
    "verify",
    epilog="\b\nExamples:\n  vashista attest verify attestation.json --key ledger.pub\n"
    "  vashista attest verify attestation.json --json\n",
)
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), help="Public key in PEM that must have signed it.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole statement.")
def verify(path: Path, key: Path | None, as_json: bool) -> None:
    """Check the signature of FILE and print what it says. Needs no state folder: run it anywhere."""
    statement, signer = read_attestation(path, expected_key(key))
    if as_json:
        click.echo(json.dumps(statement, indent=1, ensure_ascii=False))
        return
    click.echo(f"Signature good: {signer.fingerprint}")
    click.echo(f"time        {statement['time']}")
    bill = statement["sbom"]
    click.echo(f"sbom        {'none' if bill is None else bill['path'] + ', SHA-256 ' + bill['sha256']}")
    for finding in statement["findings"]:
        click.echo(f"{finding['state']:<11} {finding['name']}: {finding['detail']}")
    num_checked = sum(entry["state"] == State.OK for entry in statement["controls"])
    click.echo(f"{num_checked} of {len(statement['controls'])} parts of controls were looked at and as they should be.")
    if key is None:
        click.echo("No --key was given: compare the fingerprint with the one you noted.", err=True)
