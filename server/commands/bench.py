"""`vashista bench serve`: puts load on any OpenAI-compatible server and reports what a client sees.

Reads the options, makes a Plan for `server/loadgen/runner.py`, shows its progress on stderr, prints the table on stdout
and writes the JSON. Exit status: 0 when every request succeeded, 1 when any failed, 2 for wrong options.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from vashista.engine.errors import WorkloadError
from vashista.server.commands.lazy import SectionedCommand, SectionedOption
from vashista.server.loadgen.client import OpenAIClient, RequestShape
from vashista.server.loadgen.connection import ConnectionPool, Endpoint
from vashista.server.loadgen.lengths import LengthSpec
from vashista.server.loadgen.progress import ProgressBars
from vashista.server.loadgen.report import check_writable, format_results, write_json
from vashista.server.loadgen.runner import LoadPoint, Plan, PointResult, run_plan
from vashista.server.loadgen.statistics import Limits
from vashista.server.loadgen.target import TokenCounter, UsageCounter, find_model
from vashista.server.loadgen.workload import FittedText, JsonLines, RandomWords, TextFile, Workload, read_dataset

DEFAULT_NUM_REQUESTS = 50
DEFAULT_CONCURRENCY = "1,2,4,8"

_Command = TypeVar("_Command", bound=Callable[..., object] | click.Command)

EPILOG = """\b
Examples:
  vashista bench serve
      closed loop with 1, 2, 4 and 8 clients against http://127.0.0.1:8000
  vashista bench serve --concurrency 16 --duration 60 --input-len 100:2000 --output-len lognormal:200:0.7
      a minute of mixed lengths
  vashista bench serve --rate 0.5,1,2,4 --slo ttft=500ms,tpot=50ms --json sweep.json
      open loop: which arrival rate still meets the limits
  vashista bench serve --url http://10.0.0.5:8080 --endpoint chat --dataset questions.jsonl --output-len 256
      another server, your own prompts
  vashista bench serve --input-len 2048 --prefix-len 1536
      what the prefix cache is worth

\b
Words:
  TTFT  time to first token, from sending the request
  TPOT  time per output token: (E2E - TTFT) / (n - 1) of a request with n tokens
  ITL   gap between two chunks of a stream
  E2E   from sending to the end of the reply
