"""`vashista bundle build|key|sign`: what a release needs on the connected machine.

The builder is `deploy/bundle/build.py` of a checkout, since a bundle holds what a checkout holds: scripts, units,
locks, sources of the image. This file finds it, gives it the settings file and the signer, and hands its words on.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import click

from vashista.server.bundle_keys import fingerprint, load_keys, make_keys
from vashista.server.bundle_keys import sign as sign_text
from vashista.server.settings_table import settings_file

BUILDER = Path("deploy/bundle/build.py")
FOLDER = click.Path(path_type=Path, file_okay=False)
EXISTING = click.Path(path_type=Path, exists=True)
SIGN = "from vashista.server.cli import main; main()"
MODELS = Path("/srv/vashista/models")
"""Where setup.sh puts the models of a bundle."""


def find_checkout(start: Path) -> Path:
    """The checkout that holds `start`, or the one that this package runs from. ClickException."""
    for place in (*start.resolve().parents, *Path(__file__).resolve().parents):
        if (place / BUILDER).is_file() and (place / "pyproject.toml").is_file():
            return place
    raise click.ClickException("Bundles are built from a checkout of Vashista: run this within one.")


@click.command(
    "build",
    epilog="\b\nExamples:\n  vashista bundle build --key keys --model deploy/models/reference-26m\n"
    "  vashista bundle build --variant cuda --key keys --model /srv/models/llama --parts 4G\n"
    "  vashista bundle build --key keys --base dist/vashista-0.1.0-cpu.tar\n"
    "  vashista bundle build --signatures vashista-0.1.0-cpu.tar --model deploy/models/reference-26m --out rebuilt\n",
)
@click.option("--variant", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Lock to use.")
@click.option("--key", type=FOLDER, help="Folder of the signing keys, as `vashista bundle key` made it.")
@click.option("--sign", metavar="COMMAND", help="Signs instead: gets the manifest and a folder for the signatures.")
@click.option("--signatures", type=EXISTING, help="Bundle of the same content whose signatures are taken over.")
@click.option("--manifest-only", is_flag=True, help="Write the text to sign elsewhere, and no bundle.")
@click.option(
    "--model", "models", type=EXISTING, multiple=True, help="Model folder to take along; the first is served."
)
@click.option("--out", type=FOLDER, default=Path("dist"), show_default=True, help="Folder for the bundle.")
@click.option("--parts", metavar="SIZE", help="Cut into parts of this size, such as 700M, for small media.")
@click.option("--base", type=EXISTING, help="Installed bundle, or its MANIFEST: build a delta with the product alone.")
@click.option("--wheels", type=FOLDER, help="Folder of wheels; what it lacks of the lock is downloaded into it.")
@click.option("--packages", type=FOLDER, help="Folder of Debian packages, likewise.")
@click.option("--product", type=EXISTING, help="Wheel of Vashista, instead of one built from the checkout.")
@click.option("--image", type=EXISTING, help="Image that docker/build.py wrote, to take along.")
@click.option("--kernel-cache", type=EXISTING, help="Kernels that Triton has compiled, to take along.")
@click.pass_obj
def build(
    environ: Mapping[str, str] | None,
    /,
    *,
    models: tuple[Path, ...],
    key: Path | None,
    sign: str | None,
    manifest_only: bool,
    **options: object,
) -> None:
    """Write one signed .tar with everything that a machine without internet needs.

    Runs on a connected machine, in a checkout, with Python 3.11, gcc and, for the Debian packages, Debian 12. The same
    checkout gives the same bytes, but for the ML-DSA signature, which --signatures takes over.
    """
    given = [name for name, value in (("--key", key), ("--sign", sign), ("--signatures", options["signatures"]),
                                      ("--manifest-only", manifest_only)) if value]  # fmt: skip
    if len(given) != 1:
        raise click.UsageError(
            f"Give one of --key, --sign, --signatures and --manifest-only; given: {', '.join(given) or 'none'}."
        )
    if key is not None:
        load_keys(key)  # before anything is fetched and built, which takes minutes
        sign = shlex.join([sys.executable, "-P", "-c", SIGN, "bundle", "sign", "--key", str(key.resolve())])
    checkout = find_checkout(Path.cwd() / "x")
    arguments = [str(options.pop("variant"))]
    arguments += ["--manifest-only"] if manifest_only else []
    for name, value in {**options, "sign": sign}.items():
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    for model in models:
        arguments += ["--model", str(model)]
    values = {"model": str(MODELS / models[0].resolve().name)} if models else {}
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder, "vashista.toml")
        settings.write_text(settings_file({**values, "state_dir": "/var/lib/vashista"}), encoding="utf-8")
        command = [sys.executable, "-P", str(checkout / BUILDER), *arguments, "--settings", str(settings)]
        # Not ours, which keeps every library offline: the builder fetches, maybe through a proxy.
        status = subprocess.run(command, env=environ, check=False).returncode
    if status:
        raise click.exceptions.Exit(status)


@click.command("key", epilog="\b\nExample:\n  vashista bundle key keys\n")
@click.argument("folder", type=FOLDER)
def key(folder: Path) -> None:
    """Make the keys that sign bundles in FOLDER: ECDSA P-384 and ML-DSA-87. Keep ecdsa.key and mldsa.key secret."""
    made = make_keys(folder)
    click.echo(f"Made the keys in {folder}. The fingerprint to tell operators another way than with the bundle:")
    click.echo(made)


@click.command("sign", epilog="\b\nExample:\n  vashista bundle sign --key keys vashista-0.1.0-cpu.MANIFEST signature\n")
@click.option("--key", "keys", type=FOLDER, required=True, help="Folder of the signing keys.")
@click.argument("manifest", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("out", type=FOLDER)
def sign(keys: Path, manifest: Path, out: Path) -> None:
    """Sign MANIFEST, as `vashista bundle build --manifest-only` wrote it, into the folder OUT for --signatures."""
    sign_text(manifest.read_bytes(), keys, out)
    click.echo(f"Signed {manifest} with the key {fingerprint(out)}.")
