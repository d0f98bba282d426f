"""`vashista predict`: what a request would take, on a running server or on an idle machine that need not run.

With --url the server answers, from its queue as it stands. Without, the model's folder does: the step times are those
that a server learnt with this model (`predictions.json` in the state folder), or else those that `vashista calibrate`
measured (the support profile), and nobody else is in the engine.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from vashista.engine.errors import ERRORS, InvalidKeyError, MeasurementError, UnexpectedReplyError, VashistaError
from vashista.engine.predict.prediction import Interval, Prediction
from vashista.server.commands.lazy import SectionedCommand, SectionedOption
from vashista.server.commands.options import given, setting_options
from vashista.server.loadgen.client import OpenAIClient
from vashista.server.loadgen.connection import ConnectionPool, Endpoint
from vashista.server.settings import Settings, load_settings

OFFLINE_SETTINGS = [
    *("state_dir", "support_profile", "dtype", "max_context", "page_size", "max_running_requests", "max_batch_tokens"),
    *("dense_below", "price_per_machine_hour", "price_per_kwh", "price_per_request", "currency", "power_w"),
]
_Command = TypeVar("_Command", bound=Callable[..., object] | click.Command)
EPILOG = """\b
Examples:
  vashista predict --url http://127.0.0.1:8000 --prompt-tokens 4000 --max-tokens 200
  vashista predict --url http://127.0.0.1:8000 --prompt "It was a dark night" --max-tokens 64
  vashista predict --model deploy/models/reference-26m --prompt-tokens 4000 --max-tokens 200
  vashista predict --model deploy/models/reference-26m --prompt-tokens 12000 --max-tokens 200 --token-budget 512 --json
