"""`vashista complete`: one prompt through the engine in this process, streamed to stdout; no server is needed.

The text goes to stdout and nothing else does; the progress bar and the counts go to stderr. The engine is the same
class that the server runs in a process of its own.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import click
import msgspec
from tqdm import tqdm

from vashista.engine.config import EngineConfig
from vashista.engine.errors import ERRORS, ChatTemplateError, InternalError
from vashista.engine.messages import FinishReason, Submit, SupportReport, TokenEvent
from vashista.server.attention_mode import default_mode
from vashista.server.commands.lazy import SectionedCommand
from vashista.server.commands.options import given, setting_options
from vashista.server.commands.sampling import make_sampling, read_response_format, sampling_options
from vashista.server.settings import Settings, load_settings

MODE_SETTINGS = (
    "attention_mode", "token_budget", "max_dropped_mass", "min_token_budget", "max_allowed_dropped_mass",
)  # fmt: skip
"""Settings of the server that decide how a request attends, and within which limits."""
ENGINE_SETTINGS = [
    name
    for name in Settings.model_fields
    if name in MODE_SETTINGS or (name in EngineConfig.__struct_fields__ and name != "max_running_requests")
]
EPILOG = """\b
Examples:
  vashista complete deploy/models/reference-26m "It was a dark and stormy night" --seed 1
  vashista complete deploy/models/reference-26m --chat "What is the code of elephant?"
  vashista complete deploy/models/reference-26m - --temperature 0 < prompt.txt
  vashista complete deploy/models/reference-26m "A list: " --json-object --max-tokens 64
  vashista complete deploy/models/reference-26m - --attention-mode sparse --token-budget 512 < book.txt
"""


class InProcessEngine(Protocol):
    """What this command needs of `engine/engine.py`'s Engine."""

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""

    def submit(self, submit: Submit) -> None:
        """Queue a request."""

    def step(self) -> list[TokenEvent]:
        """Compute one batch."""

    def abort(self, request_id: str) -> None:
        """End a request."""


@dataclass
class Outcome:
    """What one completion took. Times are seconds."""

    num_prompt_tokens: int
    num_output_tokens: int = 0
    ttft_s: float | None = None
    total_s: float = 0.0
    finish_reason: FinishReason | None = None
    support: SupportReport | None = None

    def text(self) -> str:
        """One line for people."""
        parts = [f"prompt {self.num_prompt_tokens} tokens", f"output {self.num_output_tokens} tokens"]
        if self.ttft_s is not None:
            parts.append(f"first token after {self.ttft_s:.3f} s")
        if self.ttft_s is not None and self.num_output_tokens > 1:
            parts.append(f"then {(self.num_output_tokens - 1) / max(self.total_s - self.ttft_s, 1e-9):.1f} tokens/s")
        parts.append(f"finish: {self.finish_reason or 'interrupted'}")
        if self.support is not None:
            parts.append(self._support_text(self.support))
        return ", ".join(parts)

    def _support_text(self, support: SupportReport) -> str:
        """What a sparse completion left out."""
        text = f"attended to {support.tokens_attended:.0f} of {support.tokens_visible:.0f} tokens a head"
        if support.dropped_mass_estimate is not None:
            text += f"; dropped mass {support.dropped_mass_estimate:.3f} by estimate"
        if support.audit is not None:
            audit = support.audit
            text += f", {audit.dropped_mass:.3f} ({audit.dropped_mass_low:.3f} to {audit.dropped_mass_high:.3f}) by "
            text += f"{audit.num_audits} audits"
            if support.dense_share > 0:  # the estimate is a mean over all head-steps
                text += f" of the {1 - support.dense_share:.0%} of head-steps that were sparse"
        return text


