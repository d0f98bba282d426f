"""`vashista ledger show`: one request's receipt, and what it asked if that was kept and the key is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from vashista.engine.errors import LedgerDamagedError, LedgerOptionError
from vashista.server.commands.ledger import file_option, ledger_path, state_options
from vashista.server.ledger.reader import find, reading
from vashista.server.ledger.sealing import box_hash, load_opener, unseal


@click.command(
    "show",
    epilog="\b\nExamples:\n  vashista ledger show 5f2b8c1d9e7a4f60\n"
    "  vashista ledger show 4096\n  vashista ledger show 5f2b8c1d9e7a4f60 --key auditor/prompts.key\n",
)
@click.argument("request", metavar="ID")
@click.option("--key", type=click.Path(path_type=Path), help="Private key in PEM that opens sealed prompts.")
@file_option
@state_options
def show_receipt(request: str, key: Path | None, file: Path | None, config: Path | None, **flags: object) -> None:
    """Print the receipt of the request ID, the x-request-id of its reply, or of the receipt with that number.

    With --key the body of the request is printed too, if the server kept it (ledger_prompts = encrypted). The chain is
    not checked: `vashista ledger verify` does that.
    """
    opener = None if key is None else load_opener(key)
    path = ledger_path(file, config, flags)
    with reading(path) as connection:
        found = find(connection, request)
    if not found:
        raise LedgerOptionError(f"{path} has no receipt of the request {request!r}.")
    for seq, body, box in found:
        click.echo(json.dumps(_shown(seq, body, box, opener), indent=2, ensure_ascii=False))


def _shown(seq: int, body: bytes, box: bytes | None, opener: X25519PrivateKey | None) -> dict[str, Any]:
    receipt = json.loads(body)
    shown = {"seq": seq, "receipt": receipt}
    kept = receipt["prompt_hash"]
    if box is not None and box_hash(box) != kept:
        raise LedgerDamagedError(f"The sealed prompt of receipt {seq} is not the one that the receipt names.")
    if box is None and kept is not None:
        raise LedgerDamagedError(f"The sealed prompt of receipt {seq} is missing.")
    if opener is None:
        return shown
    if box is None:
        raise LedgerOptionError(f"The prompt of receipt {seq} was not kept, so that --key has nothing to open.")
    return {**shown, "request": json.loads(unseal(box, opener))}
