from __future__ import annotations

import pytest

from vashista.server.prices import Prices, Spending


def spent(*shares: tuple[float, float | None, str | None]) -> Spending:
    spending = Spending()
    for busy_s, power_w, source in shares:
        spending.add(busy_s, power_w, source)
    return spending


def test_money_is_time_energy_and_a_fixed_part():
    prices = Prices(per_machine_hour=3.6, per_kwh=0.36, per_request=0.01, currency="CHF")
    cost = prices.cost(spent((10.0, 500.0, "nvml")))
    assert (cost.busy_s, cost.energy_j, cost.energy_source) == (10.0, 5000.0, "nvml")
    assert cost.money == pytest.approx(0.01 + 0.01 + 0.0005)
    assert cost.money_nano == 20_500_000
    assert cost.currency == "CHF"


def test_without_prices_there_is_no_money_but_time_and_energy():
    cost = Prices(power_w=100.0).cost(spent((2.0, None, None)))
    assert (cost.busy_s, cost.energy_j, cost.energy_source) == (2.0, 200.0, "model")
    assert (cost.money, cost.money_nano, cost.currency) == (None, None, None)


def test_energy_that_was_measured_in_part_is_marked_as_modelled():
    cost = Prices(power_w=100.0).cost(spent((1.0, None, None), (1.0, 300.0, "rapl")))
    assert (cost.energy_j, cost.energy_source) == (400.0, "model")


def test_a_request_that_never_ran_pays_the_fixed_part():
    cost = Prices(per_request=0.5).cost(Spending())
    assert (cost.busy_s, cost.energy_j, cost.money) == (0.0, 0.0, 0.5)
    assert cost.energy_source == "model"


def test_money_is_whole_billionths():
    cost = Prices(per_machine_hour=1.0).cost(spent((1.0, None, None)))
    assert cost.money == 0.000277778
    assert cost.money_nano == 277778