@click.command("complete", cls=SectionedCommand, epilog=EPILOG)
@click.argument("model_dir", metavar="MODEL", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--chat", is_flag=True, help="PROMPT is a user's message, put into the model's chat template.")
@click.option("--system", metavar="TEXT", help="A system message before it; only with --chat.")
@click.option("--quiet", is_flag=True, help="Print neither progress nor counts on stderr.")
@sampling_options
@setting_options(ENGINE_SETTINGS)
def complete(
    *, model_dir: Path, prompt: str, chat: bool, system: str | None, quiet: bool, config: Path | None, **flags: Any
) -> int:
    """Complete PROMPT with the model in the folder MODEL; - reads the prompt from stdin.

    Flags and settings have the meaning they have on the server. The process loads the model, streams the text to
    stdout, prints what it took on stderr, and ends.
    """
    if system is not None and not chat:
        raise click.UsageError("--system needs --chat.")
    engine_flags = {name: flags.pop(name) for name in ENGINE_SETTINGS}
    settings = load_settings(
        {**given(engine_flags), "model": str(model_dir), "max_running_requests": 1}, os.environ, config=config
    )
    request = _make_submit(model_dir, _read_prompt(prompt), chat, system, flags)
    request = msgspec.structs.replace(request, attention=default_mode(settings))
    # Imported late: everything above is checked before torch, which takes seconds, comes in.
    from vashista.engine.engine import Engine

    with _ProgressBar(quiet) as progress:
        engine = Engine(settings.engine_config(), progress=progress.update)
    outcome = Outcome(len(request.prompt_token_ids))
    status = 0
    try:
        stream_completion(engine, request, _write, outcome)
    except KeyboardInterrupt:
        engine.abort(request.request_id)
        status = 130
    _write("\n")
    if not quiet:
        click.echo(outcome.text(), err=True)
    return status


def stream_completion(
    engine: InProcessEngine,
    submit: Submit,
    write: Callable[[str], None],
    outcome: Outcome,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run the request to its end, writing text as it becomes certain and keeping `outcome` up to date.

    Raises the request's error when the engine ends it with one.
    """
    started_s = clock()
    engine.submit(submit)
    while engine.has_work:
        for event in engine.step():
            outcome.total_s = clock() - started_s
            outcome.num_output_tokens += len(event.token_ids)
            if event.token_ids and outcome.ttft_s is None:
                outcome.ttft_s = outcome.total_s
            if event.text:
                write(event.text)
            if event.finish_reason is not None:
                outcome.finish_reason = event.finish_reason
                outcome.support = event.support
            if event.finish_reason is FinishReason.ERROR:
                error = ERRORS.get(event.error_code or "", InternalError)
                raise error(event.error_message or "The engine gave no reason.")


class _ProgressBar:
    """A bar of loaded bytes on stderr, when that is a terminal; shown only if loading takes a while."""

    def __init__(self, quiet: bool) -> None:
        self._bar: Any = tqdm(
            desc="Loading", unit="B", unit_scale=True, delay=0.5, leave=False, disable=True if quiet else None
        )

    def update(self, loaded_bytes: int, total_bytes: int) -> None:
        self._bar.total = total_bytes
        self._bar.update(loaded_bytes - self._bar.n)

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _read_prompt(prompt: str) -> str:
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"The prompt on stdin is not UTF-8: byte {error.start} is wrong.") from error


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _make_submit(model_dir: Path, prompt: str, chat: bool, system: str | None, flags: dict[str, Any]) -> Submit:
    from vashista.engine.chat_template import ChatTemplate
    from vashista.engine.grammar import compile_response_format
    from vashista.engine.model_config import load_model_config
    from vashista.engine.tokenizer import Tokenizer

    response_format = read_response_format(flags)
    model_config = load_model_config(model_dir)
    tokenizer = Tokenizer.load(model_dir, model_config.vocab_size)
    grammar = None if response_format is None else compile_response_format(response_format)
    sampling = make_sampling(flags, model_config.generation_defaults, model_config.vocab_size, grammar)
    if chat:
        template = ChatTemplate.load(model_dir)
        if template is None:
            raise ChatTemplateError(f"{model_dir} has no chat template: leave --chat out.")
        messages = [{"role": "system", "content": system}] if system is not None else []
        text = template.render([*messages, {"role": "user", "content": prompt}])
        prompt_token_ids = tokenizer.encode(text, add_special_tokens=False)
    else:
        prompt_token_ids = tokenizer.encode(prompt, add_special_tokens=True)
    return Submit("complete", prompt_token_ids, sampling, arrival_s=time.monotonic())
