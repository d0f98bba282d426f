"""All metrics of the server, declared here and nowhere else; README's table is `metrics_table()`.

`server/generation.py` observes requests, the gate counts replies, and what engine and ledger count is read from them
when Prometheus asks. Labels are bounded: codes, routes and reasons come from this source, never from a request. Times
are seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Protocol, TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vashista.engine.errors import VashistaError
from vashista.engine.messages import SupportReport
from vashista.engine.predict.coverage import LiveCoverage
from vashista.server.engine_client import EngineClient, EngineState
from vashista.server.isolation.confinement import Confinement
from vashista.server.ledger.ledger import Ledger
from vashista.server.tls import Tls

Source = TypeVar("Source")
# Two to three steps from 0.5 ms to 20 ms, so that 2 ms, 5 ms and 20 ms tokens are told apart.
TOKEN_EDGES_S = (0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 5)
REQUEST_EDGES_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800),
)

COMMIT_EDGES_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
MASS_EDGES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.999)
ERROR_EDGES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
SHARE_EDGES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 0.999)


class Metrics:
    """The server's metrics, on the registry that is given."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        # The `_created` series are gauges of their own in the text format, which promtool rightly dislikes.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry or CollectorRegistry()
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From the arrival of a request to its first token.", REQUEST_EDGES_S
        )
        self.time_per_output_token = self._histogram(
            "time_per_output_token_seconds", "Mean time of a request's tokens after the first.", TOKEN_EDGES_S
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Time between two consecutive tokens of a request.", TOKEN_EDGES_S
        )
        self.request_duration = self._histogram(
            "request_duration_seconds", "From the arrival of a request to its last token.", REQUEST_EDGES_S
        )
        self.queue_time = self._histogram(
            "queue_time_seconds", "From the arrival of a request to the step that first ran it.", REQUEST_EDGES_S
        )
        self.requests = self._counter(
            "requests_total", "Admitted requests that ended, by reason (n choices count n times).", ["finish_reason"]
        )
        self.refused = self._counter("requests_refused_total", "Requests refused with an error, by code.", ["code"])
        self.adapted = self._counter(
            "requests_adapted_total", "Requests that attend to fewer tokens than asked, to keep deadline_s or max_cost."
        )
        self.deadlines = self._counter(
            "deadlines_total", "Requests with a deadline_s that ended, by whether they kept it.", ["kept"]
        )
        self.prompt_tokens = self._counter(
            "prompt_tokens_total", "Prompt tokens of admitted requests (n choices count n times)."
        )
        self.cached_tokens = self._counter("cached_tokens_total", "Prompt tokens taken from the prefix cache.")
        self.generated_tokens = self._counter("generated_tokens_total", "Generated tokens.")
        self.http_responses = self._counter(
            "http_responses_total", "HTTP replies by route and status.", ["route", "status"]
        )
        self.clients_refused = self._counter(
            "clients_refused_total", "Connections closed because their address is in none of client_networks."
        )
        self.clients_stalled = self._counter(
            "clients_stalled_total", "Replies cut off because the client read nothing for write_timeout_s."
        )
        self.head_steps = self._counter(
            "attention_head_steps_total",
            "Generated tokens times layers times KV heads of sparse requests that ended, by how they attended.",
            ["mode"],
        )
        self.audits = self._counter("attention_audits_total", "Head-steps whose dropped mass was measured exactly.")
        self.dropped_mass = Histogram(
            "vashista_dropped_mass_ratio",
            "Attention mass that a sparse request left out, mean over its head-steps: certain bound, estimate; audit: "
            "over a sample of those that left something out.",
            ["kind"],
            buckets=MASS_EDGES,
            registry=self.registry,
        )
        self.attended_share = self._histogram(
            "attended_tokens_ratio", "Tokens that a sparse request attended to, of those it could see.", SHARE_EDGES
        )
        self.ledger_commit = self._histogram(
            "ledger_commit_seconds", "From the end of a request until its receipt is on disk.", COMMIT_EDGES_S
        )
        self.receipts_rejected = self._counter(
            "ledger_receipts_rejected_total", "Receipts that the ledger's queue did not take, as when it is full."
        )
        self.answers_without_receipt = self._counter(
            "answers_without_receipt_total", "Replies sent although their receipt was lost (ledger_on_failure = serve)."
        )
        self.predictions_failed = self._counter(
            "predictions_failed_total", "Requests that ran without a prediction because of a fault in the predictor."
        )
        self.prediction_outcomes = self._counter(
            "prediction_outcomes_total",
            "Outcomes of predicted requests, by quantity and whether they lay inside their interval.",
            ["quantity", "inside"],
        )
        self.prediction_error = Histogram(
            "vashista_prediction_error_ratio",
            "Relative error of predicted medians, without sign.",
            ["quantity"],
            buckets=ERROR_EDGES,
            registry=self.registry,
        )
        build = Gauge("vashista_build_info", "Version of the server; always 1.", ["version"], registry=self.registry)
        build.labels(version("vashista")).set(1)
        ProcessCollector(registry=self.registry)

    def follow_engine(self, engine: EngineClient) -> None:
        """Report the engine's own counts too, read when they are asked for."""
        self.registry.register(EngineCollector(engine))

    def follow_ledger(self, ledger: Ledger) -> None:
        """Report the ledger's counts."""
        self.registry.register(LedgerCollector(ledger))

    def follow_tls(self, tls: Tls | None) -> None:
        """Report when the certificate in force expires; without TLS the families are empty."""
        self.registry.register(TlsCollector(tls))

    def follow_forecaster(self, forecaster: Predictions) -> None:
        """Report how well predictions hold."""
        self.registry.register(ForecasterCollector(forecaster))

    def observe_prediction(self, quantity: str, error: float, *, is_inside: bool) -> None:
        """One outcome of a predicted request."""
        self.prediction_error.labels(quantity).observe(error)
        self.prediction_outcomes.labels(quantity, "yes" if is_inside else "no").inc()

    def follow_confinement(self, confinement: Confinement) -> None:
        """Report what the server can reach, and what was tried."""
        self.registry.register(ConfinementCollector(confinement))

    def count_refusal(self, error: VashistaError) -> None:
        """One request that got an error instead of an answer."""
        self.refused.labels(error.code).inc()

    def observe_support(self, support: SupportReport) -> None:
        """What one sparse request left out."""
        num_dense = round(support.num_head_steps * support.dense_share)
        self.head_steps.labels("dense").inc(num_dense)
        self.head_steps.labels("sparse").inc(support.num_head_steps - num_dense)
        self.attended_share.observe(support.tokens_attended / support.tokens_visible)
        self.dropped_mass.labels("bound").observe(support.dropped_mass_bound)
        if support.dropped_mass_estimate is not None:
            self.dropped_mass.labels("estimate").observe(support.dropped_mass_estimate)
        if support.audit is not None:
            self.audits.inc(support.audit.num_audits)
            # Audits are of the sparse head-steps alone; the others dropped nothing.
            self.dropped_mass.labels("audit").observe((1 - support.dense_share) * support.audit.dropped_mass)

    def exposition(self) -> bytes:
        """The text format of Prometheus."""
        return prometheus_client.generate_latest(self.registry)

    def _histogram(self, name: str, help_text: str, edges: tuple[float, ...]) -> Histogram:
        return Histogram(f"vashista_{name}", help_text, buckets=edges, registry=self.registry)

    def _counter(self, name: str, help_text: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"vashista_{name}", help_text, labels or [], registry=self.registry)


