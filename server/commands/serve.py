"""`vashista serve`: settings from flags, environment and file, then the server of `server/serve.py`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from vashista.server.commands.lazy import SectionedCommand
from vashista.server.commands.options import given, setting_options
from vashista.server.settings import Settings, load_settings

EPILOG = """\b
Every setting has three ways: the flag --max-context, the environment variable
VASHISTA_MAX_CONTEXT, and max_context in the TOML file; the first that is given
counts. Unknown settings are errors.

\b
Examples:
  vashista serve --model deploy/models/reference-26m
  vashista serve --model /srv/models/llama --host 0.0.0.0 --kv-cache-bytes 24GiB
  vashista serve --config /etc/vashista.toml --log-format json
  VASHISTA_PORT=8080 vashista serve --model deploy/models/reference-26m
"""


@click.command("serve", cls=SectionedCommand, epilog=EPILOG)
@setting_options(Settings.model_fields)
def serve(config: Path | None, **flags: object) -> int:
    """Serve a model over the OpenAI protocol until SIGTERM or Ctrl-C.

    The server prints its address and a ready-to-paste curl command once it can answer. The first SIGTERM lets accepted
    requests finish; a second one ends them.
    """
    settings = load_settings(given(flags), os.environ, config=config)
    # Imported late: a wrong setting is reported at once, without loading the web server.
    from vashista.server.serve import run

    return run(settings)
