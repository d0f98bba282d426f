"""Receipts over HTTP: every request that was admitted or refused has one when its answer arrives, and no other has."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import threading
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from vashista.server.cli import run
from vashista.server.keys import KeyStore
from vashista.server.ledger.reader import reading, rows
from vashista.server.ledger.receipt import Receipt
from vashista.server.ledger.verify import verify
from vashista.server.settings import load_settings

CHAT = {"model": "reference-26m", "messages": [{"role": "user", "content": "hello world"}], "max_tokens": 4}


def state(server) -> Path:
    return server.log_path.parent / "state"


def receipts(server) -> list[Receipt]:
    with reading(state(server) / "ledger.db") as connection:
        return [receipt for *_, receipt in rows(connection)]


def receipt_of(server, reply: httpx.Response) -> Receipt:
    """There as soon as the reply is: no waiting here."""
    (found,) = [receipt for receipt in receipts(server) if receipt.request_id == reply.headers["x-request-id"]]
    return found


def test_an_answered_request_has_a_receipt_of_what_it_was_and_took(server):
    reply = server.complete(max_tokens=5, temperature=0.5, seed=7, n=2, top_p=0.9)
    receipt = receipt_of(server, reply)
    assert (receipt.endpoint, receipt.model, receipt.key_id) == ("/v1/completions", "reference-26m", None)
    assert receipt.client == "127.0.0.1"
    assert len(receipt.model_digest or "") == 64
    # The prompt counts once, as in the reply's usage, and there is one receipt for both choices.
    usage = reply.json()["usage"]
    assert receipt.num_prompt_tokens == usage["prompt_tokens"]
    assert receipt.num_output_tokens == usage["completion_tokens"] == 10
    assert receipt.num_cached_tokens == usage["prompt_tokens_details"]["cached_tokens"] == 3
    assert receipt.finish_reasons == ("length", "length")
    assert receipt.error_code is None
    asked = {"max_tokens": 5, "temperature": 0.5, "seed": 7, "n": 2, "top_p": 0.9, "stream": False, "num_prompts": 1}
    assert asked.items() <= receipt.parameters.items()
    outcome = receipt.outcome
    assert 0 <= outcome.queue_s <= outcome.ttft_s <= outcome.total_s < 60


def test_a_sparse_request_has_its_mode_and_support(server):
    options = {"attention": {"token_budget": 300}}
    receipt = receipt_of(server, server.complete(vashista=options))
    assert receipt.attention.token_budget == 300
    assert receipt.support is not None
    assert receipt.support.audit is not None


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages"])
def test_a_stream_ends_only_when_its_receipt_is_there(server, path):
    body = {**CHAT, "stream": True} if path != "/v1/completions" else {"model": "reference-26m", "prompt": "x"}
    with httpx.stream("POST", server.url + path, json={**body, "stream": True}, timeout=60) as reply:
        text = b"".join(reply.iter_raw())
    assert b"[DONE]" in text or b"message_stop" in text
    receipt = receipt_of(server, reply)
    assert receipt.endpoint == path
    assert receipt.parameters["stream"] is True


def test_no_text_of_the_client_is_in_a_receipt(server):
    secret = "xyzzy-plugh"
    schema = {"type": "object", "properties": {secret: {"type": "string"}}}
    form = {"type": "json_schema", "json_schema": {"name": secret, "schema": schema}}
    fields = {"stop": [secret], "user": secret, "cache_salt": secret, "response_format": form}
    server.complete(prompt=secret, **fields)
    server.complete(prompt=secret, max_tokens=99999, **fields)
    server.chat(messages=[{"role": "user", "content": secret}], metadata={secret: secret}, stop=secret)
    server.complete(prompt=secret, **{secret: 1})
    mine = receipts(server)[-4:]
    assert secret not in repr(mine)
    assert mine[0].parameters["num_stops"] == 1
    assert mine[0].parameters["response_format"] == "json_schema"
    assert mine[1].parameters["max_tokens"] == 99999


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": 5}, "invalid_request"),
        ({"model": "other"}, "model_not_found"),
        ({"max_tokens": 99999}, "context_length_exceeded"),
        ({"temprature": 1}, "unknown_field"),
        ({"vashista": {"attention": {"token_budget": 100}}}, "invalid_attention_mode"),
    ],
)
def test_a_refused_request_has_a_receipt_with_the_code_of_its_error(server, fields, code):
    reply = server.complete(**fields)
    receipt = receipt_of(server, reply)
    assert receipt.error_code == reply.json()["error"]["code"] == code
    assert (receipt.finish_reasons, receipt.num_prompt_tokens, receipt.endpoint) == ((), 0, "/v1/completions")


def test_bad_bodies_and_unknown_paths_have_receipts(server):
    header = {"content-type": "application/json"}
    bad = httpx.post(server.url + "/v1/completions", content=b"{", headers=header)
    assert receipt_of(server, bad).error_code == "invalid_body"
    big = httpx.post(
        server.url + "/v1/chat/completions", content=b"x" * (2 << 20), headers={"content-type": "application/json"}
    )
    assert receipt_of(server, big).error_code == "body_too_large"
    unknown = httpx.get(server.url + "/nowhere")
    receipt = receipt_of(server, unknown)
    assert (receipt.error_code, receipt.endpoint) == ("not_found", "other")


def test_an_engine_error_has_a_receipt_before_and_within_a_stream(server, script):
    for fields in ({"seed": script.ERROR}, {"seed": script.LATE_ERROR, "stream": True}):
        reply = server.complete(max_tokens=9, **fields)
        receipt = receipt_of(server, reply)
        assert receipt.error_code == "invalid_grammar"
        assert receipt.finish_reasons == ("error",)
    assert receipt.num_output_tokens == 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_has_a_receipt_of_what_it_took(server, script, stream):
    before = len(receipts(server))
    body = {"model": "reference-26m", "prompt": "x", "max_tokens": 9000, "stream": stream}
    with httpx.Client(timeout=30 if stream else 0.5) as client:
        request = client.build_request(
            "POST", server.url + "/v1/completions", json={**body, "seed": script.ENDLESS if stream else script.HANG}
        )
        if stream:
            reply = client.send(request, stream=True)
            next(reply.iter_bytes())
            reply.close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.send(request)
    receipt = server.wait_for(lambda: receipts(server)[before:])[0]
    assert receipt.error_code == "client_gone"
    assert receipt.finish_reasons == ("abort",)
    assert (receipt.num_output_tokens > 0) == stream


def test_health_metrics_documentation_and_lists_leave_no_receipts(server):
    server.complete()
    before = len(receipts(server))
    for path in ("/health", "/ready", "/version", "/metrics", "/docs", "/docs/docs.css", "/openapi.json", "/v1/models"):
        assert httpx.get(server.url + path).status_code == 200
    assert httpx.post(server.url + "/tokenize", json={"model": "reference-26m", "prompt": "x"}).status_code == 200
    server.complete()
    assert len(receipts(server)) == before + 1


def test_wrong_keys_have_receipts_and_right_ones_are_named(start_server, tmp_path):
    store = KeyStore(tmp_path / "keys.db")
    key, secret = store.create("alice")
    store.close()
    server = start_server(state_dir=str(tmp_path)).wait_ready()
    server.complete()
    httpx.get(server.url + "/v1/models")
    httpx.get(server.url + "/metrics")
    body = {"model": "reference-26m", "prompt": "x"}
    httpx.post(server.url + "/v1/completions", json=body, headers={"authorization": f"Bearer {secret}"}, timeout=60)
    with reading(tmp_path / "ledger.db") as connection:
        found = [(receipt.key_id, receipt.endpoint, receipt.error_code) for *_, receipt in rows(connection)]
    assert found[0] == (None, "/v1/completions", "invalid_api_key")
    assert (key.id, "/v1/completions", None) in found
    server.process.terminate()
    server.process.wait(60)
    with reading(tmp_path / "ledger.db") as connection:
        refused = [receipt for *_, receipt in rows(connection) if receipt.key_id is None]
    assert sum(receipt.num_requests for receipt in refused) == 2
    assert {receipt.error_code for receipt in refused} == {"invalid_api_key"}


def test_a_full_queue_a_dead_engine_and_a_drain_have_receipts(start_server, script):
    server = start_server(max_running_requests=2, max_queued_requests=1, drain_timeout_s=0).wait_ready()
    ask = lambda seed: threading.Thread(target=lambda: server.complete(seed=seed))  # noqa: E731
    waiting = [ask(script.HANG), ask(script.HANG)]
    for thread in waiting:
        thread.start()
    server.wait_for(lambda: len(server.engine_messages("Submit")) == 2)
    assert receipt_of(server, server.complete()).error_code == "queue_full"
    server.process.terminate()
    for thread in waiting:
        thread.join()
    server.process.wait(60)
    codes = [receipt.error_code for receipt in receipts(server)]
    assert codes == ["queue_full", "draining", "draining"]
    assert verify(state(server) / "ledger.db").num_checkpoints == 1
    dying = start_server().wait_ready()
    receipt = receipt_of(dying, dying.complete(seed=script.DIE, max_tokens=50))
    assert (receipt.error_code, receipt.finish_reasons) == ("engine_died", ("error",))


def test_the_announcement_names_the_key_that_the_command_prints(server, capfd):
    assert run(["ledger", "key", "--state-dir", str(state(server))]) == 0
    fingerprint = capfd.readouterr().out.strip()
    assert len(fingerprint) == 64
    assert f"signed by the key {fingerprint}" in server.announcement


def test_a_server_without_a_ledger_that_it_can_write_does_not_start_and_says_why(start_server, tmp_path):
    for name, error in (("ledger.db", "LedgerDamagedError"), ("ledger.key", "LedgerKeyError")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(b"neither database nor key" * 99)
        (folder / name).chmod(0o600)
        server = start_server(state_dir=str(folder))
        assert server.process.wait(60) != 0
        assert error in server.log()


def test_requests_are_refused_while_the_ledger_is_locked_and_served_again_afterwards(start_server):
    server = start_server(environ={"SCRIPTED_STEP_S": "0.05"}).wait_ready()
    assert server.complete().status_code == 200
    lock = sqlite3.connect(state(server) / "ledger.db", isolation_level=None)
    lock.execute("begin immediate")
    try:
        # They run already when the ledger fails: no answer without a receipt.
        late = server.complete()
        assert (late.status_code, late.json()["error"]["code"]) == (503, "ledger_locked")
        assert str(state(server)) not in late.text
        assert late.headers["retry-after"]
        early = server.chat()
        assert (early.status_code, early.json()["error"]["code"]) == (503, "ledger_locked")
        assert httpx.get(server.url + "/ready").status_code == 503
        assert httpx.get(server.url + "/health").status_code == 200
        assert server.metric("vashista_ledger_ok") == 0
        # Refused ones have no receipt either; nothing but the ledger's own error goes out without one.
        assert httpx.get(server.url + "/nowhere").status_code == 503
    finally:
        lock.execute("rollback")
        lock.close()
    reply = server.wait_for(lambda: (reply := server.complete()).status_code == 200 and reply)
    assert receipt_of(server, reply).error_code is None
    assert server.metric("vashista_ledger_receipts_failed_total") >= 2
    assert server.metric("vashista_answers_without_receipt_total") == 0
    assert late.headers["x-request-id"] not in {receipt.request_id for receipt in receipts(server)}
    assert verify(state(server) / "ledger.db").is_intact


def test_a_stream_without_a_receipt_ends_with_the_ledgers_error(start_server):
    server = start_server().wait_ready()
    lock = sqlite3.connect(state(server) / "ledger.db", isolation_level=None)
    lock.execute("begin immediate")
    text = server.complete(stream=True).text
    lock.close()
    assert "[DONE]" not in text
    last = text.strip().split("\n\n")[-1]
    assert last.startswith("event: error\ndata: ")
    assert json.loads(last.partition("data: ")[2])["error"]["code"] == "ledger_locked"


def test_a_server_told_so_serves_on_without_receipts_counts_and_raises_an_alarm(start_server):
    server = start_server(ledger_on_failure="serve").wait_ready()
    lock = sqlite3.connect(state(server) / "ledger.db", isolation_level=None)
    lock.execute("begin immediate")
    assert server.complete().status_code == 200
    assert "[DONE]" in server.complete(stream=True).text
    lock.close()
    assert server.metric("vashista_answers_without_receipt_total") == 2
    assert server.log().count("ALARM") == 1
    assert "ledger_locked" in server.log()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_disk_loses_no_answered_request_and_room_on_it_heals(start_server, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let root mount a file system")
    try:
        server = start_server(state_dir=str(folder)).wait_ready()
        (folder / "filler").write_bytes(b"x" * (300 << 10))
        answered = []
        while (
            reply := server.complete(stream=len(answered) % 2 == 1)
        ).status_code == 200 and "error" not in reply.text:
            answered.append(reply.headers["x-request-id"])
        assert "ledger_full" in reply.text
        assert len(answered) > 5
        with reading(folder / "ledger.db") as connection:
            assert [receipt.request_id for *_, receipt in rows(connection)] == answered
        (folder / "filler").unlink()
        server.wait_for(lambda: server.complete().status_code == 200)
        server.end()
        assert verify(folder / "ledger.db").is_intact
    finally:
        subprocess.run(["umount", str(folder)], check=False)


def test_a_kept_prompt_can_be_read_with_the_private_key_alone(start_server, tmp_path, capfd):
    private = X25519PrivateKey.generate()
    form, encoding = serialization.PublicFormat.SubjectPublicKeyInfo, serialization.Encoding.PEM
    (tmp_path / "prompts.pub").write_bytes(private.public_key().public_bytes(encoding, form))
    secret = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "prompts.key").write_bytes(private.private_bytes(encoding, *secret))
    (tmp_path / "other.key").write_bytes(X25519PrivateKey.generate().private_bytes(encoding, *secret))
    server = start_server(ledger_prompts="encrypted", ledger_prompt_key=str(tmp_path / "prompts.pub")).wait_ready()
    long = "xyzzy " * 60000
    request_ids = [server.complete(prompt=text).headers["x-request-id"] for text in ("plugh", long)]
    raw = b"".join(path.read_bytes() for path in state(server).iterdir())
    assert b"plugh" not in raw
    assert b"xyzzy xyzzy" not in raw
    show = ["ledger", "show", "--state-dir", str(state(server))]
    assert run([*show, request_ids[0]]) == 0
    assert "plugh" not in capfd.readouterr().out
    assert run([*show, request_ids[0], "--key", str(tmp_path / "prompts.key")]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["request"]["prompt"] == "plugh"
    assert shown["receipt"]["request_id"] == request_ids[0]
    assert run([*show, "2", "--key", str(tmp_path / "prompts.key")]) == 0
    assert json.loads(capfd.readouterr().out)["request"]["prompt"] == long
    assert run([*show, "1", "--key", str(tmp_path / "other.key")]) == 1
    assert "error[ledger_prompt_key]" in capfd.readouterr().err
    assert run([*show, "none"]) == 2


def test_keeping_prompts_needs_a_key_and_a_key_needs_prompts_to_keep():
    for flags in ({"ledger_prompts": "encrypted"}, {"ledger_prompt_key": "/x.pub"}):
        with pytest.raises(Exception, match="encrypted needs a key, and a key needs encrypted"):
            load_settings({"model": ".", **flags}, {})
