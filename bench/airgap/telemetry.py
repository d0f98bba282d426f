"""Looks for telemetry: clients of collectors, in what is installed, in lock files and in bills of materials.

    python bench/airgap/telemetry.py [--tree SITE-PACKAGES] [--lock FILE ...] [--bill sbom.cdx.json ...]

Four looks: names of packages; modules of such a name at any depth, as vendored copies have them; Python that imports
one; and the collectors' host names in every file, compiled libraries too. Nothing is left out, torch neither. What is
there and stays is in `KNOWN` with the reason; everything else is printed. Exit status 1 when there is anything.
`tests/packaging/test_telemetry.py` looks at what the server is installed with, and makes sure that a look finds.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple


class Client(NamedTuple):
    """One kind of telemetry, by what gives it away."""

    name: str
    packages: tuple[str, ...]
    """Patterns of distribution names, normalised as in lock files."""
    modules: tuple[str, ...]
    hosts: tuple[str, ...] = ()


CLIENTS = (
    Client("OpenTelemetry", ("opentelemetry-sdk*", "opentelemetry-exporter-*", "opentelemetry-proto*",
           "opentelemetry-instrumentation*", "opentelemetry-distro", "*-opentelemetry"),
           ("opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.proto", "opentelemetry.instrumentation")),
    Client("Logfire", ("logfire*",), ("logfire",), ("logfire-api.pydantic.dev", "logfire-us.pydantic.dev")),
    Client("OpenCensus", ("opencensus*",), ("opencensus",)),
    Client("Sentry", ("sentry-sdk", "raven"), ("sentry_sdk", "raven"), (".ingest.sentry.io", "sentry.io/api")),
    Client("PostHog", ("posthog",), ("posthog",), ("app.posthog.com", "i.posthog.com")),
    Client("Segment", ("segment-analytics-python", "analytics-python", "rudder-sdk-python"),
           ("segment.analytics", "analytics.client", "rudderstack"), ("api.segment.io", "api.segment.com")),
    Client("Datadog", ("ddtrace", "datadog*"), ("ddtrace", "datadog"), (".datadoghq.com", ".datadoghq.eu")),
    Client("StatsD", ("statsd", "*-statsd", "aiodogstatsd", "pystatsd"), ("statsd", "aiodogstatsd", "pystatsd")),
    Client("Mixpanel", ("mixpanel*",), ("mixpanel",), ("api.mixpanel.com",)),
    Client("Amplitude", ("amplitude-*",), ("amplitude",), ("api.amplitude.com", "api2.amplitude.com")),
    Client("Honeycomb", ("honeycomb-*", "libhoney"), ("beeline", "libhoney", "honeycomb"), ("api.honeycomb.io",)),
    Client("New Relic", ("newrelic*",), ("newrelic", "newrelic_telemetry_sdk"), (".newrelic.com", ".nr-data.net")),
    Client("Scarf", ("scarf*",), ("scarf", "scarf_sdk"), ("scarf.sh", "scarf.sh/pixel")),
    Client("Rollbar", ("rollbar",), ("rollbar",), ("api.rollbar.com",)),
    Client("Bugsnag", ("bugsnag",), ("bugsnag",), ("notify.bugsnag.com",)),
    Client("Elastic APM", ("elastic-apm",), ("elasticapm",)),
    Client("Application Insights", ("applicationinsights", "azure-monitor-*"),
           ("applicationinsights", "azure.monitor"), (".services.visualstudio.com", ".applicationinsights.azure.com")),
    Client("Google", ("google-cloud-logging", "google-cloud-monitoring", "google-cloud-trace"),
           ("google.cloud.logging", "google.cloud.monitoring_v3"), ("google-analytics.com", "googletagmanager.com")),
    Client("AWS", ("watchtower", "aws-xray-sdk"), ("watchtower", "aws_xray_sdk")),
    Client("Jaeger and Zipkin", ("jaeger-client", "py-zipkin"), ("jaeger_client", "py_zipkin")),
    Client("Other tracers", ("scout-apm", "instana", "appdynamics*", "lightstep", "pyroscope-io", "honeybadger",
           "snowplow-tracker", "statsig*", "launchdarkly-*", "growthbook", "matomo*", "countly*", "keen"),
           ("scout_apm", "instana", "appdynamics", "lightstep", "pyroscope", "honeybadger", "snowplow_tracker",
            "statsig", "ldclient", "growthbook"), ("collector.snowplow", "statsigapi.net", "events.launchdarkly.com")),
    Client("Trackers of experiments", ("wandb", "comet-ml", "neptune*", "mlflow*", "clearml", "codecarbon", "trackio"),
           ("wandb", "comet_ml", "neptune", "mlflow", "clearml", "codecarbon", "trackio"), ("api.wandb.ai",)),
    Client("Watchers of models", ("langfuse", "langsmith", "traceloop-sdk", "openllmetry*", "arize*", "openinference-*",
           "helicone*"), ("langfuse", "langsmith", "traceloop", "arize", "openinference", "helicone"),
           ("cloud.langfuse.com", "api.smith.langchain.com")),
    Client("Hugging Face", (), ("huggingface_hub.utils._telemetry",), ("/api/telemetry",)),
    Client("FastAPI's exporters", (), ("fastapi.telemetry._runtime",)),
    Client("Starlette's spans", (), ("starlette.middleware.opentelemetry",)),
    Client("Prometheus, pushed", (), ("prometheus_client.bridge",)),
    Client("Strobelight", (), ("torch.utils._strobelight", "torch._strobelight")),
    Client("TensorBoard", ("tensorboard*",), ("tensorboard", "torch.utils.tensorboard")),
)  # fmt: skip


class Known(NamedTuple):
    """What is installed and stays; a pattern that fits nothing any more is to be taken out."""

    client: str
    path: str
    reason: str


NOT_IMPORTED = "a server and its engine never import it: tests/server/test_imports.py"
KNOWN = (
    Known("FastAPI's exporters", "fastapi/*", f"switched off in server/app.py, lacks its exporters; {NOT_IMPORTED}"),
    Known("OpenTelemetry", "fastapi/telemetry/_runtime.py", "the same"),
    Known("Starlette's spans", "starlette/middleware/opentelemetry.py", NOT_IMPORTED),
    Known("Hugging Face", "huggingface_hub/utils/_telemetry.py", f"tokenizers brings it along; {NOT_IMPORTED}"),
    Known("Prometheus, pushed", "prometheus_client/bridge/*", NOT_IMPORTED),
    Known("TensorBoard", "torch/*", f"writes files, where tensorboard is installed; {NOT_IMPORTED}"),
    Known("TensorBoard", "huggingface_hub/_tensorboard_logger.py", NOT_IMPORTED),
    Known("Strobelight", "torch/*", "torch imports it; starts a program of its maker's where an environment variable "
          "says so, which engine/offline.py forgets"),
)  # fmt: skip
"""Of the packages that a server is installed with; others, such as those for development, are not excused."""


class Finding(NamedTuple):
    """Something that gives a client away."""

    client: str
    place: str
    what: str

    @property
    def known(self) -> Known | None:
        """Why it is there all the same."""
        return next((k for k in KNOWN if k.client == self.client and fnmatchcase(self.place, k.path)), None)


def in_names(names: Iterable[str], place: str) -> list[Finding]:
    """Of distributions, normalised or not."""
    found = []
    for name in names:
        plain = re.sub(r"[-_.]+", "-", name).lower()
        found += [Finding(client.name, place, f"package {plain}") for client in CLIENTS
                  if any(fnmatchcase(plain, pattern) for pattern in client.packages)]  # fmt: skip
    return found


def in_lock(path: Path) -> list[Finding]:
    """Of a lock file of pip."""
    names = re.findall(r"^([A-Za-z0-9._-]+)==", path.read_text(encoding="utf-8"), re.MULTILINE)
    if not names:
        raise ValueError(f"{path} pins nothing")
    return in_names(names, path.name)


def in_bill(path: Path) -> list[Finding]:
    """Of a CycloneDX document: its components, and the names of files."""
    components = json.loads(path.read_text(encoding="utf-8"))["components"]
    names = [component["name"] for component in components if component["type"] == "library"]
    files = [component["name"] for component in components if component["type"] == "file"]
    if not names:
        raise ValueError(f"{path} names no library")
    return in_names(names, path.name) + in_modules(files)


def in_modules(files: Iterable[str]) -> list[Finding]:
    """Of paths, relative to a folder that is imported from: modules of such a name, alone or within a package."""
    found = set()
    for file in files:
        if "__pycache__" in file:
            continue
        dotted = "." + re.sub(r"\.(py|pyi|pyc|abi3\.so|cpython.*\.so|so)$", "", file).replace("/", ".") + "."
        for client in CLIENTS:
            for module in client.modules:
                if dotted.startswith(f".{module}.") or ("." not in module and f".{module}." in dotted):
                    found.add(Finding(client.name, file, f"module {module}"))
    return sorted(found)


def in_imports(root: Path, files: Iterable[str]) -> Iterator[Finding]:
    """Of Python that imports one, or names it where it is imported by name."""
    modules = {module: client.name for client in CLIENTS for module in client.modules}
    names = "|".join(sorted(map(re.escape, modules), key=len, reverse=True))
    whole = re.compile(
        rf"^[ \t]*(?:from|import)[ \t]+({names})\b"
        rf"|(?:import_module|__import__|find_spec)\([ \t\n]*[\"']({names})\b",
        re.MULTILINE,
    )
    part = re.compile(r"^[ \t]*from[ \t]+([\w.]+)[ \t]+import[ \t(]+([^()\n]+|[^()]+(?=\)))", re.MULTILINE)
    for file in files:
        if file.endswith(".py"):
            text = (root / file).read_text(encoding="utf-8", errors="replace")
            seen = {match[1] or match[2] for match in whole.finditer(text)}
            seen |= {f"{match[1]}.{word}" for match in part.finditer(text) for word in re.findall(r"\w+", match[2])}
            for module in sorted(seen & set(modules)):
                yield Finding(modules[module], file, f"imports {module}")


def in_bytes(root: Path, files: Iterable[str]) -> Iterator[Finding]:
    """Of host names in any file; grep reads gigabytes in seconds."""
    hosts = {host: client.name for client in CLIENTS for host in client.hosts}
    command = ["xargs", "-0", "grep", "--text", "--only-matching", "--fixed-strings", "--with-filename", "--null"]
    for host in hosts:
        command += ["-e", host]
    paths = "\0".join(file for file in files if not file.endswith(".pyc"))
    done = subprocess.run(command, cwd=root, input=paths.encode(), capture_output=True, check=False)
    if done.returncode not in (0, 1, 123):  # 123: xargs says that one of its greps found nothing
        raise OSError(done.stderr.decode())
    for line in sorted(set(done.stdout.decode(errors="replace").splitlines())):
        file, _, host = line.partition("\0")
        yield Finding(hosts[host], file, f"host {host}")


def in_files(root: Path, files: list[str]) -> list[Finding]:
    """All that files give away."""
    return [*in_modules(files), *in_imports(root, files), *in_bytes(root, files)]


def in_tree(root: Path) -> list[Finding]:
    """Of a folder of installed packages."""
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    names = {re.split(r"-\d", part)[0] for file in files if (part := file.split("/")[0]).endswith(".dist-info")}
    return in_names(sorted(names), root.name) + in_files(root, files)


def main() -> int:
    """Look where the command line says, and print."""
    parser = argparse.ArgumentParser(description="Looks for telemetry.")
    parser.add_argument("--tree", type=Path, action="append", default=[])
    parser.add_argument("--lock", type=Path, action="append", default=[])
    parser.add_argument("--bill", type=Path, action="append", default=[])
    options = parser.parse_args()
    looks = [(in_tree, options.tree), (in_lock, options.lock), (in_bill, options.bill)]
    found = [finding for look, paths in looks for path in paths for finding in look(path)]
    if not any(paths for _, paths in looks):
        parser.error("say where to look")
    unknown = [finding for finding in found if finding.known is None]
    for finding in found:
        reason = "UNKNOWN" if finding.known is None else finding.known.reason
        print(f"{finding.client}: {finding.what} in {finding.place}: {reason}")
    print(f"{len(found)} found, {len(unknown)} of them unknown")
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
