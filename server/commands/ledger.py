"""`vashista ledger verify|report|export|prune|key`: the ledger in the state folder, read beside a running server.

The work is in `server/ledger/`; this file checks options and prints.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import cast, get_args

import click
import msgspec

from vashista.engine.errors import LedgerMisdatedError, LedgerOptionError, LedgerVerificationError
from vashista.server.commands.options import given, setting_options
from vashista.server.ledger.prune import plan, prune
from vashista.server.ledger.reader import check_date, reading, rows
from vashista.server.ledger.receipt import utc_text
from vashista.server.ledger.report import Group, as_csv, as_json, as_table, report
from vashista.server.ledger.signing import PublicKey, expected_key, load_public
from vashista.server.ledger.store import DATABASE_NAME, PUBLIC_KEY_NAME
from vashista.server.ledger.verify import Verdict, verify
from vashista.server.settings import load_settings

CLOCK_SLACK_S = 86400.0
"""A receipt that is dated later than so much after now was written while the clock was wrong."""
state_options = setting_options(["state_dir"])
since_option = click.option("--since", metavar="DATE", help="Requests that arrived at this UTC date or later.")
until_option = click.option("--until", metavar="DATE", help="Requests that arrived before this UTC date.")
file_option = click.option(
    "--file",
    "file",
    type=click.Path(path_type=Path),
    help="Another ledger.db, such as a copy; no state folder is used.",
)


def _folder(config: Path | None, flags: dict[str, object]) -> Path:
    return load_settings(given(flags), os.environ, config=config, defaults={"model": "."}).state_dir


def ledger_path(file: Path | None, config: Path | None, flags: dict[str, object]) -> Path:
    """The database: the one that is given, or the state folder's."""
    return file if file is not None else _folder(config, flags) / DATABASE_NAME


def _span(since: str | None, until: str | None) -> dict[str, str | None]:
    return {
        "since": None if since is None else check_date(since, "--since"),
        "until": None if until is None else check_date(until, "--until"),
    }


@click.command(
    "verify",
    epilog="\b\nExamples:\n  vashista ledger verify\n  vashista ledger verify --key auditor/ledger.pub\n"
    "  vashista ledger verify --file copy/ledger.db --noted 4096:9f86d081884c7d65... --json\n",
)
@click.option("--key", type=click.Path(path_type=Path), help="Public key in PEM that must have signed it.")
@click.option("--noted", multiple=True, metavar="SEQ:HASH", help="A hash noted earlier that must still be there.")
@click.option("--json", "as_json_text", is_flag=True, help="Print JSON.")
@file_option
@state_options
def verify_ledger(
    key: Path | None,
    noted: tuple[str, ...],
    as_json_text: bool,
    file: Path | None,
    config: Path | None,
    **flags: object,
) -> None:
    """Check every receipt, hash and signature, and name the first damage.

    Without --key the ledger's own key is believed: give the one you keep elsewhere to find a ledger that was replaced
    as a whole, and --noted to find one that was set back to an older state.
    """
    path = ledger_path(file, config, flags)
    verdict = verify(path, key=expected_key(key), noted=dict(map(_noted, noted)))
    if as_json_text:
        click.echo(msgspec.json.format(msgspec.json.encode(verdict)).decode())
    elif verdict.damage is None:
        _print_verdict(verdict, is_key_given=key is not None)
    if verdict.damage is not None:
        damage = verdict.damage
        raise LedgerVerificationError(f"{path} is damaged ({damage.kind} at receipt {damage.seq}): {damage.message}")


def _print_verdict(verdict: Verdict, *, is_key_given: bool) -> None:
    span = f", {verdict.first} to {verdict.last}" if verdict.num_receipts else ""
    click.echo(f"Intact: {verdict.num_receipts} receipts{span}, {verdict.num_checkpoints} checkpoints.")
    click.echo(f"last       {verdict.last}:{verdict.hash}")
    click.echo(f"signed by  {verdict.fingerprint}")
    if not is_key_given:
        click.echo("No --key was given: compare the fingerprint with the one you noted.", err=True)


def _noted(text: str) -> tuple[int, str]:
    match = re.fullmatch(r"(\d{1,18}):([0-9a-fA-F]{64})", text)
    if match is None:
        raise LedgerOptionError(f"--noted is {text!r}: give SEQ:HASH as `vashista ledger verify` prints it.")
    return int(match[1]), match[2].lower()