class EngineCollector(Collector):
    """What the engine and its client count, as of now."""

    def __init__(self, engine: EngineClient | None) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """One family each; without an engine (for the documentation) the families are empty."""
        engine = self._engine
        stats = engine.stats if engine else None
        pages = GaugeMetricFamily(
            "vashista_kv_pages", "KV pages by state: used, cached (reusable), free.", labels=["state"]
        )
        if stats is not None:
            free = stats.num_pages - stats.num_pages_used - stats.num_pages_cached
            for state, count in (("used", stats.num_pages_used), ("cached", stats.num_pages_cached), ("free", free)):
                pages.add_metric([state], count)
        yield pages
        yield from _families(
            GaugeMetricFamily,
            engine,
            ("requests_running", "Requests that the engine computes.", lambda client: client.stats.num_running),
            ("requests_waiting", "Requests that wait in the engine.", lambda client: client.stats.num_waiting),
            (
                "step_error_ratio",
                "Mean relative error, without sign, of what was expected of the last steps.",
                lambda client: client.stats.step_error,
            ),
            ("engine_ready", "1 while the engine can answer.", lambda client: client.state is EngineState.READY),
        )
        yield from _families(
            CounterMetricFamily,
            engine,
            ("engine_restarts", "Restarts of the engine process.", lambda client: client.num_restarts),
            (
                "engine_preemptions",
                "Requests that lost their pages for a while.",
                lambda client: client.num_preemptions,
            ),
            (
                "engine_broken_token_gaps",
                "Steps that gave running streams their next token later than max_token_gap_s promises.",
                lambda client: client.num_broken_gaps,
            ),
            (
                "engine_busy_seconds",
                "Time in which the engine computed; receipts divide it among requests.",
                lambda client: client.busy_s,
            ),
        )


class LedgerCollector(Collector):
    """What the ledger counts, as of now."""

    def __init__(self, ledger: Ledger | None) -> None:
        self._ledger = ledger

    def collect(self) -> Iterator[Metric]:
        """One family each; empty without a ledger."""
        ledger = self._ledger
        yield from _families(
            CounterMetricFamily,
            ledger,
            ("ledger_receipts", "Receipts on disk.", lambda books: books.num_written_total),
            (
                "ledger_receipts_failed",
                "Receipts lost because the ledger could not be written.",
                lambda books: books.num_failed_total,
            ),
            (
                "ledger_batches",
                "Transactions of the ledger: receipts that wait share one.",
                lambda books: books.num_batches_total,
            ),
        )
        yield from _families(
            GaugeMetricFamily,
            ledger,
            ("ledger_queue", "Receipts that wait for the ledger.", lambda books: books.num_waiting),
            ("ledger_ok", "1 unless the last write of the ledger failed.", lambda books: not books.failure),
            (
                "ledger_checkpoint_age_seconds",
                "Since the last signed checkpoint, or the start.",
                lambda books: books.checkpoint_age_s,
            ),
        )


