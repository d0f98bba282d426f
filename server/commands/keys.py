"""`vashista keys create|list|revoke`: the API keys in the state folder; `server/keys.py` holds them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click

from vashista.server.commands.options import given, setting_options
from vashista.server.keys import KeyStore
from vashista.server.settings import load_settings

state_options = setting_options(["state_dir"])


@contextmanager
def _store(config: Path | None, flags: dict[str, object]) -> Iterator[KeyStore]:
    settings = load_settings(given(flags), os.environ, config=config, defaults={"model": "."})
    store = KeyStore(settings.keys_path)
    try:
        yield store
    finally:
        store.close()


@click.command(
    "create", epilog="\b\nExamples:\n  vashista keys create alice\n  KEY=$(vashista keys create build-server)\n"
)
@click.argument("name")
@state_options
def create(name: str, config: Path | None, **flags: object) -> None:
    """Create a key for NAME, a person or program. The key goes to stdout, once: only its hash is stored."""
    with _store(config, flags) as store:
        key, secret = store.create(name)
    click.echo(secret)
    click.echo(f"Made the key {key.id} for {key.name}. Keep it now: it cannot be shown again.", err=True)


@click.command("list", epilog="\b\nExamples:\n  vashista keys list\n  vashista keys list --json\n")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@state_options
def list_keys(as_json: bool, config: Path | None, **flags: object) -> None:
    """List all keys, revoked ones too, oldest first."""
    with _store(config, flags) as store:
        keys = store.list()
    if as_json:
        click.echo(json.dumps([asdict(key) for key in keys], indent=2))
        return
    if not keys:
        click.echo("There are no keys: the server answers everyone. `vashista keys create NAME` makes one.")
        return
    click.echo(f"{'id':<13} {'created':<26} {'revoked':<26} name")
    for key in keys:
        click.echo(f"{key.id:<13} {key.created_at:<26} {key.revoked_at or '-':<26} {key.name}")


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