@click.command(
    "report",
    epilog="\b\nExamples:\n  vashista ledger report --by month --by key\n"
    "  vashista ledger report --by day --since 2026-11 --format csv > november.csv\n",
)
@click.option(
    "--by",
    multiple=True,
    type=click.Choice(get_args(Group)),
    default=("key",),
    show_default=True,
    help="Group; repeat.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "json"]),
    default="table",
    show_default=True,
    help="Form of the output.",
)
@since_option
@until_option
@file_option
@state_options
def report_ledger(
    by: tuple[str, ...],
    form: str,
    since: str | None,
    until: str | None,
    file: Path | None,
    config: Path | None,
    **flags: object,
) -> None:
    """Sum up requests, tokens, seconds, energy and money by key, model, endpoint, day or month (UTC)."""
    groups = cast(tuple[Group, ...], tuple(dict.fromkeys(by)))
    with reading(ledger_path(file, config, flags)) as connection:
        lines = report((receipt for *_, receipt in rows(connection, **_span(since, until))), groups)
    write = {"table": as_table, "csv": as_csv, "json": as_json}[form]
    click.echo(write(lines, groups), nl=form != "csv")


@click.command(
    "export",
    epilog="\b\nExamples:\n  vashista ledger export > receipts.jsonl\n"
    "  vashista ledger export --since 2026-11-01 --until 2026-12-01 > november.jsonl\n",
)
@since_option
@until_option
@file_option
@state_options
def export_ledger(
    since: str | None, until: str | None, file: Path | None, config: Path | None, **flags: object
) -> None:
    """Print receipts as JSON lines: number, hash, and the receipt byte for byte as it was hashed."""
    out = sys.stdout.buffer
    sys.stdout.flush()
    with reading(ledger_path(file, config, flags)) as connection:
        for seq, body, end, _ in rows(connection, **_span(since, until)):
            out.write(b'{"seq":%d,"hash":"%s","receipt":%s}\n' % (seq, end.hex().encode(), body))
    out.flush()


@click.command(
    "prune",
    epilog="\b\nExamples:\n  vashista ledger prune --keep-days 365\n"
    "  vashista ledger prune --before 2026-01-01 --yes\n",
)
@click.option("--before", metavar="DATE", help="Delete the requests that arrived before this UTC date.")
@click.option("--keep-days", type=click.FloatRange(min=0), help="Delete those older than so many days.")
@click.option("--through", type=click.IntRange(min=1), metavar="SEQ", help="Delete the receipts up to this number.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@state_options
def prune_ledger(
    before: str | None, keep_days: float | None, through: int | None, yes: bool, config: Path | None, **flags: object
) -> None:
    """Delete old receipts for good; the chain goes on from a signed mark, and a server may run meanwhile.

    Copy ledger.db first, with `sqlite3 ledger.db ".backup copy.db"`, if you must keep evidence: deleted receipts can be
    checked only in a copy.
    """
    if sum(option is not None for option in (before, keep_days, through)) != 1:
        raise LedgerOptionError("Give exactly one of --before, --keep-days and --through.")
    if keep_days is not None:
        since_1970 = time.time() - keep_days * 86400
        if since_1970 < 0:
            raise LedgerOptionError(f"--keep-days is {keep_days:g}, which reaches back before 1970.")
        before = utc_text(since_1970)
    elif before is not None:
        before = check_date(before, "--before")
    folder = _folder(config, flags)
    planned = plan(folder / DATABASE_NAME, before=before, through=through, latest=utc_text(time.time() + CLOCK_SLACK_S))
    if planned.last_behind is not None:
        misdated = LedgerMisdatedError(
            f"Receipt {planned.last + 1} is dated {planned.next_time}, in the future: pruning stops before it. If the "
            f"clock was wrong then, `vashista ledger prune --through {planned.last_behind}` deletes it with the old "
            "receipts behind it."
        )
        if planned.num_receipts == 0:
            raise misdated
        click.echo(misdated.message, err=True)
    if planned.num_receipts == 0:
        click.echo("No receipt is that old; nothing was deleted.")
        return
    rest = f"the first that stays is of {planned.next_time}" if planned.next_time else "none stays"
    what = f"{planned.num_receipts} receipts, {planned.first} to {planned.last}; {rest}"
    if not yes:
        click.confirm(f"Delete {what}?", abort=True)
    prune(folder, planned)
    click.echo(f"Deleted {what}.")


@click.command("key", epilog="\b\nExamples:\n  vashista ledger key\n  vashista ledger key --pem > ledger.pub\n")
@click.option("--pem", is_flag=True, help="Print the public key itself, in PEM.")
@click.option("--json", "as_json_text", is_flag=True, help="Print JSON.")
@state_options
def ledger_key(pem: bool, as_json_text: bool, config: Path | None, **flags: object) -> None:
    """Print the fingerprint of the key that signs the ledger: note it where the server's users cannot write."""
    key: PublicKey = load_public(_folder(config, flags) / PUBLIC_KEY_NAME)
    if as_json_text:
        click.echo(json.dumps({"fingerprint": key.fingerprint, "pem": key.pem}, indent=2))
    else:
        click.echo(key.pem if pem else key.fingerprint, nl=not pem)
