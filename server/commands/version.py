"""`vashista version`: what is installed, for a support request. Imports none of it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

import click


@click.command("version", epilog="\b\nExample:\n  vashista version\n")
def version() -> None:
    """Print the versions of Vashista, Python, torch and triton, and the platform."""
    click.echo(f"vashista {version_of('vashista')}")
    click.echo(f"python   {platform.python_version()}")
    for name in ("torch", "triton"):
        try:
            click.echo(f"{name:<8} {version_of(name)}")
        except PackageNotFoundError:
            click.echo(f"{name:<8} not installed")
    click.echo(f"platform {platform.platform()}")
