"""The command `vashista`: its list of commands, and how errors end it.

The commands themselves are in `server/commands/`, one file each, imported when used. A `VashistaError` is printed as
`error[code]: message` with its remedy on stderr; the exit status is 2 for a wrong command line or setting, 1 for any
other error, 130 after Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

import click

from vashista.engine.errors import SettingsError, VashistaError
from vashista.engine.offline import go_offline
from vashista.server.commands.lazy import Lazy, LazyGroup

COMMANDS = "vashista.server.commands"

EPILOG = """\b
Examples:
  vashista serve --model deploy/models/reference-26m
  vashista complete deploy/models/reference-26m "It was a dark and stormy night"
  vashista models list /srv/models
  vashista keys create alice
  vashista COMMAND --help
"""

models = LazyGroup(
    "models",
    help="Look at model folders; pack, import, verify and remove signed models.",
    lazy={
        "list": Lazy(f"{COMMANDS}.models", "list_models", "List the model folders under a directory."),
        "inspect": Lazy(f"{COMMANDS}.models", "inspect", "Show what a model is and the memory it needs."),
        "pack": Lazy(f"{COMMANDS}.models_signed", "pack_model", "Sign a model folder and write it to one file."),
        "import": Lazy(f"{COMMANDS}.models_signed", "import_model", "Check a packed model and install it."),
        "verify": Lazy(f"{COMMANDS}.models_signed", "verify_model", "Read every byte of a signed model and check it."),
        "remove": Lazy(f"{COMMANDS}.models_signed", "remove_model", "Delete an installed model that nobody serves."),
    },
    epilog="\b\nExamples:\n  vashista models list /srv/models\n  vashista models inspect deploy/models/reference-26m\n",
)
keys = LazyGroup(
    "keys",
    help="Create, list, limit and revoke API keys. Once a key was made, every request but /health needs one.",
    lazy={
        "create": Lazy(f"{COMMANDS}.keys", "create", "Create a key and print it; it cannot be shown again."),
        "list": Lazy(f"{COMMANDS}.keys", "list_keys", "List all keys, without their secrets."),
        "limit": Lazy(
            f"{COMMANDS}.keys", "limit_key", "Limit a key's requests, tokens or money; a server obeys at once."
        ),
        "open": Lazy(f"{COMMANDS}.keys", "open_server", "Forget all keys, so that the server answers everyone again."),
        "revoke": Lazy(f"{COMMANDS}.keys", "revoke", "Revoke a key; a running server obeys within a second."),
    },
    epilog="\b\nExamples:\n  vashista keys create alice\n  vashista keys list\n  vashista keys revoke 4f0c2a9be1d7\n",
)
ledger = LazyGroup(
    "ledger",
    help="Check, sum up, export and prune the ledger of all requests.",
    lazy={
        "verify": Lazy(
            f"{COMMANDS}.ledger", "verify_ledger", "Check every receipt and signature; name the first damage."
        ),
        "report": Lazy(f"{COMMANDS}.ledger", "report_ledger", "Sum up by key, model, endpoint, day or month."),
        "export": Lazy(f"{COMMANDS}.ledger", "export_ledger", "Print receipts as JSON lines."),
        "prune": Lazy(f"{COMMANDS}.ledger", "prune_ledger", "Delete old receipts without breaking the chain."),
        "show": Lazy(f"{COMMANDS}.ledger_show", "show_receipt", "Print a request's receipt, and its prompt if kept."),
        "key": Lazy(f"{COMMANDS}.ledger", "ledger_key", "Print the fingerprint of the key that signs, or the key."),
    },
    epilog="\b\nExamples:\n  vashista ledger verify\n  vashista ledger report --by month --by key\n",
)
attest = LazyGroup(
    "attest",
    help="Sign what was found on this machine, for an auditor.",
    lazy={
        "write": Lazy(f"{COMMANDS}.attest", "write", "Look at this machine and write a signed statement."),
        "verify": Lazy(f"{COMMANDS}.attest", "verify", "Check a statement's signature and print what it says."),
    },
    epilog="\b\nExamples:\n  vashista attest write attestation.json\n  vashista attest verify attestation.json\n",
)
bundle = LazyGroup(
    "bundle",
    help="Build signed bundles for machines without internet.",
    lazy={
        "build": Lazy(f"{COMMANDS}.bundle", "build", "Write one signed file with all that an installation needs."),
        "key": Lazy(f"{COMMANDS}.bundle", "key", "Make the keys that sign bundles."),
        "sign": Lazy(f"{COMMANDS}.bundle", "sign", "Sign the manifest of a bundle, such as on a machine apart."),
    },
    epilog="\b\nExamples:\n  vashista bundle key keys\n"
    "  vashista bundle build --key keys --model deploy/models/reference-26m\n",
)
bench = LazyGroup(
    "bench",
    help="Measure a running server.",
    lazy={"serve": Lazy(f"{COMMANDS}.bench", "bench_serve", "Load an OpenAI-compatible server and report latencies.")},
)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
    lazy={
        "serve": Lazy(f"{COMMANDS}.serve", "serve", "Serve a model over the OpenAI protocol."),
        "complete": Lazy(f"{COMMANDS}.complete", "complete", "Complete one prompt in this process, without a server."),
        "predict": Lazy(f"{COMMANDS}.predict", "predict", "Say what a request would take, without running it."),
        "calibrate": Lazy(f"{COMMANDS}.calibrate", "calibrate", "Measure a model's attention and write its profile."),
        "diagnose": Lazy(f"{COMMANDS}.diagnose", "diagnose", "Check the theory of sparse attention on a model."),
        "doctor": Lazy(f"{COMMANDS}.doctor", "doctor", "Check this machine: isolation, ledger, model, clock, disk."),
        "selftest": Lazy(f"{COMMANDS}.selftest", "selftest", "Check that this installation computes what it should."),
        "version": Lazy(f"{COMMANDS}.version", "version", "Print the versions of Vashista, Python and torch."),
    },
)
def cli() -> None:
    """Vashista: an inference server for machines that never see the internet."""


cli.add_command(models)
cli.add_command(keys)
cli.add_command(ledger)
cli.add_command(attest)
cli.add_command(bundle)
cli.add_command(bench)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line (sys.argv unless given) and exit with its status."""
    environ = dict(os.environ)
    go_offline(os.environ)
    sys.exit(run(arguments, environ))


def run(arguments: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Run the command line and return its exit status; errors are printed on stderr.

    `environ` is the caller's, for the one command that runs on a connected machine and fetches: `bundle build`.
    """
    try:
        status = cli.main(args=arguments, prog_name="vashista", standalone_mode=False, obj=environ)
        if sys.stdout is not None:
            sys.stdout.flush()
    except VashistaError as error:
        click.echo(f"error[{error.code}]: {error.message}\n  remedy: {error.remedy}", err=True)
        return 2 if isinstance(error, SettingsError) else 1
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return 130
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # The reader of our output has gone, such as `head`, or its disk is full. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.ENOSPC:
            click.echo(f"The output cannot be written: {error.strerror}.", err=True)
        return 1
    return status if isinstance(status, int) else 0
