"""Every setting of the server, declared once: its name, type, default, range and meaning.

Values come from command line flags, then `VASHISTA_*` environment variables, then a TOML file (`--config FILE` or
`VASHISTA_CONFIG`; none is read unless it is named), then the defaults here. The commands in `server/commands/` make
their flags from this model and call `load_settings`; the frozen result goes to `server/serve.py`, and as an
`EngineConfig` to the engine process. A setting that is unknown, mistyped or out of range is a `SettingsError`: no
value is ever corrected. Their types are in `server/setting_types.py`, README's table in `server/settings_table.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.config import JsonDict

from vashista.engine.config import EngineConfig
from vashista.server.prices import Prices
from vashista.server.setting_types import (
    AutoCount,
    AutoNumber,
    AutoSize,
    FilePath,
    Networks,
    Size,
    check_device,
    check_name,
)
from vashista.server.settings_sources import (
    CONFIG_VARIABLE,
    ENV_PREFIX,
    flag_name,
    invalid_settings,
    read_environ,
    read_toml,
    unknown_setting,
)

MODEL: JsonDict = {"group": "Model"}
LISTEN: JsonDict = {"group": "Listening"}
ISOLATION: JsonDict = {"group": "Isolation"}
ENGINE: JsonDict = {"group": "Engine"}
ATTENTION: JsonDict = {"group": "Attention"}
LIMITS: JsonDict = {"group": "Limits"}
LEDGER: JsonDict = {"group": "Ledger"}
PRICES: JsonDict = {"group": "Prices"}
LIFETIME: JsonDict = {"group": "Starting and stopping"}
LOGS: JsonDict = {"group": "Logs and documentation"}


class Settings(BaseModel):
    """All settings of `vashista serve`, checked and frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    model: FilePath = Field(
        description="Folder of the model, in the Hugging Face layout. Required.", json_schema_extra=MODEL
    )
    served_model_name: Annotated[str | None, AfterValidator(check_name)] = Field(
        None,
        min_length=1,
        max_length=256,
        description="Name of the model in requests and replies; the folder's name unless given.",
        json_schema_extra=MODEL,
    )
    device: Annotated[str, AfterValidator(check_device)] = Field(
        "auto",
        description="`auto` (the first GPU, else the CPU), `cpu`, `cuda` or `cuda:N`.",
        json_schema_extra=MODEL,
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type of weights and KV cache; `auto` is the checkpoint's on a GPU, float32 on a CPU.",
        json_schema_extra=MODEL,
    )
    max_context: AutoCount = Field(
        None,
        ge=1,
        description="Tokens of prompt and output together that a request may have; `auto` is the model's own limit.",
        json_schema_extra=MODEL,
    )

    model_trust: FilePath | None = Field(
        None,
        description="Public key in PEM, or folder of them, whose owners may sign models; see docs/models.md.",
        json_schema_extra=MODEL,
    )
    verify_model: Literal["auto", "full", "fast", "off"] = Field(
        "auto",
        description="Check of the model's signature before it is loaded: `full` reads every byte at every start, "
        "`fast` only files that were touched since they were read, `off` nothing; `auto` is `fast` where model_trust "
        "is given, else `off`.",
        json_schema_extra=MODEL,
    )

    host: str = Field("127.0.0.1", min_length=1, description="IP address to listen on.", json_schema_extra=LISTEN)
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes a free one.", json_schema_extra=LISTEN)
    fd: int | None = Field(
        None,
        ge=0,
        description="Listening socket inherited under this number; no host or port.",
        json_schema_extra=LISTEN,
    )
    uds: FilePath | None = Field(
        None, description="Unix socket to listen on instead of host and port.", json_schema_extra=LISTEN
    )
    tls_certificate: FilePath | None = Field(
        None,
        description="Certificate in PEM, the ones up to its CA behind it: the server then speaks HTTPS alone; see "
        "docs/tls.md.",
        json_schema_extra=LISTEN,
    )
    tls_key: FilePath | None = Field(
        None, description="Private key of tls_certificate in PEM, without a password.", json_schema_extra=LISTEN
    )
    tls_client_ca: FilePath | None = Field(
        None,
        description="CA certificates in PEM: only clients with a certificate of theirs are let in.",
        json_schema_extra=LISTEN,
    )
    state_dir: FilePath = Field(
        Path("~/.local/state/vashista"),
        description="Folder of what outlives a restart, such as the API keys.",
        json_schema_extra=LISTEN,
    )

    isolation: Literal["none", "lan", "required"] = Field(
        "none",
        description="`required`: serve only in a network of its own with nothing but lo, which the server makes where "
        "unit or container have not and the kernel lets it; only the listening socket leads in. `lan`: stay on the "
        "network, with the filter and a list of client networks. `none`: no promise.",
        json_schema_extra=ISOLATION,
    )
    network_filter: bool = Field(
        True,
        description="Have the kernel refuse the server and the engine every new socket that is not a Unix one, every "
        "connection, and io_uring; attempts are counted.",
        json_schema_extra=ISOLATION,
    )
    client_networks: Networks | None = Field(
        None,
        description="Networks whose clients are answered, such as `192.0.2.0/24, 2001:db8::/32`; connections of others "
        "are closed at once. All unless given.",
        json_schema_extra=ISOLATION,
    )

    page_size: int = Field(
        64, ge=16, le=256, description="Tokens in a page of the KV cache; a power of two.", json_schema_extra=ENGINE
    )
    kv_cache_bytes: AutoSize = Field(
        None, ge=1, description="Size of the KV cache; `auto` follows kv_memory_fraction.", json_schema_extra=ENGINE
    )
    kv_memory_fraction: AutoNumber = Field(
        None,
        gt=0,
        le=1,
        description="Share of the memory left after the weights that the KV cache may take, unless kv_cache_bytes is "
        "given; `auto` is 0.85 on a GPU and 0.3 on a CPU.",
        json_schema_extra=ENGINE,
    )
    max_running_requests: int = Field(
        64, ge=1, le=4096, description="Requests that run at the same time.", json_schema_extra=ENGINE
    )
    max_batch_tokens: AutoCount = Field(
        None,
        ge=1,
        le=1 << 20,
        description="Token budget of one step; `auto` is 8192 on a GPU and 512 on a CPU.",
        json_schema_extra=ENGINE,
    )
    max_token_gap_s: AutoNumber = Field(
        None,
        ge=0.001,
        le=3600,
        description="The longest that a running stream is to wait for its next token: prompts beside it are read in "
        "smaller pieces, and requests wait for which that could not be kept; `auto` promises nothing.",
        json_schema_extra=ENGINE,
    )
    prefix_caching: bool = Field(True, description="Reuse pages of equal prompt beginnings.", json_schema_extra=ENGINE)
    num_threads: AutoCount = Field(
        None,
        ge=1,
        le=1024,
        description="CPU threads of the engine; `auto` is the cores this process may use.",
        json_schema_extra=ENGINE,
    )

    attention: Literal["auto", "vashista", "mean_key", "quest", "sinks_recent", "dense"] = Field(
        "auto",
        description="Attention module. `vashista` serves dense and sparse requests; `dense` keeps no key summaries; "
        "the others rank tokens by other rules, for comparison (the paper's mean key, Quest's box, sinks plus window); "
        "`auto` is `vashista` where model and device allow it or attention_mode is sparse, else `dense`.",
        json_schema_extra=ATTENTION,
    )
    attention_mode: Literal["dense", "sparse"] = Field(
        "dense", description="How requests attend that do not say it.", json_schema_extra=ATTENTION
    )
    max_dropped_mass: float = Field(
        0.03,
        ge=0.001,
        lt=1,
        description="Share of the attention mass that sparse requests without a limit of their own may leave out on "
        "average; not given together with token_budget.",
        json_schema_extra=ATTENTION,
    )
    token_budget: AutoCount = Field(
        None,
        ge=96,
        le=1 << 30,
        description="Tokens that each KV head keeps for such requests instead; `auto` goes by max_dropped_mass.",
        json_schema_extra=ATTENTION,
    )
    min_token_budget: int = Field(
        256,
        ge=96,
        le=1 << 30,
        description="Least token_budget that a request may ask for.",
        json_schema_extra=ATTENTION,
    )
    max_allowed_dropped_mass: float = Field(
        0.5,
        ge=0.001,
        lt=1,
        description="Most max_dropped_mass that a request may ask for.",
        json_schema_extra=ATTENTION,
    )
    audit_rate: AutoNumber = Field(
        None,
        ge=0,
        le=1,
        description="Share of the sparse (token, layer, KV head) whose dropped mass is measured exactly; `auto` is "
        "1/1024 on a CPU and 1/2048 on a GPU.",
        json_schema_extra=ATTENTION,
    )
    dense_below: AutoCount = Field(
        None,
        ge=0,
        description="Sparse requests attend in full to contexts of fewer tokens; `auto` is 2048 on a CPU, 8192 on a "
        "GPU, below which it costs no more.",
        json_schema_extra=ATTENTION,
    )
    support_profile: FilePath | None = Field(
        None,
        description="File that `vashista calibrate` wrote; unless given, support_profile.json in the model's folder, "
        "where there is one.",
        json_schema_extra=ATTENTION,
    )

    max_queued_requests: int = Field(
        512, ge=1, le=1_000_000, description="Requests that may wait; more get 429.", json_schema_extra=LIMITS
    )
    max_queued_tokens: int = Field(
        1 << 20, ge=1, description="Prompt tokens of waiting requests; more get 429.", json_schema_extra=LIMITS
    )
    max_body_bytes: Size = Field(
        16 << 20, ge=1024, le=1 << 30, description="Largest request body.", json_schema_extra=LIMITS
    )
    max_body_values: int = Field(
        1 << 17,
        ge=1024,
        le=100_000_000,
        description="Strings (names of members too), lists and objects of a request body, of which a chat message has "
        "five; of values in all, numbers too, it may have eight times as many.",
        json_schema_extra=LIMITS,
    )
    max_stops: int = Field(
        16, ge=0, le=256, description="Stop strings and stop token ids of a request, each.", json_schema_extra=LIMITS
    )
    max_logprobs: int = Field(
        20, ge=0, le=1000, description="Alternatives a token that a request may ask for.", json_schema_extra=LIMITS
    )
    max_n: int = Field(16, ge=1, le=1024, description="Largest `n` of a request.", json_schema_extra=LIMITS)
    default_max_tokens: int = Field(
        1024,
        ge=1,
        description="`max_tokens` of a chat request that gives none, or what fits into the context if that is less. "
        "A completion's default is 16, as OpenAI's.",
        json_schema_extra=LIMITS,
    )
    write_timeout_s: float = Field(
        60.0,
        gt=0,
        le=86400,
        description="Seconds after which a client that reads nothing of its reply is cut off and its request aborted.",
        json_schema_extra=LIMITS,
    )

    ledger_sync: Literal["full", "normal"] = Field(
        "full",
        description="`full` syncs the disk at every commit, so that receipts survive a power cut; with `normal` they "
        "survive a killed process, and the last ones may be lost with the machine.",
        json_schema_extra=LEDGER,
    )
    ledger_on_failure: Literal["refuse", "serve"] = Field(
        "refuse",
        description="When receipts cannot be written: refuse requests with 503, or serve them without, with an alarm "
        "in the log and in vashista_answers_without_receipt_total.",
        json_schema_extra=LEDGER,
    )
    ledger_prompts: Literal["off", "encrypted"] = Field(
        "off",
        description="Keep request bodies beside their receipts, sealed with ledger_prompt_key; only the owner of the "
        "private key can read them.",
        json_schema_extra=LEDGER,
    )
    ledger_prompt_key: FilePath | None = Field(
        None,
        description="X25519 public key in PEM for ledger_prompts.",
        json_schema_extra=LEDGER,
    )

    price_per_machine_hour: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="Of an hour in which the engine computes; each request pays for its share of it.",
        json_schema_extra=PRICES,
    )
    price_per_kwh: float = Field(
        0.0, ge=0, le=1e6, description="Of the energy that a request took.", json_schema_extra=PRICES
    )
    price_per_request: float = Field(
        0.0, ge=0, le=1e6, description="Of each request that was admitted.", json_schema_extra=PRICES
    )
    currency: str = Field("EUR", pattern=r"^[A-Za-z]{1,12}$", description="Of the prices.", json_schema_extra=PRICES)
    power_w: float = Field(
        200.0,
        ge=0,
        le=1e6,
        description="Watts that the machine draws while the engine computes, where neither NVML nor RAPL measures it.",
        json_schema_extra=PRICES,
    )

    drain_timeout_s: float = Field(
        30.0,
        ge=0,
        le=86400,
        description="Seconds that accepted requests may still take after SIGTERM.",
        json_schema_extra=LIFETIME,
    )
    engine_start_timeout_s: float = Field(
        600.0, gt=0, le=86400, description="Seconds the engine may take to load the model.", json_schema_extra=LIFETIME
    )
    engine_stall_timeout_s: float = Field(
        120.0,
        gt=0,
        le=86400,
        description="Seconds without a sign of life after which the engine is killed and started again.",
        json_schema_extra=LIFETIME,
    )
    max_engine_restarts: int = Field(
        5,
        ge=0,
        le=1000,
        description="Restarts of the engine within ten minutes before the server gives up.",
        json_schema_extra=LIFETIME,
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level that is logged, on stderr.", json_schema_extra=LOGS
    )
    log_format: Literal["text", "json"] = Field("text", description="Form of a log line.", json_schema_extra=LOGS)
    api_docs: bool = Field(True, description="Serve /docs and /openapi.json.", json_schema_extra=LOGS)

    @field_validator("*", mode="before")
    @classmethod
    def _check_kind(cls, value: object, info: Any) -> object:
        """Refuse true for 1 and 1 for true, which pydantic would take."""
        wants_bool = cls.model_fields[info.field_name].annotation is bool
        if isinstance(value, bool) and not wants_bool:
            raise ValueError("should not be true or false")
        if wants_bool and not isinstance(value, bool | str):
            raise ValueError("should be true or false")
        return value

    @model_validator(mode="after")
    def _check_model_name(self) -> Self:
        try:
            check_name(self.model_name)
        except ValueError as error:
            raise ValueError(
                f"the model's folder is named {self.model_name!r}, and a model's name {error}: give served_model_name"
            ) from error
        return self

    @model_validator(mode="after")
    def _check_attention(self) -> Self:
        if self.attention == "dense" and self.attention_mode == "sparse":
            raise ValueError(
                "the setting attention_mode is sparse, but attention is dense: choose another attention, as vashista"
            )
        if self.token_budget is not None and "max_dropped_mass" in self.model_fields_set:
            raise ValueError(
                f"the settings token_budget ({self.token_budget}) and max_dropped_mass ({self.max_dropped_mass:g}) are"
                " both given: choose one limit"
            )
        if self.token_budget is not None and self.token_budget < self.min_token_budget:
            raise ValueError(
                f"the setting token_budget is {self.token_budget}: should be at least min_token_budget, which is"
                f" {self.min_token_budget}"
            )
        if self.token_budget is None and self.max_dropped_mass > self.max_allowed_dropped_mass:
            raise ValueError(
                f"the setting max_dropped_mass is {self.max_dropped_mass:g}: should be at most"
                f" max_allowed_dropped_mass, which is {self.max_allowed_dropped_mass:g}"
            )
        return self

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.page_size & (self.page_size - 1):
            raise ValueError(f"the setting page_size is {self.page_size}: should be 16, 32, 64, 128 or 256")
        if self.max_batch_tokens is not None and self.max_batch_tokens < self.max_running_requests:
            raise ValueError(
                f"the setting max_batch_tokens is {self.max_batch_tokens}: should be at least max_running_requests, "
                f"which is {self.max_running_requests}"
            )
        if (self.ledger_prompts == "encrypted") != (self.ledger_prompt_key is not None):
            raise ValueError(
                f"the setting ledger_prompts is {self.ledger_prompts} and ledger_prompt_key is "
                f"{self.ledger_prompt_key or 'not given'}: encrypted needs a key, and a key needs encrypted"
            )
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("the settings tls_certificate and tls_key belong together: give both or none")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("the setting tls_client_ca is given, but tls_certificate is not: it needs one")
        if self.isolation != "none" and not self.network_filter:
            raise ValueError(
                f"the setting isolation is {self.isolation}, but network_filter is off: isolation needs the filter"
            )
        if self.isolation == "lan" and not self.client_networks:
            raise ValueError(
                "the setting isolation is lan, but client_networks is not given: name the networks of the clients"
            )
        listening = {"fd", "uds"} & {name for name in self.model_fields_set if getattr(self, name) is not None}
        if listening == {"fd", "uds"}:
            raise ValueError("the settings fd and uds are both given: choose one way to listen")
        unused = {"host", "port"} & self.model_fields_set
        if listening and unused:
            raise ValueError(
                f"the settings {listening.pop()} and {sorted(unused)[0]} are both given: choose one way to listen"
            )
        return self

    @property
    def model_name(self) -> str:
        """The name that requests use."""
        return self.served_model_name or self.model.resolve().name

    @property
    def keys_path(self) -> Path:
        """The database of API keys, for `KeyStore`."""
        return self.state_dir / "keys.db"

    def prices(self) -> Prices:
        """What busy time and energy cost."""
        return Prices(
            per_machine_hour=self.price_per_machine_hour,
            per_kwh=self.price_per_kwh,
            per_request=self.price_per_request,
            currency=self.currency,
            power_w=self.power_w,
        )

    def engine_config(self) -> EngineConfig:
        """What the engine process is told at its start: every setting that `EngineConfig` has too."""
        names = set(EngineConfig.__struct_fields__) & set(type(self).model_fields)
        values = {name: getattr(self, name) for name in names}
        if self.attention == "auto" and self.attention_mode == "sparse":
            values["attention"] = "vashista"  # else requests that ask for nothing would be refused, one by one
        values["support_profile"] = None if self.support_profile is None else str(self.support_profile)
        return EngineConfig(model_dir=str(self.model), **values)


def load_settings(
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    *,
    config: Path | None = None,
    defaults: Mapping[str, object] | None = None,
) -> Settings:
    """Settings from flags (given ones only), environment and TOML file; SettingsError names what is wrong and where.

    `defaults` come after all of them, for a command that does not use a required setting.
    """
    if config is None and environ.get(CONFIG_VARIABLE):
        config = Path(environ[CONFIG_VARIABLE])
    values = dict(defaults or {})
    origins: dict[str, str] = {}
    sources: list[tuple[Mapping[str, object], str]] = []
    if config is not None:
        sources.append((read_toml(config), f"{{name}} in {config}"))
    sources.append((read_environ(environ), "the environment variable {variable}"))
    sources.append((flags, "the flag {flag}"))
    for source, origin in sources:
        for name, value in source.items():
            names = {"name": name, "variable": ENV_PREFIX + name.upper(), "flag": flag_name(name)}
            origins[name] = origin.format(**names)
            if name not in Settings.model_fields:
                raise unknown_setting(name, origins[name], Settings.model_fields)
            values[name] = value
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise invalid_settings(error, values, origins) from None
