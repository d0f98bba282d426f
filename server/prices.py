"""What a request cost: its busy seconds, the energy they took, and money at the operator's prices.

`server/generation.py` adds up a request's shares of the engine's busy time in a `Spending` and asks `Prices.cost` at
its end; the result goes into the reply's `usage.vashista.cost` and into the receipt.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from vashista.engine.energy import EnergySource

J_PER_KWH = 3.6e6
NANO = 10**9
"""Money is counted in billionths, so that sums are exact."""


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What a request took of the machine."""

    busy_s: float
    """Its share of the engine's busy time, by modelled work; the shares of all requests add up to it."""
    energy_j: float
    energy_source: Literal["nvml", "rapl", "model"]
    """Who measured the power: the GPU's driver, the CPU's counters, or nobody: then it is the setting power_w."""
    money: float | None
    """None where the operator sets no prices."""
    currency: str | None

    @property
    def money_nano(self) -> int | None:
        """Billionths, as the ledger adds them up."""
        return None if self.money is None else round(self.money * NANO)


class Spending:
    """Adds up shares of busy time. `power_w` is what was measured when a share came, None if nothing was."""

    __slots__ = ("_measured_j", "_modelled_s", "_sources", "busy_s")

    def __init__(self) -> None:
        self.busy_s = 0.0
        self._measured_j = 0.0
        self._modelled_s = 0.0
        self._sources: set[EnergySource] = set()

    def add(self, busy_s: float, power_w: float | None, source: EnergySource | None) -> None:
        """One step's share."""
        self.busy_s += busy_s
        if power_w is None or source is None:
            self._modelled_s += busy_s
        else:
            self._measured_j += busy_s * power_w
            self._sources.add(source)

    def energy(self, power_w: float) -> tuple[float, Literal["nvml", "rapl", "model"]]:
        """(joules, source). `power_w` stands where nothing was measured; one such share makes all of it modelled."""
        energy_j = self._measured_j + self._modelled_s * power_w
        if self._modelled_s or len(self._sources) != 1:
            return energy_j, "model"
        return energy_j, next(iter(self._sources))


class Prices(msgspec.Struct, frozen=True, kw_only=True):
    """The operator's; 0 is free of charge."""

    per_machine_hour: float = 0.0
    """Of busy time: the shares of all requests add up to the hours in which the engine computed."""
    per_kwh: float = 0.0
    per_request: float = 0.0
    """Of each request that was admitted."""
    currency: str = "EUR"
    power_w: float = 200.0
    """The modelled power while the engine computes."""

    @property
    def is_free(self) -> bool:
        """Whether no price is set."""
        return not (self.per_machine_hour or self.per_kwh or self.per_request)

    def cost(self, spending: Spending) -> Cost:
        """Of an admitted request."""
        energy_j, source = spending.energy(self.power_w)
        money = None if self.is_free else self.per_request + self.money(spending.busy_s, energy_j)
        return Cost(
            busy_s=spending.busy_s,
            energy_j=energy_j,
            energy_source=source,
            money=None if money is None else round(money, 9),
            currency=None if money is None else self.currency,
        )

    def money(self, busy_s: float, energy_j: float) -> float:
        """Of time and energy."""
        return busy_s / 3600 * self.per_machine_hour + energy_j / J_PER_KWH * self.per_kwh
