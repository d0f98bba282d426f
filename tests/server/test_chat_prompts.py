"""A chat template that takes all it can get: its own request gets an error, nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from vashista.engine.errors import ChatTemplateError, ChatTemplateFileError, TokenizerError
from vashista.server import chat_prompts
from vashista.server.chat_prompts import INLINE_MESSAGES, ChatPrompts, messages_for_template

PLAIN = Path(__file__).parents[1] / "data/plain/reference-26m"
SERVED = Path(__file__).parents[2] / "deploy/models/reference-26m"
WIDE = "1" + "0" * 9
NESTED = "{% set ns = namespace(l=['x']) %}{% for i in range(40) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}"
HOSTILE = {
    "format": "{{ '%" + WIDE + "s' | format('x') }}",
    "star format": "{{ '%*d' | format(" + WIDE + ", 1) }}",
    "center": "{{ 'x' | center(" + WIDE + ") }}",
    "ljust": "{{ 'x'.ljust(" + WIDE + ") }}",
    "str.format": "{{ '{:>" + WIDE + "}'.format('x') }}",
    "indent": "{{ 'a\\nb' | indent(" + WIDE + ") }}",
    "tojson indent": "{{ [1] | tojson(indent=" + WIDE + ") }}",
    "replace": "{{ ('x' * 10000000).replace('x', 'y' * 10000) }}",
    "join": "{{ ('y' * 1000000).join('x' * 100000) }}",
    "nested output": NESTED + "{{ ns.l }}",
    "nested tojson": NESTED + "{{ ns.l | tojson }}",
    "slice": "{{ [1] | slice(" + WIDE + ", 0) | list | length }}",
    "sort": "{{ ('x' * 10000000) | list | sort | length }}",
    "doubled": "{% set ns = namespace(s='x') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "numbers": "{{ (1).to_bytes(" + WIDE + ", 'big') | length }}",
    "kept": "{% set ns = namespace(l=[]) %}{% for i in range(90) %}"
    "{% set ns.l = ns.l + ['x' * 30000000 ~ i] %}{% endfor %}{{ ns.l | length }}",
}
MESSAGES = [{"role": "user", "content": "hello"}]


def model_with(folder: Path, template: str, source: Path = PLAIN) -> Path:
    """A model folder whose template is the given one for messages that say `evil`."""
    shutil.copytree(source, folder)
    usual = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chosen = "{% if messages[0].content == 'evil' %}" + template + "{% else %}" + usual + "{% endif %}"
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(chosen)
    return folder


def with_prompts(folder: Path, use: Callable[[ChatPrompts], Awaitable[None]], max_body_bytes: int = 1 << 20) -> None:
    async def run() -> None:
        prompts = ChatPrompts(folder, max_body_bytes)
        assert await asyncio.to_thread(prompts.start)
        try:
            await use(prompts)
        finally:
            prompts.close()

    asyncio.run(run())


def peak_bytes(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_template_that_makes_much_of_little_is_stopped_and_the_next_prompt_is_written(
    source: str, tmp_path: Path
) -> None:
    async def use(prompts: ChatPrompts) -> None:
        start_s = time.monotonic()
        with pytest.raises(ChatTemplateError, match=r"was stopped"):
            await prompts.render([{"role": "user", "content": "evil"}], {})
        assert time.monotonic() - start_s < 10
        assert await prompts.render(MESSAGES, {}) == "hello"
        assert prompts._process is not None
        assert peak_bytes(prompts._process.pid) < prompts._memory_bytes

    with_prompts(model_with(tmp_path / "model", source), use)


@pytest.mark.parametrize("source", ["{{ 'x' | center(300000000) }}", "{% set x = 'x' | center(300000000) %}"])
def test_a_constant_expression_is_not_computed_when_the_template_is_loaded(source: str, tmp_path: Path) -> None:
    async def use(prompts: ChatPrompts) -> None:
        assert prompts._process is not None
        assert peak_bytes(prompts._process.pid) < 200 << 20

    with_prompts(model_with(tmp_path / "model", source), use)


def test_prompts_are_those_of_the_template_whatever_their_size(tmp_path: Path) -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    source += "{% if add_generation_prompt %}[{{ x }}]{% endif %}"
    shutil.copytree(PLAIN, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(source)

    async def use(prompts: ChatPrompts) -> None:
        assert await prompts.render(MESSAGES, {"x": "a"}) == "[user]hello[a]"
        assert await prompts.render(MESSAGES, {"x": 10**30}, opens_turn=False) == "[user]hello"
        long = "日本 😀" * 1_000_000
        assert await prompts.render([{"role": "user", "content": long}], {"x": ""}) == f"[user]{long}[]"
        unfinished = [*MESSAGES, {"role": "assistant", "content": "so"}]
        assert await prompts.render(unfinished, {}, is_unfinished=True) == "[user]hello[assistant]so"
        with pytest.raises(ChatTemplateError, match="only one of the assistant") as caught:
            await prompts.render(MESSAGES, {}, is_unfinished=True)
        assert caught.value.param == "messages"
        many = await asyncio.gather(*(prompts.render([{"role": "user", "content": str(n)}], {}) for n in range(50)))
        assert many == [f"[user]{n}[]" for n in range(50)]
        assert prompts.num_starts == 1

    with_prompts(tmp_path / "model", use, max_body_bytes=32 << 20)


def test_many_messages_are_rewritten_beside_the_event_loop() -> None:
    threads = set()

    class Message:
        def for_template(self) -> dict[str, Any]:
            threads.add(threading.current_thread())
            return {}

    message: Any = Message()
    assert asyncio.run(messages_for_template([message] * INLINE_MESSAGES)) == [{}] * INLINE_MESSAGES
    assert threads == {threading.main_thread()}
    threads.clear()
    assert asyncio.run(messages_for_template([message] * (INLINE_MESSAGES + 1))) == [{}] * (INLINE_MESSAGES + 1)
    assert threading.main_thread() not in threads


UNLIMITED = """
import resource, sys
def refuse(*arguments): raise {error}
resource.setrlimit = resource.{call} = refuse
from vashista.engine.template_worker import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("name", "call", "error"),
    [
        ("ljust", "setrlimit", 'ValueError("not allowed to raise maximum limit")'),  # as CPython says EPERM
        ("kept", "getrlimit", 'PermissionError(1, "Operation not permitted")'),
    ],
)
def test_memory_is_bounded_where_the_kernel_lets_nobody_set_a_limit(
    name: str, call: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = UNLIMITED.format(call=call, error=error)
    monkeypatch.setattr(chat_prompts, "COMMAND", (sys.executable, "-c", code))
    monkeypatch.setattr(chat_prompts, "MEMORY_BYTES", 256 << 20)

    async def use(prompts: ChatPrompts) -> None:
        with pytest.raises(ChatTemplateError, match="more memory than 288 MiB"):
            await prompts.render([{"role": "user", "content": "evil"}], {})
        assert await prompts.render(MESSAGES, {}) == "hello"

    with_prompts(model_with(tmp_path / "model", HOSTILE[name]), use)


def test_a_limit_of_memory_that_the_server_was_started_with_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = "import resource; resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))\n"
    limited += "import sys; from vashista.engine.template_worker import main; sys.exit(main())"
    monkeypatch.setattr(chat_prompts, "COMMAND", (sys.executable, "-c", limited))

    async def use(prompts: ChatPrompts) -> None:
        assert prompts._process is not None
        limits = Path(f"/proc/{prompts._process.pid}/limits").read_text()
        assert "Max address space         419430400            419430400" in limits
        assert await prompts.render(MESSAGES, {}) == "hello"

    with_prompts(model_with(tmp_path / "model", ""), use)


def test_a_start_that_fails_is_an_error_of_its_request_and_the_next_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = chat_prompts.COMMAND

    async def use(prompts: ChatPrompts) -> None:
        failing = [
            ((sys.executable, "-c", "import time; time.sleep(60)"), 1.0, "not ready after 1 s"),
            (("/nonexistent",), 60.0, "No such file"),
            ((sys.executable, "-c", ""), 60.0, "in the memory"),
        ]
        for wrong, timeout_s, words in failing:
            prompts._end("a test")
            monkeypatch.setattr(chat_prompts, "COMMAND", wrong)
            monkeypatch.setattr(chat_prompts, "START_TIMEOUT_S", timeout_s)
            with pytest.raises(ChatTemplateFileError, match=words):
                await prompts.render(MESSAGES, {})
            assert prompts._process is None
            monkeypatch.setattr(chat_prompts, "COMMAND", command)
            monkeypatch.setattr(chat_prompts, "START_TIMEOUT_S", 60.0)
            assert await prompts.render(MESSAGES, {}) == "hello"

    with_prompts(model_with(tmp_path / "model", ""), use)


def test_a_process_that_dies_and_a_client_that_leaves_cost_a_new_process_and_nothing_more(tmp_path: Path) -> None:
    async def use(prompts: ChatPrompts) -> None:
        assert prompts._process is not None
        prompts._process.kill()
        prompts._process.wait()
        assert await prompts.render(MESSAGES, {}) == "hello"
        dying = asyncio.create_task(prompts.render([{"role": "user", "content": "evil"}], {}))
        await asyncio.sleep(0.1)
        prompts._process.kill()
        with pytest.raises(ChatTemplateError, match="took its process down"):
            await dying
        assert await prompts.render(MESSAGES, {}) == "hello"
        leaving = asyncio.create_task(prompts.render([{"role": "user", "content": "evil"}], {}))
        await asyncio.sleep(0.1)
        leaving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leaving
        assert await prompts.render(MESSAGES, {}) == "hello"
        assert prompts.num_starts == 4

    with_prompts(model_with(tmp_path / "model", HOSTILE["nested tojson"]), use)


def test_a_template_that_writes_no_text_is_named(tmp_path: Path) -> None:
    async def use(prompts: ChatPrompts) -> None:
        with pytest.raises(ChatTemplateError, match="no text: surrogates"):
            await prompts.render([{"role": "user", "content": "evil"}], {})

    with_prompts(model_with(tmp_path / "model", "{{ '\\ud800' }}"), use)


def test_what_is_wrong_with_a_folder_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for template, error in (("{% if %}", ChatTemplateFileError), ("", None)):
        folder = tmp_path / f"model{len(template)}"
        shutil.copytree(PLAIN, folder)
        if error is not None:
            (folder / "chat_template.jinja").write_text(template)
            with pytest.raises(error, match="error in line 1"):
                ChatPrompts(folder, 1 << 20).start()
    (folder / "tokenizer_config.json").write_text('{"chat_template": 7}')
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(TokenizerError, match="chat_template must be"):
        ChatPrompts(folder, 1 << 20).start()
    (folder / "chat_template.jinja").write_text("{{ x }}" * 1_000_000)
    monkeypatch.setattr(chat_prompts, "MEMORY_BYTES", 40 << 20)
    with pytest.raises(ChatTemplateFileError, match="cannot be compiled"):
        ChatPrompts(folder, 0).start()


def test_over_http_others_are_answered_meanwhile_and_the_servers_memory_stays(
    start_server: Any, tmp_path: Path
) -> None:
    model = model_with(tmp_path / "model", HOSTILE["nested tojson"], SERVED)
    server = start_server("real", model=str(model), served_model_name="reference-26m").wait_ready()
    assert server.complete().status_code == 200
    before = peak_bytes(server.process.pid)
    replies: list[httpx.Response] = []

    def attack() -> None:
        for _ in range(3):
            replies.append(server.chat(messages=[{"role": "user", "content": "evil"}]))

    attacker = threading.Thread(target=attack)
    attacker.start()
    waits_s = []
    while attacker.is_alive():
        start_s = time.monotonic()
        assert httpx.get(server.url + "/health").status_code == 200
        waits_s.append(time.monotonic() - start_s)
        assert server.complete().status_code == 200
    assert [(reply.status_code, reply.json()["error"]["code"]) for reply in replies] == [(400, "invalid_messages")] * 3
    assert "was stopped" in replies[0].json()["error"]["message"]
    assert len(waits_s) > 5
    assert sorted(waits_s)[len(waits_s) // 2] < 0.5
    assert peak_bytes(server.process.pid) - before < 100 << 20
    assert server.chat(messages=MESSAGES).status_code == 200
