"""A server from start to end: clients that leave, engines that die, full queues, drains and signals."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from vashista.server.ledger.reader import reading, rows

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "deploy" / "models" / "reference-26m"
BODY = {"model": "reference-26m", "prompt": "hello world", "max_tokens": 1000}


def new_messages(server, kind, count_before):
    return server.engine_messages(kind)[count_before:]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_request_at_once(server, script, stream):
    before = len(server.engine_messages("Abort"))
    seed = script.ENDLESS if stream else script.HANG
    with httpx.Client(timeout=30 if stream else 0.5) as client:
        request = client.build_request(
            "POST", server.url + "/v1/completions", json={**BODY, "stream": stream, "seed": seed}
        )
        if stream:
            reply = client.send(request, stream=True)
            next(reply.iter_bytes())
            reply.close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.send(request)
    server.wait_for(lambda: len(server.engine_messages("Abort")) > before)
    server.wait_for(lambda: server.metric("vashista_requests_running") == 0)
    assert new_messages(server, "Abort", before)[0]["request_id"] in {
        submit["request_id"] for submit in server.engine_messages("Submit")
    }


def test_a_client_that_stops_reading_is_cut_off_and_its_receipt_and_a_metric_say_so(start_server, script):
    server = start_server(write_timeout_s=0.3).wait_ready()
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    body = json.dumps({**BODY, "stream": True, "seed": script.ENDLESS, "logprobs": 20}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address)
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        server.wait_for(lambda: server.engine_messages("Abort"))
    server.wait_for(lambda: server.metric("vashista_clients_stalled_total") == 1)
    server.wait_for(lambda: server.metric("vashista_requests_running") == 0)
    with reading(server.log_path.parent / "state" / "ledger.db") as connection:
        (receipt,) = [receipt for *_, receipt in rows(connection)]
    assert (receipt.error_code, receipt.finish_reasons) == ("client_stalled", ("abort",))


def test_a_cancelled_task_of_the_async_client_frees_its_request(server, script):
    before = len(server.engine_messages("Abort"))

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            stream = await client.completions.create(
                model="reference-26m", prompt="x", max_tokens=1000, n=2, stream=True, seed=script.ENDLESS
            )
            async for _ in stream:
                break
            await stream.close()

    asyncio.run(run())
    server.wait_for(lambda: len(server.engine_messages("Abort")) > before)


def test_all_choices_of_a_client_that_leaves_are_aborted(server):
    before = len(server.engine_messages("Abort"))
    with httpx.Client(timeout=30) as client:
        body = {**BODY, "stream": True, "n": 3, "max_tokens": 16000}
        reply = client.send(client.build_request("POST", server.url + "/v1/completions", json=body), stream=True)
        next(reply.iter_bytes())
        reply.close()
    server.wait_for(lambda: len(server.engine_messages("Abort")) >= before + 3)


def test_an_engine_that_dies_ends_its_requests_by_name_and_the_next_one_works(start_server, script):
    server = start_server().wait_ready()
    text = server.complete(stream=True, seed=script.DIE, max_tokens=50).text
    last = text.strip().split("\n\n")[-1]
    assert last.startswith("event: error\ndata: ")
    assert json.loads(last.partition("data: ")[2])["error"]["code"] == "engine_died"
    reply = server.wait_for(lambda: (reply := server.complete()).status_code == 200 and reply)
    assert reply.json()["choices"][0]["text"] == "hello world"
    reply = server.complete(seed=script.DIE, max_tokens=50)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_died")
    server.wait_for(lambda: server.complete().status_code == 200)
    assert server.metric("vashista_engine_restarts_total") == 2
    assert server.metric("vashista_engine_preemptions_total") >= 4
    assert server.metric('vashista_requests_refused_total{code="engine_died"}') == 2


def test_an_engine_killed_while_many_requests_run_ends_each_of_them(start_server, script):
    server = start_server().wait_ready()
    replies: list[httpx.Response] = []
    ask = lambda: replies.append(server.complete(seed=script.HANG))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    server.wait_for(lambda: len(server.engine_messages("Submit")) == 8)
    child = server.engine_pid()
    os.kill(child, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert {reply.json()["error"]["code"] for reply in replies} == {"engine_died"}
    assert httpx.get(server.url + "/health").status_code == 200
    server.wait_for(lambda: httpx.get(server.url + "/ready").status_code == 200)
    assert "SIGKILL" in server.log()


def test_a_server_whose_engine_cannot_start_says_why_and_ends(start_server):
    server = start_server(environ={"SCRIPTED_START": "fail"})
    assert server.process.wait(60) != 0
    assert "NotEnoughMemoryError: The model needs 9 GiB" in server.log()


def test_before_the_engine_is_ready_health_is_fine_and_ready_is_not(start_server, tmp_path):
    path = tmp_path / "socket"
    server = start_server(environ={"SCRIPTED_START": "hang"}, uds=str(path))
    server.wait_for(path.exists)
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost", timeout=60) as client:
        assert client.get("/health").status_code == 200
        reply = client.get("/ready")
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_not_ready")
        assert int(reply.headers["retry-after"]) > 0
        reply = client.post("/v1/completions", json=BODY)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_not_ready")
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 16384
        assert "vashista_engine_ready 0.0" in client.get("/metrics").text


def test_a_server_that_gave_up_on_its_engine_says_so_and_stays(start_server, script):
    server = start_server(max_engine_restarts=0).wait_ready()
    assert server.complete(seed=script.DIE, max_tokens=9).status_code == 503
    reply = server.wait_for(lambda: (r := httpx.get(server.url + "/ready")).json().get("error") and r)
    server.wait_for(lambda: httpx.get(server.url + "/ready").json()["error"]["code"] == "engine_failed")
    assert reply.status_code == 503
    assert httpx.get(server.url + "/health").status_code == 200
    assert "exit status 7" in server.complete().json()["error"]["message"]


def test_a_full_queue_answers_429_with_retry_after(start_server, script):
    server = start_server(max_running_requests=1, max_queued_requests=2).wait_ready()
    threads = [threading.Thread(target=server.complete, kwargs={"seed": script.HANG}) for _ in range(2)]
    for thread in threads:
        thread.start()
    server.wait_for(lambda: len(server.engine_messages("Submit")) == 2)
    reply = server.complete(n=2)
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "queue_full")
    assert reply.json()["error"]["type"] == "rate_limit_error"
    assert int(reply.headers["retry-after"]) >= 1
    child = server.engine_pid()
    os.kill(child, signal.SIGKILL)
    for thread in threads:
        thread.join()
    server.wait_for(lambda: server.complete(n=2).status_code == 200)


def test_waiting_tokens_are_bounded_too(start_server, script):
    server = start_server(max_queued_tokens=10, drain_timeout_s=0).wait_ready()
    thread = threading.Thread(target=server.complete, kwargs={"seed": script.HANG, "prompt": [5] * 8})
    thread.start()
    server.wait_for(lambda: len(server.engine_messages("Submit")) == 1)
    reply = server.complete(prompt=[5] * 3)
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "queue_full")
    assert "prompt tokens are waiting" in reply.json()["error"]["message"]
    server.process.send_signal(signal.SIGTERM)
    thread.join()


def test_sigterm_lets_accepted_requests_finish_and_refuses_new_ones(start_server):
    server = start_server(environ={"SCRIPTED_STEP_S": "0.02"}).wait_ready()
    with httpx.Client(timeout=60) as client:
        body = {**BODY, "max_tokens": 60, "stream": True}
        reply = client.send(client.build_request("POST", server.url + "/v1/completions", json=body), stream=True)
        lines = reply.iter_lines()
        text = next(lines)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(lambda: "draining" in server.log())
        refused = server.complete()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert httpx.get(server.url + "/ready").json()["error"]["code"] == "draining"
        assert httpx.get(server.url + "/health").status_code == 200
        rest = [text, *lines]
    assert rest[-2:] == ["data: [DONE]", ""]
    assert sum(line.startswith("data: {") for line in rest) == 60
    assert server.process.wait(30) == 0


def test_a_drain_ends_after_its_limit_with_a_named_error(start_server, script):
    server = start_server(drain_timeout_s=0.5).wait_ready()
    with httpx.stream(
        "POST", server.url + "/v1/completions", json={**BODY, "stream": True, "seed": script.ENDLESS}
    ) as reply:
        lines = reply.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
    assert server.process.wait(30) == 0


def test_a_second_signal_ends_the_server_at_once(start_server, script):
    server = start_server(drain_timeout_s=3600).wait_ready()
    child = server.engine_pid()
    thread = threading.Thread(target=ignore_errors, args=(server.complete,), kwargs={"seed": script.HANG})
    thread.start()
    server.wait_for(lambda: len(server.engine_messages("Submit")) == 1)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for(lambda: "draining" in server.log())
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 1
    thread.join()
    assert not os.path.exists(f"/proc/{child}")


def ignore_errors(call, **fields):
    try:
        call(**fields)
    except httpx.TransportError:
        return


def test_an_engine_does_not_outlive_a_killed_server(start_server):
    server = start_server().wait_ready()
    child = server.engine_pid()
    server.process.kill()
    server.process.wait()
    server.wait_for(lambda: not os.path.exists(f"/proc/{child}") or "Z" in process_state(child))


def process_state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def test_what_is_announced_is_a_curl_command_that_works(start_server):
    server = start_server().wait_ready()
    command = next(line for line in server.announcement.splitlines() if "curl" in line)
    output = subprocess.run(shlex.split(command), capture_output=True, text=True, check=True).stdout
    assert json.loads(output)["usage"]["completion_tokens"] == 32


def test_a_server_whose_stdout_is_on_a_full_disk_serves_all_the_same(tmp_path):
    settings = {"model": str(MODEL), "state_dir": str(tmp_path / "state"), "uds": str(tmp_path / "s")}
    with Path("/dev/full").open("w") as full, (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "run_server.py"), "scripted", json.dumps(settings)], stdout=full, stderr=log
        )
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=settings["uds"], retries=50)) as client:
            end_s = time.monotonic() + 60
            while "cannot be written to stdout" not in (text := (tmp_path / "log").read_text()):
                assert process.poll() is None, text
                assert time.monotonic() < end_s, text
                time.sleep(0.01)
            assert client.get("http://localhost/ready").status_code == 200
    finally:
        process.terminate()
        process.wait(60)