"""


def _option(*names: str, section: str = "Request", **attributes: Any) -> Callable[[_Command], _Command]:
    return click.option(*names, cls=SectionedOption, section=section, **attributes)


@click.command("predict", cls=SectionedCommand, epilog=EPILOG)
@_option("--prompt", help="Text of the prompt; only with --url.")
@_option("--prompt-tokens", type=click.IntRange(min=1), help="Tokens of the prompt, instead of its text.")
@_option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens to generate.")
@_option("--choices", type=click.IntRange(min=1), default=1, show_default=True, help="Choices, `n` of the protocol.")
@_option("--dense", is_flag=True, help="Attend to everything, whatever the server's default is.")
@_option("--token-budget", type=click.IntRange(min=96), help="Sparse: tokens that each KV head keeps.")
@_option(
    "--max-dropped-mass", type=click.FloatRange(0.001, 1, max_open=True), help="Sparse: mass that may be left out."
)
@_option("--url", section="Server", help="Ask this server.")
@_option("--uds", section="Server", metavar="PATH", help="Connect to this Unix socket instead of the URL's host.")
@_option("--ca-file", section="Server", metavar="PATH", help="Certificate authority of an https server.")
@_option("--api-key", section="Server", envvar="OPENAI_API_KEY", show_envvar=True, help="Sent as a bearer token.")
@_option("--model", section="Without a server", metavar="PATH", help="Folder of the model, on a machine with no load.")
@_option("--device-name", section="Without a server", help="Of the support profile's devices; default: the only one.")
@_option("--json", "as_json", section="Report", is_flag=True, help="Print the reply of /v1/predict as JSON.")
@setting_options(OFFLINE_SETTINGS)
def predict(
    *, url: str | None, model: str | None, as_json: bool, device_name: str | None, config: Path | None, **options: Any
) -> None:
    """Say what a request would take, without running it.

    Give --url for a running server and its queue, or --model for an idle machine.
    """
    flags = {name: options.pop(name) for name in OFFLINE_SETTINGS}
    if (url is None) == (model is None):
        raise click.UsageError("Give either --url or --model.")
    if (options["prompt"] is None) == (options["prompt_tokens"] is None):
        raise click.UsageError("Give either --prompt or --prompt-tokens.")
    attention = _attention(options)
    if url is not None:
        status, reply = asyncio.run(_ask(url, options, attention))
        if status != 200 or not isinstance(reply, dict):
            raise _refusal(url, status, reply)
        admission, prediction = reply["admission"], msgspec.convert(reply["prediction"], Prediction | None)
    else:
        if options["prompt"] is not None:
            raise click.UsageError("--prompt needs a server; without one give --prompt-tokens.")
        settings = load_settings({**given(flags), "model": model}, os.environ, config=config)
        admission, prediction = None, _offline(settings, options, attention, device_name)
    if as_json:
        body = {"admission": admission, "prediction": prediction}
        click.echo(msgspec.json.format(msgspec.json.encode(body)).decode())
        return
    click.echo(prediction_text(prediction) if prediction is not None else "The engine does not say what steps take.")
    if admission is not None:
        click.echo(_admission_text(admission))


def prediction_text(prediction: Prediction) -> str:
    """For people: a line for each quantity."""
    rows = [
        ("first token", prediction.ttft_s, "s"),
        ("time per token", prediction.time_per_token_s, "s"),
        (f"total for {prediction.num_tokens} tokens", prediction.total_s, "s"),
        ("busy time", prediction.busy_s, "s"),
        ("energy", prediction.energy_j, "J"),
        ("price", prediction.money, prediction.currency or ""),
    ]
    lines = [f"{'':24}{'median':>12}{f'{prediction.coverage:.0%} of outcomes between':>32}"]
    lines += [_row(name, interval, unit) for name, interval, unit in rows if interval is not None]
    support, queue = prediction.support, prediction.queue
    mass = "unknown" if support.dropped_mass is None else f"{support.dropped_mass:.3f}"
    cached = f"{prediction.num_cached_tokens} of {prediction.num_prompt_tokens} prompt tokens cached"
    waiting = f"{queue.num_waiting} waiting with {queue.num_waiting_tokens} prompt tokens"
    lines += [
        f"{'support':24}{support.tokens_attended:.0f} of {support.tokens_visible:.0f} tokens a head, "
        f"{support.dense_share:.0%} of head-steps dense, expected dropped mass {mass}",
        f"{'KV pages':24}{prediction.kv_pages}; {cached}",
        f"{'queue ahead':24}{queue.num_running} running, {waiting}",
    ]
    if prediction.num_outcomes < 20:
        lines.append(f"The intervals are guesses: only {prediction.num_outcomes} outcomes are known yet.")
    return "\n".join(lines)


def _row(name: str, interval: Interval, unit: str) -> str:
    return f"{name:24}{interval.median:>12.4g}{interval.lower:>14.4g} and {interval.upper:<.4g} {unit}"


def _admission_text(admission: dict[str, Any]) -> str:
    if admission["would_admit"]:
        return f"{'admission':24}would let it in now"
    again = admission["retry_after_s"]
    hint = "" if again is None else f" Try again in {again:.0f} s."
    return f"{'admission':24}would refuse it: {admission['error']['message']}{hint}"


def _attention(options: dict[str, Any]) -> dict[str, Any] | None:
    asked = {name: options.pop(name) for name in ("dense", "token_budget", "max_dropped_mass")}
    if sum(bool(value) for value in asked.values()) > 1:
        raise click.UsageError("Give one of --dense, --token-budget and --max-dropped-mass.")
    if asked["dense"]:
        return {"mode": "dense"}
    limits = {name: value for name, value in asked.items() if value}
    return limits or None


async def _ask(url: str, options: dict[str, Any], attention: dict[str, Any] | None) -> tuple[int, Any]:
    endpoint = Endpoint.parse(url, uds=options["uds"], ca_file=options["ca_file"])
    pool = ConnectionPool(endpoint, api_key=options["api_key"])
    client = OpenAIClient(pool, timeout_s=60.0)
    body: dict[str, Any] = {"max_tokens": options["max_tokens"], "n": options["choices"]}
    if attention is not None:
        body["vashista"] = {"attention": attention}
    try:
        if options["prompt"] is None:
            body["prompt_tokens"] = options["prompt_tokens"]
        else:
            from vashista.server.loadgen.target import find_model

            body |= {"prompt": options["prompt"], "model": await find_model(client, None)}
        return await client.fetch("POST", "/v1/predict", body)
    finally:
        pool.close()


def _refusal(url: str, status: int, reply: Any) -> VashistaError:
    """What the server's answer means for who gave the command: its own error, with that error's remedy."""
    from vashista.server.request_stream import error_from_engine

    error = reply.get("error") if isinstance(reply, dict) else None
    said = error if isinstance(error, dict) else {}
    if status in {401, 403}:
        return InvalidKeyError(f"the server at {url} refuses the API key (status {status}); give one with --api-key")
    if said.get("code") in ERRORS:
        return error_from_engine(said["code"], f"the server at {url}: {said.get('message')}")
    reason = said.get("message", "no reason that this program understands")
    return UnexpectedReplyError(f"POST /v1/predict of {url} answers status {status}: {reason}")


def _offline(
    settings: Settings, options: dict[str, Any], attention: dict[str, Any] | None, device_name: str | None
) -> Prediction:
    from vashista.server.offline_prediction import IdleMachine

    limits = {name: value for name, value in (attention or {}).items() if name != "mode"}
    machine = IdleMachine.of(settings, device_name)
    num_tokens = options["prompt_tokens"] + options["max_tokens"]
    if num_tokens > machine.max_context:
        raise MeasurementError(
            f"{options['prompt_tokens']} prompt tokens and {options['max_tokens']} to generate are {num_tokens}; the "
            f"context of this model is {machine.max_context}."
        )
    return machine.predict(options["prompt_tokens"], options["max_tokens"], options["choices"], limits)
