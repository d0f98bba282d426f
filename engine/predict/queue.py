"""The engine's queue as the server knows it: every admitted request, how far it is, and whether it runs.

`server/engine_client.py` keeps one `QueueMirror`: it tells it of every request that it submits or aborts and shows it
every report of the engine. A report names the tokens that came and, for prompts that are not read to their end, the
tokens computed, so that the mirror is what the engine was when the report's last step ended, exactly.

The same is kept as a table of numbers, changed as the entries change, from which `engine/predict/native.c` makes a
prediction without going through the entries.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right

from vashista.engine.busy_time import is_shaped
from vashista.engine.messages import AttentionMode, SamplingParams, StepReport, Submit
from vashista.engine.request import rank_of

ROW = 10
"""Numbers of a row, those of native.c: due time; prompt, output and most tokens; whether it never stops; its kind;
computed and cached tokens; when it was submitted; whether it runs."""
_OUTPUT, _COMPUTED, _RUNNING = 2, 6, 9
Kind = tuple[AttentionMode, bool, bool]
"""How requests attend, whether their tokens are drawn, whether their logits are masked or changed."""


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
        "row",
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
        self.row = -1
        """Of the queue's table."""

    @property
    def kind(self) -> Kind:
        """Requests of one kind add the same to a step."""
        return self.attention, self.is_drawn, self.is_shaped

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
        self.table = array("d")
        """[rows * ROW]; rows of nobody hold what was there."""
        self.order = array("i")
        """Rows by rank."""
        self.kinds: list[Kind] = []
        """By their numbers in the table; some are nobody's."""
        self._kinds: dict[Kind, int] = {}
        self._num_of_kind: list[int] = []
        self._free_kinds: list[int] = []
        self._free_rows: list[int] = []

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
        place = self.place_of(entry.rank)
        self.ordered.insert(place, entry)
        self._add_row(entry, place)
        self.num_waiting += 1
        self.num_waiting_tokens += entry.num_prompt

    def remove(self, request_id: str) -> None:
        """It ended, or is being aborted; of an unknown one there is nothing to remove."""
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            place = bisect_left(self.ordered, entry.rank, key=_rank)
            assert self.ordered[place] is entry
            del self.ordered[place], self.order[place]
            self._set_running(entry, is_running=True)
            self._free_row(entry)

    def clear(self) -> None:
        """The engine is gone, and all its requests."""
        self._entries.clear()
        self.ordered.clear()
        del self.table[:], self.order[:]
        self.kinds.clear()
        self._kinds.clear()
        for numbers in (self._num_of_kind, self._free_kinds, self._free_rows):
            numbers.clear()
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
                at = entry.row * ROW
                self.table[at + _OUTPUT], self.table[at + _COMPUTED] = entry.num_output, entry.num_computed
                if event.finish_reason is not None:
                    self.remove(event.request_id)
        for request_id, num_computed in report.progress.items():
            entry = entries.get(request_id)
            if entry is not None:
                entry.num_computed = num_computed
                self.table[entry.row * ROW + _COMPUTED] = num_computed
                if not num_computed:
                    self._set_running(entry, is_running=False)

    def _set_running(self, entry: Entry, *, is_running: bool) -> None:
        if entry.is_running == is_running:
            return
        entry.is_running = is_running
        self.table[entry.row * ROW + _RUNNING] = is_running
        sign = -1 if is_running else 1
        self.num_waiting += sign
        self.num_waiting_tokens += sign * entry.num_prompt

    def place_of(self, rank: tuple[float, str]) -> int:
        """How many are before a request of this rank."""
        return bisect_right(self.ordered, rank, key=_rank)

    def _add_row(self, entry: Entry, place: int) -> None:
        if not self._free_rows:
            self._free_rows.append(len(self.table) // ROW)
            self.table.extend([0.0] * ROW)
        entry.row = self._free_rows.pop()
        self.order.insert(place, entry.row)
        limits = (entry.num_prompt, entry.num_output, entry.max_tokens, entry.never_stops)
        numbers = (entry.rank[0], *limits, self._hold_kind(entry.kind), entry.num_computed, entry.num_cached)
        at = entry.row * ROW
        self.table[at : at + ROW] = array("d", [*numbers, entry.submitted_s, entry.is_running])

    def _free_row(self, entry: Entry) -> None:
        number = self._kinds[entry.kind]
        self._num_of_kind[number] -= 1
        if not self._num_of_kind[number]:
            del self._kinds[entry.kind]
            self._free_kinds.append(number)
        self._free_rows.append(entry.row)

    def _hold_kind(self, kind: Kind) -> int:
        """The number of a kind that one more request is of."""
        number = self._kinds.get(kind)
        if number is None:
            if not self._free_kinds:
                self._free_kinds.append(len(self.kinds))
                self.kinds.append(kind)
                self._num_of_kind.append(0)
            number = self._kinds[kind] = self._free_kinds.pop()
            self.kinds[number] = kind
        self._num_of_kind[number] += 1
        return number


def never_stops(sampling: SamplingParams) -> bool:
    """Whether a request goes on to its max_tokens, whatever it says."""
    return sampling.ignore_eos and not sampling.stop and not sampling.stop_token_ids


def _rank(entry: Entry) -> tuple[float, str]:
    return entry.rank
