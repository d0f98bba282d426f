"""The engine's queue as the server knows it: every admitted request, how far it is, and whether it runs.

`server/engine_client.py` keeps one `QueueMirror`: it tells it of every request that it submits or aborts and shows it
every report of the engine. A report names the tokens that came and, for prompts that are not read to their end, the
tokens computed, so that the mirror is what the engine was when the report's last step ended, exactly.
"""

from __future__ import annotations

from bisect import insort

from vashista.engine.busy_time import is_shaped
from vashista.engine.messages import AttentionMode, SamplingParams, StepReport, Submit
from vashista.engine.request import rank_of


class Entry:
    """One request that has not ended."""

    __slots__ = (
        "attention",
        "id",
        "is_drawn",
        "is_running",
        "is_shaped",
        "max_tokens",
        "never_stops",
        "num_cached",
        "num_computed",
        "num_output",
        "num_prompt",
        "rank",
        "submitted_s",
    )

    def __init__(self, submit: Submit, now_s: float, num_cached: int = 0) -> None:
        sampling = submit.sampling
        self.id = submit.request_id
        self.rank = rank_of(submit)
        self.attention: AttentionMode = submit.attention
        self.num_prompt = len(submit.prompt_token_ids)
        self.num_cached = num_cached
        """Prompt tokens expected from the prefix cache."""
        self.max_tokens = sampling.max_tokens
        self.never_stops = never_stops(sampling)
        self.is_drawn = sampling.temperature > 0
        self.is_shaped = is_shaped(sampling)
        self.submitted_s = now_s
        self.is_running = False
        """Whether it holds pages."""
        self.num_computed = 0
        """Of a running request whose known tokens are not all computed."""
        self.num_output = 0

    @property
    def num_known(self) -> int:
        """Prompt and output."""
        return self.num_prompt + self.num_output


class QueueMirror:
    """All requests in the engine. For one event loop."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self.ordered: list[Entry] = []
        """By rank."""
        self.ended_s = 0.0
        """When the last step ended that is counted here."""
        self.cold = 0.0
        """Of the step after it."""
        self.num_pages_used = 0
        self.num_waiting = 0
        self.num_waiting_tokens = 0

    def __len__(self) -> int:
        return len(self.ordered)

    def get(self, request_id: str) -> Entry | None:
        """The entry of a request that has not ended."""
        return self._entries.get(request_id)

    @property
    def num_running(self) -> int:
        """Requests that hold pages."""
        return len(self.ordered) - self.num_waiting

    def submit(self, entry: Entry) -> None:
        """A request was sent to the engine."""
        self._entries[entry.id] = entry
        insort(self.ordered, entry, key=_rank)
        self.num_waiting += 1
        self.num_waiting_tokens += entry.num_prompt

    def remove(self, request_id: str) -> None:
        """It ended, or is being aborted; of an unknown one there is nothing to remove."""
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            self.ordered.remove(entry)
            self._set_running(entry, is_running=True)

    def clear(self) -> None:
        """The engine is gone, and all its requests."""
        self._entries.clear()
        self.ordered.clear()
        self.ended_s = self.cold = 0.0
        self.num_pages_used = self.num_waiting = self.num_waiting_tokens = 0

    def take(self, report: StepReport) -> None:
        """What the engine said; requests that ended are taken out."""
        entries = self._entries
        self.ended_s = report.stats.step_ended_s
        self.cold = report.stats.cold
        self.num_pages_used = report.stats.num_pages_used
        for request_id in report.shares:
            entry = entries.get(request_id)
            if entry is not None and not entry.is_running:
                self._set_running(entry, is_running=True)
        for event in report.events:
            entry = entries.get(event.request_id)
            if entry is not None:
                entry.num_output += len(event.token_ids)
                entry.num_computed = entry.num_known - 1
                if event.finish_reason is not None:
                    self.remove(event.request_id)
        for request_id, num_computed in report.progress.items():
            entry = entries.get(request_id)
            if entry is not None:
                entry.num_computed = num_computed
                if not num_computed:
                    self._set_running(entry, is_running=False)

    def _set_running(self, entry: Entry, *, is_running: bool) -> None:
        if entry.is_running == is_running:
            return
        entry.is_running = is_running
        sign = -1 if is_running else 1
        self.num_waiting += sign
        self.num_waiting_tokens += sign * entry.num_prompt


def never_stops(sampling: SamplingParams) -> bool:
    """Whether a request goes on to its max_tokens, whatever it says."""
    return sampling.ignore_eos and not sampling.stop and not sampling.stop_token_ids


def _rank(entry: Entry) -> tuple[float, str]:
    return entry.rank
