"""Requests without a valid key: two receipts a minute and address at most, and nothing is uncounted."""

from __future__ import annotations

import time

import httpx
from hypothesis import given
from hypothesis import strategies as st

from vashista.engine.messages import DENSE
from vashista.server.keys import KeyStore
from vashista.server.ledger.reader import reading, rows
from vashista.server.ledger.receipt import Outcome, Receipt, utc_text
from vashista.server.ledger.report import report
from vashista.server.ledger.verify import verify
from vashista.server.strangers import MAX_ADDRESSES, OTHERS, Strangers


def refusal(second: float, client: str = "192.0.2.7", endpoint: str = "/v1/models") -> Receipt:
    return Receipt(
        time=utc_text(1_790_000_040 + second),
        request_id=f"request-{second}",
        key_id=None,
        client=client,
        endpoint=endpoint,
        model="m",
        model_digest=None,
        parameters={},
        num_prompt_tokens=0,
        num_cached_tokens=0,
        num_output_tokens=0,
        attention=DENSE,
        outcome=Outcome(total_s=0.1),
        error_code="invalid_api_key",
    )


def test_the_first_of_a_minute_is_written_and_the_others_are_counted_at_its_end() -> None:
    strangers = Strangers()
    first = refusal(0)
    assert strangers.take(first) == [first]
    assert strangers.take(refusal(1)) == []
    assert strangers.take(refusal(2, endpoint="/v1/completions")) == []
    assert strangers.take(refusal(3, "192.0.2.8")) == [refusal(3, "192.0.2.8")]
    counted, again = strangers.take(refusal(60))
    assert again == refusal(60)
    assert (counted.time, counted.request_id, counted.client) == (refusal(1).time, "request-1", "192.0.2.7")
    assert (counted.parameters, counted.num_requests, counted.endpoint) == ({"num_requests": 2}, 2, "other")
    assert strangers.flush() == []


def test_a_network_of_ipv6_is_one_address() -> None:
    strangers = Strangers()
    assert len(strangers.take(refusal(0, "2001:db8::1"))) == 1
    assert strangers.take(refusal(0, "2001:db8::ffff:2")) == []
    assert len(strangers.take(refusal(0, "2001:db8:0:1::1"))) == 1
    assert [receipt.client for receipt in strangers.flush()] == ["2001:db8::/64"]


def test_beyond_so_many_addresses_all_others_share_a_receipt() -> None:
    strangers = Strangers()
    for host in range(MAX_ADDRESSES + 3):
        assert len(strangers.take(refusal(0, f"host-{host}"))) == (host < MAX_ADDRESSES)
    (others,) = strangers.flush()
    assert (others.client, others.num_requests) == (OTHERS, 3)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 200)), max_size=600))
def test_every_request_is_counted_once_in_a_bounded_number_of_receipts(asked: list[tuple[int, int]]) -> None:
    strangers = Strangers()
    written: list[Receipt] = []
    for second, host in sorted(asked):
        written += strangers.take(refusal(second, f"192.0.2.{host}"))
    written += strangers.flush()
    assert sum(receipt.num_requests for receipt in written) == len(asked)
    minutes = {receipt.time[:16] for receipt in written}
    assert len(written) <= len(minutes) * (2 * MAX_ADDRESSES + 1)
    assert sum(line.num_refused for line in report(written, ())) == len(asked)


def test_a_flood_of_wrong_keys_leaves_few_receipts_and_a_whole_chain(start_server, tmp_path):
    store = KeyStore(tmp_path / "keys.db")
    store.create("alice")
    store.close()
    server = start_server(state_dir=str(tmp_path)).wait_ready()
    begin = int(time.time() // 60)
    with httpx.Client() as client:
        statuses = {client.get(server.url + "/v1/models").status_code for _ in range(60)}
    assert statuses == {401}
    server.process.terminate()
    server.process.wait(60)
    num_minutes = int(time.time() // 60) - begin + 1
    with reading(tmp_path / "ledger.db") as connection:
        found = [receipt for *_, receipt in rows(connection)]
    assert sum(receipt.num_requests for receipt in found) == 60
    assert len(found) <= 2 * num_minutes
    assert verify(tmp_path / "ledger.db").is_intact
