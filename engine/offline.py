"""Switches that tell the libraries of the lock, and those beside it, to fetch and report nothing.

Server, engine and every command set them at their start, before a library is imported. They are no wall: the network
that is not there is. They spare a library the attempt, and the operator the log line.
"""

from __future__ import annotations

from collections.abc import MutableMapping

SWITCHES = {
    "HF_HUB_OFFLINE": "1",  # huggingface_hub, which tokenizers brings along
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",  # what many programs honour
    "OTEL_SDK_DISABLED": "true",  # opentelemetry-api, which FastAPI brings along; its SDK and exporters are not there
    "OTEL_TRACES_EXPORTER": "none",
    "OTEL_METRICS_EXPORTER": "none",
    "OTEL_LOGS_EXPORTER": "none",
    "FASTAPI_OTEL_AUTO_CONFIGURE": "false",  # server/app.py says so too
    "PIP_NO_INDEX": "1",  # pip, which sqlite-utils brings along
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}
PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")
FORGOTTEN = (
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
    "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT",
    "TORCH_COMPILE_STROBELIGHT",  # torch would start its maker's profiler, whatever the value
)
"""What would name a collector."""


def go_offline(environ: MutableMapping[str, str]) -> None:
    """Set the switches, whatever they were, and forget collectors and proxies, which would lead out of the room."""
    environ.update(SWITCHES)
    for name in FORGOTTEN:
        environ.pop(name, None)
    for name in PROXIES:
        environ.pop(name, None)
        environ.pop(name.upper(), None)