In open loop each also runs "from arrival", the moment the plan wanted the request sent. Limits (--slo) are compared
with those, so that a client that falls behind never makes a server look better.
"""


def _option(section: str, *names: str, **attributes: Any) -> Callable[[_Command], _Command]:
    return click.option(*names, cls=SectionedOption, section=section, **attributes)


_SERVER, _LOAD, _LENGTHS, _REQUEST, _OUTPUT = "Server", "Load", "Prompts and lengths", "Requests", "Report"


@click.command("serve", cls=SectionedCommand, epilog=EPILOG)
@_option(_SERVER, "--url", default="http://127.0.0.1:8000", show_default=True, help="Base URL, without /v1.")
@_option(_SERVER, "--uds", metavar="PATH", help="Connect to this Unix socket instead of the URL's host.")
@_option(_SERVER, "--api-key", envvar="OPENAI_API_KEY", show_envvar=True, help="Sent as a bearer token.")
@_option(_SERVER, "--ca-file", metavar="PATH", help="Certificate authority of an https server.")
@_option(_SERVER, "--model", help="Model to ask for. Default: the only one the server has.")
@_option(_LOAD, "--concurrency", metavar="N,..", help=f"Closed loop. Clients. Default: {DEFAULT_CONCURRENCY}.")
@_option(_LOAD, "--rate", metavar="R,..", help="Open loop. Requests per second, Poisson arrivals.")
@_option(_LOAD, "--num-requests", type=int, help=f"Requests a load point. Default: {DEFAULT_NUM_REQUESTS}.")
@_option(_LOAD, "--duration", type=float, metavar="SECONDS", help="Send for so long. With both, what ends first.")
@_option(_LOAD, "--max-in-flight", type=int, help="Open loop: no more requests at once; the others wait here.")
@_option(_LOAD, "--warmup", type=int, default=2, show_default=True, help="Unmeasured requests before.")
@_option(_LENGTHS, "--input-len", metavar="LENGTH", help="Prompt tokens. Default: 128. Forms: see --output-len.")
@_option(
    _LENGTHS,
    "--output-len",
    metavar="LENGTH",
    default="128",
    show_default=True,
    help="N, MIN:MAX (uniform), lognormal:MEDIAN:SIGMA or lognormal:MEDIAN:SIGMA:MIN:MAX.",
)
@_option(_LENGTHS, "--dataset", metavar="FILE", help="A text, or .jsonl with prompt, text or messages a line.")
@_option(_LENGTHS, "--prefix-len", type=int, default=0, help="So many of the prompt tokens are shared by prompts.")
@_option(_LENGTHS, "--num-prefixes", type=int, default=1, show_default=True, help="Different shared prefixes.")
@_option(_LENGTHS, "--seed", type=int, help="Of prompts and arrivals. Default: a new one, so that no cache knows it.")
@_option(
    _REQUEST,
    "--endpoint",
    type=click.Choice(["completions", "chat"]),
    default="completions",
    show_default=True,
    help="Route to send requests to.",
)
@_option(_REQUEST, "--stream/--no-stream", default=True, show_default=True, help="TTFT, TPOT, ITL need streams.")
@_option(_REQUEST, "--ignore-eos/--stop-at-eos", default=True, show_default=True, help="Answers of full length.")
@_option(_REQUEST, "--usage/--no-usage", default=True, show_default=True, help="Ask for usage in streams.")
@_option(_REQUEST, "--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@_option(_REQUEST, "--extra-body", metavar="JSON", default="{}", help="Object merged into every request.")
@_option(_REQUEST, "--timeout", type=float, default=600.0, show_default=True, metavar="SECONDS", help="Of a request.")
@_option(_OUTPUT, "--slo", metavar="LIMITS", help="Goodput under limits: ttft=200ms,tpot=30ms,e2e=5s.")
@_option(_OUTPUT, "--json", "json_path", type=click.Path(path_type=Path), help="Write figures and all raw records.")
@_option(_OUTPUT, "--quiet", is_flag=True, help="No progress bar.")
@click.pass_context
def bench_serve(ctx: click.Context, /, json_path: Path | None, quiet: bool, **options: Any) -> None:
    """Put load on an OpenAI-compatible server and measure it from the client's side.

    Works with Vashista, vLLM, llama-server and others. Prompts have exactly the wanted number of tokens where the
    server has /tokenize.
    """
    if options["seed"] is None:
        options["seed"] = random.SystemRandom().randrange(1 << 32)
    if json_path is not None:
        check_writable(json_path)
    points = load_points(options)
    results, settings = asyncio.run(_run(points, options, ProgressBars(is_quiet=quiet)))
    click.echo(f"{settings['server']}  model {settings['model']}  seed {settings['seed']}\n")
    click.echo(format_results(results))
    if json_path is not None:
        write_json(json_path, settings, results)
    num_failed = sum(result.summary.num_failed for result in results)
    if num_failed:
        num_requests = sum(result.summary.num_requests for result in results)
        click.echo(f"\n{num_failed} of {num_requests} requests failed.", err=True)
        ctx.exit(1)


async def _run(
    points: list[LoadPoint], options: dict[str, Any], bars: ProgressBars
) -> tuple[list[PointResult], dict[str, Any]]:
    """Look at the server, build workload and plan, run. The settings returned stand in the JSON, without the key."""
    _check_numbers(options)
    limits = _limits(options)
    endpoint = Endpoint.parse(options["url"], uds=options["uds"], ca_file=options["ca_file"])
    pool = ConnectionPool(endpoint, api_key=options["api_key"])
    client = OpenAIClient(pool, timeout_s=options["timeout"])
    try:
        shape = RequestShape(
            model=await find_model(client, options["model"]),
            endpoint=options["endpoint"],
            is_streaming=options["stream"],
            ignore_eos=options["ignore_eos"],
            has_usage=options["usage"],
            temperature=options["temperature"],
            extra_body=_extra_body(options["extra_body"]),
        )
        workload = await _workload(client, shape, options)
        plan = Plan(
            shape=shape,
            points=points,
            limits=limits,
            num_warmup=options["warmup"],
            seed=options["seed"],
            max_in_flight=options["max_in_flight"],
        )
        with bars:
            results = await run_plan(client, workload, plan, bars.watcher())
    finally:
        pool.close()
    settings = {name: value for name, value in options.items() if name != "api_key"}
    settings |= {"server": endpoint.address, "model": shape.model}
    return results, settings


async def _workload(client: OpenAIClient, shape: RequestShape, options: dict[str, Any]) -> Workload:
    output_len = LengthSpec.parse(options["output_len"], param="output_len")
    dataset = None if options["dataset"] is None else Path(options["dataset"])
    is_chat = shape.endpoint == "chat"
    if dataset is not None and dataset.suffix in {".jsonl", ".ndjson"}:
        if options["input_len"] is not None or options["prefix_len"]:
            raise WorkloadError(f"the prompts of {dataset} have their own lengths: no --input-len, no --prefix-len")
        return JsonLines(read_dataset(dataset), name=str(dataset), output_len=output_len, is_chat=is_chat)
    source = RandomWords() if dataset is None else TextFile(read_dataset(dataset), name=str(dataset))
    counter = await TokenCounter.find(client, model=shape.model, is_chat=is_chat)
    workload = FittedText(
        source,
        counter,
        input_len=LengthSpec.parse(options["input_len"] or "128", param="input_len"),
        output_len=output_len,
        num_prefix_tokens=options["prefix_len"],
        num_prefixes=options["num_prefixes"],
    )
    usage = None if counter is not None else await UsageCounter.find(client, shape)
    await workload.prepare(random.Random(f"{options['seed']}/words"), usage)
    return workload


def load_points(options: dict[str, Any]) -> list[LoadPoint]:
    """The sweep that --concurrency or --rate ask for. Raises WorkloadError."""
    num_requests, duration_s = options["num_requests"], options["duration"]
    if options["concurrency"] is not None and options["rate"] is not None:
        raise WorkloadError("--concurrency (closed loop) and --rate (open loop) exclude each other")
    if options["max_in_flight"] is not None and options["rate"] is None:
        raise WorkloadError("--max-in-flight belongs to --rate; a closed loop has --concurrency", param="max_in_flight")
    if num_requests is None and duration_s is None:
        num_requests = DEFAULT_NUM_REQUESTS
    if options["rate"] is not None:
        rates = _numbers(options["rate"], "rate")
        return [LoadPoint("open", rate, num_requests, duration_s) for rate in rates]
    levels = _numbers(options["concurrency"] or DEFAULT_CONCURRENCY, "concurrency")
    for level in levels:
        if not level.is_integer():
            raise WorkloadError(f"concurrency: {level:g} is not a whole number", param="concurrency")
        if num_requests is not None and num_requests < level:
            raise WorkloadError(
                f"{num_requests} requests never keep {level:g} clients busy: raise --num-requests", param="num_requests"
            )
    return [LoadPoint("closed", level, num_requests, duration_s) for level in levels]


def _numbers(text: str, param: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise WorkloadError(f"{param}: {text!r} is not a list of numbers such as 1,2,4", param=param) from error
    if not all(math.isfinite(value) and 0 < value <= 100_000 for value in values):
        raise WorkloadError(f"{param}: {text!r} must have numbers above 0, up to 100000", param=param)
    return values


def _check_numbers(options: dict[str, Any]) -> None:
    least = {"num_requests": 1, "max_in_flight": 1, "warmup": 0, "prefix_len": 0, "num_prefixes": 1}
    for name, low in least.items():
        if options[name] is not None and options[name] < low:
            raise WorkloadError(f"{name} is {options[name]}; it must be at least {low}", param=name)
    for name in ("duration", "timeout"):
        value = options[name]
        if value is not None and not (math.isfinite(value) and value > 0):
            raise WorkloadError(f"{name} is {value}; it must be a time above 0 seconds", param=name)


def _limits(options: dict[str, Any]) -> Limits | None:
    if options["slo"] is None:
        return None
    limits = Limits.parse(options["slo"])
    if not options["stream"] and (limits.ttft_s is not None or limits.tpot_s is not None):
        raise WorkloadError("limits on ttft and tpot need streams; with --no-stream only e2e is known", param="slo")
    return limits


def _extra_body(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise WorkloadError(f"extra_body: {text!r} is not a JSON object: {error}", param="extra_body") from error
