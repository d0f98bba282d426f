"""Settings: where they come from, which comes first, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vashista.engine.config import EngineConfig
from vashista.engine.errors import SettingsError
from vashista.server.commands.serve import serve
from vashista.server.setting_types import parse_size
from vashista.server.settings import Settings, load_settings
from vashista.server.settings_table import settings_table, size_text


def load(flags: dict[str, object] | None = None, environ: dict[str, str] | None = None, **more: object) -> Settings:
    return load_settings({"model": "m", **(flags or {})}, environ or {}, **more)


def write_toml(folder: Path, text: str) -> Path:
    path = folder / "vashista.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_flag_comes_before_the_environment_which_comes_before_the_file(tmp_path: Path) -> None:
    config = write_toml(tmp_path, "port = 1\nmax_n = 1\nmax_stops = 1\n")
    environ = {"VASHISTA_PORT": "2", "VASHISTA_MAX_N": "2"}
    settings = load({"port": "3"}, environ, config=config)
    assert (settings.port, settings.max_n, settings.max_stops) == (3, 2, 1)


def test_the_file_may_be_named_by_the_environment_and_the_flag_names_it_first(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first, second = write_toml(tmp_path, "port = 1"), write_toml(tmp_path / "other", "port = 2")
    assert load(environ={"VASHISTA_CONFIG": str(first)}).port == 1
    assert load(environ={"VASHISTA_CONFIG": str(first)}, config=second).port == 2


def test_no_file_is_read_unless_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_toml(tmp_path, "port = 1")
    monkeypatch.chdir(tmp_path)
    assert load().port == 8000


def test_every_setting_can_be_given_as_text() -> None:
    texts = {
        "model": "m", "served_model_name": "n", "device": "cuda:1", "dtype": "float16", "max_context": "100",
        "host": "::1", "port": "0", "state_dir": "s", "attention": "vashista", "page_size": "16",
        "attention_mode": "sparse", "max_dropped_mass": "0.1", "min_token_budget": "128",
        "max_allowed_dropped_mass": "0.2", "audit_rate": "0.01", "dense_below": "0", "support_profile": "p.json",
        "kv_cache_bytes": "4GiB", "kv_memory_fraction": "0.5", "max_running_requests": "3", "max_batch_tokens": "64",
        "prefix_caching": "off", "num_threads": "2", "max_token_gap_s": "0.5",
            "max_queued_requests": "9", "max_queued_tokens": "99",
        "max_body_bytes": "1MiB", "max_body_values": "2000",
        "max_stops": "1", "max_logprobs": "2", "max_n": "3", "default_max_tokens": "4",
        "drain_timeout_s": "0", "engine_start_timeout_s": "5", "engine_stall_timeout_s": "6",
        "max_engine_restarts": "7", "log_level": "debug", "log_format": "json", "api_docs": "false",
        "ledger_sync": "normal", "ledger_on_failure": "serve", "ledger_prompts": "encrypted",
        "ledger_prompt_key": "prompts.pub", "price_per_machine_hour": "3.5", "price_per_kwh": "0.3",
        "price_per_request": "0.01", "currency": "CHF", "power_w": "350", "write_timeout_s": "30",
        "model_trust": "trust", "verify_model": "full", "tls_certificate": "server.pem", "tls_key": "server.key",
        "tls_client_ca": "clients.pem",
        "isolation": "lan", "client_networks": "192.0.2.0/24",
    }  # fmt: skip
    exclusive = {"fd": "3", "uds": "/run/v.sock", "network_filter": "off", "token_budget": "256"}
    assert set(texts) | set(exclusive) == set(Settings.model_fields)
    settings = load_settings({}, {"VASHISTA_" + name.upper(): text for name, text in texts.items()})
    defaults = Settings(model=Path("x"))
    changed = {name for name in texts if getattr(settings, name) != getattr(defaults, name)}
    assert changed == set(texts)
    assert load({"fd": "3"}).fd == 3
    assert load({"network_filter": "off"}).network_filter is False
    assert load({"token_budget": "256"}).token_budget == 256
    assert load({"uds": "/run/v.sock"}).uds == Path("/run/v.sock")


@pytest.mark.parametrize(
    "name", ["max_context", "kv_cache_bytes", "kv_memory_fraction", "max_batch_tokens", "num_threads"]
)
def test_auto_stands_for_a_value_that_the_engine_chooses(name: str) -> None:
    assert getattr(load({name: "auto"}), name) is None


def test_an_unknown_flag_variable_or_line_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"The flag --prot is not a setting\. Did you mean port\?"):
        load({"prot": "1"})
    with pytest.raises(SettingsError, match=r"VASHISTA_MAX_CONTXT is not a setting\. Did you mean max_context\?"):
        load(environ={"VASHISTA_MAX_CONTXT": "1"})
    config = write_toml(tmp_path, "[server]\nport = 1\n")
    with pytest.raises(SettingsError, match=r"server in .*vashista\.toml is not a setting"):
        load(config=config)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("port", "65536", "less than or equal to 65535"),
        ("port", "-1", "greater than or equal to 0"),
        ("port", "80.5", "valid integer"),
        ("port", "", "valid integer"),
        ("port", True, "not be true or false"),
        ("api_docs", 1, "should be true or false"),
        ("api_docs", "maybe", "valid boolean"),
        ("drain_timeout_s", "nan", "finite"),
        ("drain_timeout_s", "inf", "finite"),
        ("kv_memory_fraction", "0", "greater than 0"),
        ("kv_memory_fraction", "1.01", "less than or equal to 1"),
        ("kv_cache_bytes", "4 parsecs", "a size such as 4GiB"),
        ("kv_cache_bytes", "-4GiB", "a size such as 4GiB"),
        ("kv_cache_bytes", "0", "greater than or equal to 1"),
        ("max_body_bytes", "0.3B", "whole number of bytes"),
        ("device", "tpu", "auto, cpu, cuda or cuda:N"),
        ("dtype", "int8", "'auto', 'float32', 'bfloat16' or 'float16'"),
        ("page_size", "48", "16, 32, 64, 128 or 256"),
        ("max_batch_tokens", "8", "at least max_running_requests"),
        ("served_model_name", "", "at least 1 character"),
        ("served_model_name", "a\nb", "should be one line of characters that can be shown"),
        ("served_model_name", "chat ", "without spaces at its ends"),
        ("model", "", "a path"),
        ("state_dir", "~no-such-user-here/x", "home"),
    ],
)
def test_a_wrong_value_is_refused_and_never_corrected(name: str, value: object, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason) as caught:
        load({name: value})
    assert name in caught.value.message or f"--{name.replace('_', '-')}" in caught.value.message


def test_the_message_says_where_the_wrong_value_came_from(tmp_path: Path) -> None:
    config = write_toml(tmp_path, 'max_n = "many"')
    with pytest.raises(SettingsError) as caught:
        load({"port": "x"}, {"VASHISTA_MAX_STOPS": "y"}, config=config)
    assert "The flag --port is 'x'" in caught.value.message
    assert "the environment variable VASHISTA_MAX_STOPS is 'y'" in caught.value.message
    assert f"max_n in {config} is 'many'" in caught.value.message


def test_a_folder_whose_name_is_no_models_needs_another_name(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"is named 'a\\nb', and a model's name should be one line .* served_model_name"
    ):
        load({"model": str(tmp_path / "a\nb")})
    assert load({"model": str(tmp_path / "a\nb"), "served_model_name": "ab"}).model_name == "ab"


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("max_n = 3\n", encoding="utf-8-sig")
    assert load(config=path).max_n == 3


def test_a_missing_model_is_named_with_the_three_ways_to_give_it() -> None:
    with pytest.raises(SettingsError, match="--model, VASHISTA_MODEL, or model in the file"):
        load_settings({}, {})


@pytest.mark.parametrize("text", [b"port = ", b"\xff\xfe"])
def test_a_broken_file_is_an_error_that_names_it(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(text)
    with pytest.raises(SettingsError, match=r"broken\.toml cannot be read"):
        load(config=path)
    with pytest.raises(SettingsError, match=r"missing\.toml cannot be read"):
        load(config=tmp_path / "missing.toml")


def test_two_limits_of_sparse_requests_are_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"token_budget \(512\) and max_dropped_mass \(0.1\) are both given: choose"
    ):
        load({"token_budget": "512", "max_dropped_mass": "0.1"})
    assert load({"max_dropped_mass": "0.1", "token_budget": "auto"}).token_budget is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"token_budget": "128"}, "token_budget is 128: should be at least min_token_budget, which is 256"),
        ({"max_allowed_dropped_mass": "0.02"}, "max_dropped_mass is 0.03: should be at most max_allowed_dropped_mass"),
    ],
)
def test_a_default_beyond_what_requests_may_ask_for_is_refused(flags: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load(flags)


def test_a_token_budget_is_the_default_whatever_mass_requests_may_drop() -> None:
    settings = load({"token_budget": "1024", "max_allowed_dropped_mass": "0.02"})
    assert (settings.token_budget, settings.max_allowed_dropped_mass) == (1024, 0.02)


@pytest.mark.parametrize("flags", [{"fd": "3", "uds": "/x"}, {"fd": "3", "port": "80"}, {"uds": "/x", "host": "::1"}])
def test_two_ways_to_listen_are_refused(flags: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="both given: choose one way to listen"):
        load(flags)


def test_defaults_of_a_command_come_after_everything_else() -> None:
    assert load_settings({}, {}, defaults={"model": "."}).model == Path()
    assert load_settings({}, {"VASHISTA_MODEL": "e"}, defaults={"model": "."}).model == Path("e")


def test_the_engine_is_told_every_setting_it_knows(tmp_path: Path) -> None:
    settings = load({"kv_cache_bytes": "2GiB", "prefix_caching": "no", "num_threads": "3", "max_context": "77"})
    config = settings.engine_config()
    assert (config.model_dir, config.kv_cache_bytes, config.prefix_caching) == ("m", 2 << 30, False)
    assert (config.num_threads, config.max_context) == (3, 77)
    assert set(EngineConfig.__struct_fields__) - set(Settings.model_fields) == {"model_dir", "quiet", "step_times"}


def test_defaults_are_those_of_the_engine() -> None:
    assert load().engine_config() == EngineConfig(model_dir="m")


def test_the_models_name_is_its_folders_unless_it_has_one() -> None:
    assert load({"model": "/srv/models/llama/"}).model_name == "llama"
    assert load({"served_model_name": "chat"}).model_name == "chat"


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load().port = 1  # type: ignore[misc]


def test_the_state_folder_is_in_the_home_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load().keys_path == tmp_path / ".local/state/vashista/keys.db"


def test_every_setting_has_a_group_and_a_sentence_of_meaning() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        assert isinstance(field.json_schema_extra, dict), name
        assert field.json_schema_extra["group"], name


def test_the_table_has_a_row_for_every_setting() -> None:
    rows = settings_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(Settings.model_fields)
    assert "| `max_body_bytes` | `--max-body-bytes` | 16MiB | at least 1KiB, at most 1GiB |" in settings_table()


def test_every_flag_of_the_table_is_one_of_serve_and_what_switches_off_is_named() -> None:
    """A switch's flag takes no value: who read `--prefix-caching` and `on, off` wrote `--prefix-caching off`."""
    known = {flag for option in serve.params for flag in (*option.opts, *option.secondary_opts)}
    told = {flag for row in settings_table().splitlines()[2:] for flag in re.findall(r"`(--[a-z-]+)`", row)}
    assert told == known - {"--config", "--help", "-h"}


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("0", 0), ("4096", 4096), ("1KB", 1000), ("1.5 kib", 1536), ("2TiB", 2 << 40)]
)
def test_a_size_is_read_with_decimal_and_binary_units(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@given(st.integers(0, 1 << 60))
def test_a_size_that_is_written_is_read_back_exactly(num_bytes: int) -> None:
    assert parse_size(size_text(num_bytes)) == num_bytes
