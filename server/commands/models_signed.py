"""`vashista models pack|import|verify|remove`: signed models; `server/model_store/` does the work."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import click
from tqdm import tqdm

from vashista.engine.errors import ModelKeyError
from vashista.server.commands.options import given, setting_options
from vashista.server.model_store.folder import Report
from vashista.server.model_store.keys import TrustedKey, load_private, load_trusted
from vashista.server.model_store.packing import pack
from vashista.server.model_store.store import MODELS_DIR, check_installed, check_packed, install, remove
from vashista.server.settings import load_settings

models_dir_option = click.option(
    "--models-dir",
    type=click.Path(path_type=Path),
    default=MODELS_DIR,
    show_default=True,
    help="Folder of the installed models.",
)
trust_options = setting_options(["model_trust"])


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Report]:
    """A bar of bytes on a terminal."""
    with tqdm(unit="B", unit_scale=True, desc=what, disable=None, leave=False) as bar:
        yield bar.update


def _trusted(config: Path | None, flags: dict[str, object]) -> list[TrustedKey]:
    settings = load_settings(given(flags), os.environ, config=config, defaults={"model": "."})
    if settings.model_trust is None:
        raise ModelKeyError("No key to check models with is known: model_trust names none.")
    return load_trusted(settings.model_trust)


@click.command(
    "pack",
    epilog="\b\nExamples:\n  vashista models pack deploy/models/reference-26m --key signer.key\n"
    "  vashista models pack llama --key signer.key --as llama-3-8b --leave-out '*.bin' --out /media/llama.model.tar\n",
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), required=True, help="Private EC key in PEM that signs.")
@click.option("--out", type=click.Path(path_type=Path), help="The file to write; NAME.model.tar here unless given.")
@click.option("--as", "name", help="Name of the model; the folder's unless given.")
@click.option("--leave-out", multiple=True, metavar="PATTERN", help="Files to leave behind, as '*.bin'; repeatable.")
def pack_model(folder: Path, key: Path, out: Path | None, name: str | None, leave_out: tuple[str, ...]) -> None:
    """Sign the model in FOLDER and write it to one file, which any tar unpacks. The folder is not changed.

    Weights must be safetensors: pickle files, code, links and folders are refused by name unless they are left out.
    """
    private = load_private(key)
    name = name or folder.resolve().name
    out = out or Path(f"{name}.model.tar")
    with _progress("packing") as report:
        packed = pack(folder, out, private, name=name, leave_out=leave_out, report=report)
    for file in packed.left_out:
        click.echo(f"left out: {file}")
    click.echo(
        f"Wrote {out}: {packed.manifest.name}, {len(packed.manifest.files)} files, {packed.num_bytes} bytes.\n"
        f"root digest  {packed.manifest.root_digest}\nsigned by    {packed.manifest.signer}\n"
        "Tell the fingerprint of the key to whoever imports it, by another way than the file."
    )


@click.command(
    "import",
    epilog="\b\nExamples:\n  vashista models import /media/llama.model.tar --model-trust /etc/vashista/trust\n"
    "  vashista models import ./llama --as llama-test --models-dir /data/models\n",
)
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--as", "name", help="Name of its folder; the signed name unless given.")
@models_dir_option
@trust_options
def import_model(source: Path, name: str | None, models_dir: Path, config: Path | None, **flags: object) -> None:
    """Check SOURCE, a packed model or a folder with its model.sig, and install it, whole or not at all.

    Every byte is checked on its way; what is wrong is named, and nothing is left behind. A model that is installed
    already is checked again.
    """
    start_s = time.monotonic()
    with _progress("importing") as report:
        place, manifest, is_new = install(source, models_dir, _trusted(config, flags), name=name, report=report)
    state = "Installed" if is_new else "Already installed, and whole:"
    click.echo(
        f"{state} {place} in {time.monotonic() - start_s:.1f} s.\n"
        f"root digest  {manifest.root_digest}\nsigned by    {manifest.signer}"
    )


@click.command(
    "verify",
    epilog="\b\nExamples:\n  vashista models verify /media/llama.model.tar --model-trust signer.pem\n"
    "  vashista models verify llama-3-8b\n",
)
@click.argument("what")
@models_dir_option
@trust_options
def verify_model(what: str, models_dir: Path, config: Path | None, **flags: object) -> None:
    """Read every byte of WHAT, the path of a packed model or a folder, or the name of an installed model."""
    keys = _trusted(config, flags)
    path = Path(what)
    if not path.exists() and "/" not in what:
        path = models_dir / what
    with _progress("verifying") as report:
        manifest = (check_packed if path.is_file() else check_installed)(path, keys, report)
    click.echo(
        f"{path} is the model {manifest.name} that was signed: {len(manifest.files)} files.\n"
        f"root digest  {manifest.root_digest}\nsigned by    {manifest.signer}"
    )


@click.command("remove", epilog="\b\nExample:\n  vashista models remove llama-3-8b\n")
@click.argument("name")
@models_dir_option
def remove_model(name: str, models_dir: Path) -> None:
    """Delete the installed model NAME. Refused while a server serves it."""
    click.echo(f"Removed {remove(models_dir, name)}.")
