"""`vashista keys create|list|limit|open|revoke`: the API keys in the state folder; `server/keys.py` holds them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click

from vashista.server.commands.options import given, setting_options
from vashista.server.keys import Key, KeyStore, Role
from vashista.server.limits import Resource, limits_text, parse_limit
from vashista.server.settings import load_settings

state_options = setting_options(["state_dir"])


def _as_json(key: Key) -> dict[str, object]:
    limits = [{"resource": limit.resource, "window": limit.window, "amount": limit.amount} for limit in key.limits]
    return {**asdict(key), "roles": list(key.roles), "limits": limits}


@contextmanager
def _store(config: Path | None, flags: dict[str, object], *, is_for_reading: bool = False) -> Iterator[KeyStore]:
    path = load_settings(given(flags), os.environ, config=config, defaults={"model": "."}).keys_path
    is_medium_read_only = path.is_file() and not os.access(path.parent, os.W_OK | os.X_OK)
    store = KeyStore(path, is_read_only=is_for_reading and is_medium_read_only)
    try:
        yield store
    finally:
        store.close()


@click.command(
    "create",
    epilog="\b\nExamples:\n  vashista keys create alice\n  KEY=$(vashista keys create build-server)\n"
    "  vashista keys create prometheus --role metrics\n",
)
@click.argument("name")
@click.option(
    "--role",
    "roles",
    multiple=True,
    type=click.Choice([str(role) for role in Role]),
    default=[str(Role.INFER)],
    show_default=True,
    help="What it opens: completions (infer), /metrics (metrics), everything (admin); repeat for more.",
)
@state_options
def create(name: str, roles: tuple[str, ...], config: Path | None, **flags: object) -> None:
    """Create a key for NAME, a person or program. The key goes to stdout, once: only its hash is stored."""
    with _store(config, flags) as store:
        key, secret = store.create(name, map(Role, roles))
    click.echo(secret)
    click.echo(f"Made the key {key.id} for {key.name}. Keep it now: it cannot be shown again.", err=True)


@click.command("list", epilog="\b\nExamples:\n  vashista keys list\n  vashista keys list --json\n")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@state_options
def list_keys(as_json: bool, config: Path | None, **flags: object) -> None:
    """List all keys, revoked ones too, oldest first."""
    with _store(config, flags, is_for_reading=True) as store:
        keys, are_needed = store.list(), store.are_needed()
    if as_json:
        click.echo(json.dumps([_as_json(key) for key in keys], indent=2))
        return
    if not keys and are_needed:
        click.echo(
            "There are no keys, but there were: the server refuses everyone. `vashista keys create NAME` makes one, "
            "`vashista keys open` lets everyone in."
        )
        return
    if not keys:
        click.echo("There are no keys: the server answers everyone. `vashista keys create NAME` makes one.")
        return
    rows = [("id", "created", "revoked", "roles", "limits", "name")]
    for key in keys:
        roles, limits = ",".join(key.roles), limits_text(key.limits)
        rows.append((key.id, key.created_at, key.revoked_at or "-", roles, limits, key.name))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@click.command(
    "limit",
    epilog="\b\nExamples:\n  vashista keys limit 4f0c2a9be1d7 --requests 60/minute --tokens 1000000/day\n"
    "  vashista keys limit 4f0c2a9be1d7 --money 25.50/month\n  vashista keys limit 4f0c2a9be1d7 --tokens none/day\n",
)
@click.argument("key_id", metavar="ID")
@click.option("--requests", multiple=True, metavar="N/WINDOW", help="Admitted requests.")
@click.option("--tokens", multiple=True, metavar="N/WINDOW", help="Tokens of prompts and outputs.")
@click.option("--money", multiple=True, metavar="X/WINDOW", help="Money at the server's prices, in its currency.")
@state_options
def limit_key(
    key_id: str,
    requests: tuple[str, ...],
    tokens: tuple[str, ...],
    money: tuple[str, ...],
    config: Path | None,
    **flags: object,
) -> None:
    """Limit what the key ID may use in a minute, a day or a month (UTC); a running server obeys within a second.

    WINDOW is minute, day or month; `none` as the amount lifts a limit. Without options the limits are printed. What was
    used is counted from the ledger, also after a restart.
    """
    given_limits = {Resource.REQUESTS: requests, Resource.TOKENS: tokens, Resource.MONEY: money}
    changes = [(resource, *parse_limit(resource, text)) for resource, texts in given_limits.items() for text in texts]
    with _store(config, flags) as store:
        key = store.set_limits(key_id, changes)
    click.echo(f"{key.id} {key.name}: {limits_text(key.limits)}")


@click.command("revoke", epilog="\b\nExample:\n  vashista keys revoke 4f0c2a9be1d7\n")
@click.argument("key_id", metavar="ID")
@state_options
def revoke(key_id: str, config: Path | None, **flags: object) -> None:
    """Revoke the key ID for good; a running server obeys within a second.

    Revoking the last key does not open the server: it then refuses everyone until a new key is made.
    """
    with _store(config, flags) as store:
        key = store.revoke(key_id)
        remaining = sum(not other.is_revoked for other in store.list())
    click.echo(f"Revoked the key {key.id} of {key.name}.")
    if not remaining:
        click.echo("No live key is left: the server refuses every request until you make one.", err=True)


@click.command("open", epilog="\b\nExample:\n  vashista keys open\n")
@click.option("--yes", is_flag=True, help="Do not ask.")
@state_options
def open_server(yes: bool, config: Path | None, **flags: object) -> None:
    """Forget all keys and their limits, so that the server answers everyone who reaches it, within a second.

    Once a key was made, this alone opens the server again: neither revoking the last key nor losing keys.db does.
    """
    with _store(config, flags) as store:
        num_live = sum(not key.is_revoked for key in store.list())
        if not yes:
            click.confirm(f"Forget all keys, {num_live} of them live, and answer everyone?", abort=True)
        num_keys = store.open_to_all()
    click.echo(f"Forgot {num_keys} keys. The server answers everyone until `vashista keys create` makes one.")
