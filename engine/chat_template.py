"""Chat messages to the prompt the model was trained on, by the Jinja template of the model's publisher.

The server loads it once and renders each chat request. The environment follows transformers (its globals, filters,
extensions and white space rules) and is sandboxed and bounded (`engine/template_sandbox.py`): a template reads the
messages and writes text, nothing else, and not for ever.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser

from vashista.engine.errors import ChatTemplateError, ChatTemplateFileError, TokenizerError
from vashista.engine.model_folder import check_folder, read_optional_json_object, read_text
from vashista.engine.template_sandbox import TemplateLimitError, TemplateSandbox

FILE_NAME = "chat_template.jinja"
EXTRA_FOLDER = "additional_chat_templates"
Template = TypeVar("Template")
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """The chat templates of one model folder; most have one, some a second for tools."""

    def __init__(
        self, sources: Mapping[str, str], tokens: Mapping[str, Any], now: Callable[[], datetime] = datetime.now
    ) -> None:
        environment = self._environment = _environment(now)
        self._tokens = dict(tokens)
        self._templates: dict[str, jinja2.Template] = {}
        for name, source in sources.items():
            try:
                self._templates[name] = environment.from_string(source)
            except jinja2.TemplateSyntaxError as error:
                raise ChatTemplateFileError(
                    f"The model's chat template {name!r} has an error in line {error.lineno}: {error.message}."
                ) from error
            except RecursionError as error:
                raise ChatTemplateFileError(f"The model's chat template {name!r} is nested too deeply.") from error

    @classmethod
    def load(cls, folder: str | Path, now: Callable[[], datetime] = datetime.now) -> ChatTemplate | None:
        """The folder's templates, None when it has none; ChatTemplateFileError when one is no valid Jinja.

        Looks into chat_template.jinja and additional_chat_templates/, else into tokenizer_config.json.
        """
        path = check_folder(folder)
        config = read_optional_json_object(path / "tokenizer_config.json", TokenizerError)
        sources = _sources_in_files(path) or _sources_in_config(config.get("chat_template"))
        if not sources:
            return None
        older = read_optional_json_object(path / "special_tokens_map.json", TokenizerError)
        return cls(sources, _special_tokens(older) | _special_tokens(config), now)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt, control tokens included (encode it without adding special tokens).

        `variables` are the publisher's own, such as `enable_thinking`. ChatTemplateError with the template's message
        when it refuses the messages.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise ChatTemplateError(
                f"The model has chat templates named {', '.join(self._templates)}, but none named default."
            )
        values = self._tokens | variables | {"messages": messages, "tools": tools, "documents": documents}
        try:
            values["add_generation_prompt"] = add_generation_prompt
            return self._environment.render(self._templates[name], values)
        except TemplateLimitError as error:
            raise ChatTemplateError(f"The model's chat template was stopped: {error}.") from error
        except MemoryError as error:
            raise ChatTemplateError(
                "The model's chat template was stopped: it takes more memory than there is for it."
            ) from error
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"The model's chat template refuses the messages: {error}.") from error
        except Exception as error:  # a template can run into any error that Python expressions have
            raise ChatTemplateError(
                f"The model's chat template fails on the messages: {type(error).__name__}: {error}."
            ) from error

    def render_unfinished(self, messages: Sequence[Mapping[str, Any]], /, **variables: Any) -> str:
        """The prompt up to the end of the last message, the assistant's, which the reply is to continue.

        Found by a mark behind that message, so what the template adds after a message is left out. ChatTemplateError
        when the last message is another's, or when the template does not end it with its own words.
        """
        *before, last = messages
        if last["role"] != "assistant":
            raise ChatTemplateError(
                f"The last message is of the role {last['role']!r}; only one of the assistant can be continued.",
                param="messages",
            )
        mark = uuid.uuid4().hex
        marked = {**last, "content": last["content"] + mark}
        text, found, rest = self.render([*before, marked], add_generation_prompt=False, **variables).partition(mark)
        if not found or mark in rest:
            raise ChatTemplateError(
                "The model's chat template does not show the last message once and to its end, so the reply cannot "
                "continue it.",
                param="messages",
            )
        return text


def require_chat_template(template: Template | None) -> Template:
    """The template, or ChatTemplateError that says what to do without one."""
    if template is None:
        raise ChatTemplateError(
            f"The model has no chat template: call /v1/completions with a prompt, or add {FILE_NAME} to its folder."
        )
    return template


def _sources_in_files(folder: Path) -> dict[str, str]:
    sources = {}
    if (folder / FILE_NAME).exists():
        sources["default"] = read_text(folder / FILE_NAME)
    for path in sorted((folder / EXTRA_FOLDER).glob("*.jinja")):
        sources[path.stem] = read_text(path)
    return sources


def _sources_in_config(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        sources = {entry["name"]: entry["template"] for entry in value}
    except (TypeError, KeyError):
        sources = {"": None}
    if not all(isinstance(text, str) for item in sources.items() for text in item):
        raise TokenizerError("tokenizer_config.json: chat_template must be a string or a list of {name, template}.")
    return sources


def _special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token and so on, as templates use them; a token is written as a string or as an object with `content`."""
    tokens = {}
    for name in TOKEN_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what a trainer learns from; here it is plain text."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _environment(now: Callable[[], datetime]) -> TemplateSandbox:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(format: str) -> str:
        return now().strftime(format)

    environment = TemplateSandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which prompts must not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
