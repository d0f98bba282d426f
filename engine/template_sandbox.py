"""The Jinja environment in which `engine/chat_template.py` renders: sandboxed, and bounded in time and size.

A template comes with the model. Jinja has no loop but `for` and macros that call themselves, so that a look at the
clock at the head of both, and bounds on the operators that make much of little, end what would not end by itself, with
words that say what it was. What one filter does within one call is not bounded here: the server renders in a process of
its own (`engine/template_worker.py`), whose time and memory end.
"""

from __future__ import annotations

import re
import threading
import time
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment

TIME_LIMIT_S = 1.0
"""For one prompt. Templates of publishers take below a millisecond a message (LLAMA3 in the tests, 2026-11)."""
MAX_CHARS = 32 << 20
"""Characters of one prompt, or of what one multiplication makes."""
MAX_BITS = 1 << 14
"""Of a whole number that an operator makes."""

WIDE_FORMAT = re.compile(r"%[^%a-zA-Z]*(\d{5}|\*)")
"""A width that makes a long text of a short one."""


class TemplateLimitError(jinja2.TemplateError):
    """A template takes too long or makes too much."""


class _Generator(CodeGenerator):
    """Leaves constant expressions to the rendering: computed when a template is loaded, they would pass every bound."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with a deadline in every thread that renders and bounds on `*`, `**` and `%`."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, optimized=False, **kwargs)
        self._state = threading.local()

    def render(self, template: jinja2.Template, values: dict[str, Any]) -> str:
        """The text; TemplateLimitError when a bound is passed, else what the template raises."""
        self._state.end_s = time.monotonic() + TIME_LIMIT_S
        parts, num_chars = [], 0
        try:
            for part in template.generate(values):
                self.look_at_clock()
                parts.append(part)
                num_chars += len(part)
                if num_chars > MAX_CHARS:
                    raise TemplateLimitError(f"its prompt is longer than {MAX_CHARS} characters")
        finally:
            self._state.end_s = None
        return "".join(parts)

    def look_at_clock(self) -> bool:
        """True, so that it can stand before a condition; TemplateLimitError behind the deadline."""
        end_s = getattr(self._state, "end_s", None)
        if end_s is not None and time.monotonic() > end_s:
            raise TemplateLimitError(f"it is not done after {TIME_LIMIT_S:g} s")
        return True

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`, unless the result would be huge."""
        if operator == "%" and isinstance(left, str) and WIDE_FORMAT.search(left):
            raise TemplateLimitError(f"a % format has a width of more than four digits: {left[:80]!r}")
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise TemplateLimitError(f"a number has more than {MAX_BITS} bits")
        elif operator == "*":
            for sequence, count in ((left, right), (right, left)):
                is_counted = isinstance(count, int) and isinstance(sequence, str | list | tuple)
                if is_counted and len(sequence) * count > MAX_CHARS:
                    raise TemplateLimitError(f"a multiplication makes more than {MAX_CHARS} characters")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """With a look at the clock at the head of every loop and macro."""
        tree = super()._parse(source, name, filename)

        def look() -> nodes.Call:
            return nodes.Call(nodes.EnvironmentAttribute("look_at_clock"), [], [], None, None)

        for loop in tree.find_all(nodes.For):
            loop.body.insert(0, nodes.ExprStmt(look()))
            if loop.test is not None:
                loop.test = nodes.And(look(), loop.test)
        for macro in tree.find_all(nodes.Macro):
            macro.body.insert(0, nodes.ExprStmt(look()))
        return tree