class TlsCollector(Collector):
    """The certificate in force."""

    def __init__(self, tls: Tls | None) -> None:
        self._tls = tls

    def collect(self) -> Iterator[Metric]:
        """One family each; empty without TLS."""
        yield from _families(
            GaugeMetricFamily,
            self._tls,
            (
                "tls_certificate_expiry_timestamp_seconds",
                "Unix time at which the certificate in force expires.",
                lambda tls: tls.current.expires_s,
            ),
        )
        yield from _families(
            CounterMetricFamily,
            self._tls,
            ("tls_reloads", "New certificates that were taken.", lambda tls: tls.num_reloads),
            (
                "tls_reloads_failed",
                "New certificates that could not be used, so that the old one stayed.",
                lambda tls: tls.num_failed_reloads,
            ),
        )


class Predictions(Protocol):
    """What the metrics read of the forecaster."""

    coverage: dict[str, LiveCoverage]

    @property
    def is_drifting(self) -> bool:
        """Whether the stated coverage is not kept at present."""


class ForecasterCollector(Collector):
    """How well predictions hold, as of now."""

    def __init__(self, forecaster: Predictions | None) -> None:
        self._forecaster = forecaster

    def collect(self) -> Iterator[Metric]:
        """One family each; empty without a forecaster, and before the first outcome."""
        forecaster = self._forecaster
        coverage = GaugeMetricFamily(
            "vashista_prediction_coverage_ratio",
            "Share of the last 200 outcomes inside their interval, which is made to hold 0.9 of them.",
            labels=["quantity"],
        )
        width = GaugeMetricFamily(
            "vashista_prediction_width_ratio",
            "Mean width of the intervals of the last 200 outcomes, relative to their median.",
            labels=["quantity"],
        )
        for quantity, live in forecaster.coverage.items() if forecaster else ():
            if live.num_outcomes:
                coverage.add_metric([quantity], live.share)
                width.add_metric([quantity], live.width)
        yield from (coverage, width)
        yield from _families(
            GaugeMetricFamily,
            forecaster,
            (
                "prediction_drifting",
                "1 while clearly fewer outcomes lie inside their intervals than should.",
                lambda source: source.is_drifting,
            ),
        )


class ConfinementCollector(Collector):
    """The network of the server as it is now, and attempts to reach out."""

    def __init__(self, confinement: Confinement | None) -> None:
        self._confinement = confinement

    def collect(self) -> Iterator[Metric]:
        """One family each; empty without a confinement."""
        confinement = self._confinement
        mode = GaugeMetricFamily("vashista_isolation", "1 for the setting isolation.", labels=["mode"])
        attempts = CounterMetricFamily(
            "vashista_egress_attempts",
            "Attempts to reach out, by who saw them: server and engine their own code, kernel the filter.",
            labels=["seen_by", "what"],
        )
        if confinement is not None:
            mode.add_metric([confinement.mode], 1)
            for seen_by in ("server", "engine", "kernel"):
                confinement.attempts.counts[seen_by, "connect"] += 0  # a series that is there can be watched
            for (seen_by, what), count in sorted(confinement.attempts.counts.items()):
                attempts.add_metric([seen_by, what], count)
        yield mode
        yield attempts
        yield from _families(
            GaugeMetricFamily,
            confinement,
            (
                "network_interfaces",
                "Network interfaces besides lo that the server has; 0 where it cannot reach a network.",
                lambda found: found.num_interfaces,
            ),
            (
                "network_filter",
                "1 while the kernel refuses the server new sockets and connections.",
                lambda found: found.has_filter,
            ),
        )


def _families(
    kind: type[GaugeMetricFamily | CounterMetricFamily],
    source: Source | None,
    *counts: tuple[str, str, Callable[[Source], float]],
) -> Iterator[Metric]:
    """One family for each (name, meaning, count), read from the source; empty without one."""
    for name, text, count in counts:
        yield kind(f"vashista_{name}", text, value=None if source is None else count(source))


def metrics_table() -> str:
    """README's Markdown table of all metrics of ours, one row each."""
    registry = Metrics().registry
    registry.register(EngineCollector(None))
    registry.register(LedgerCollector(None))
    registry.register(ConfinementCollector(None))
    registry.register(ForecasterCollector(None))
    registry.register(TlsCollector(None))
    rows = ["| metric | type | meaning |", "| --- | --- | --- |"]
    for family in sorted(registry.collect(), key=lambda family: family.name):
        if family.name.startswith("vashista_"):
            name = family.name + ("_total" if family.type == "counter" else "")
            rows.append(f"| `{name}` | {family.type} | {family.documentation} |")
    return "\n".join(rows) + "\n"
