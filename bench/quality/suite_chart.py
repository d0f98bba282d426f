"""Charts as SVG that read the same in print: black, greys, dashes and markers, no colours. Plain text, no library.

`suite.py` and `bench/paper` draw with it. A `Chart` has two axes, linear or logarithmic; lines, points and areas are
added in data units; the legend stands beside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 70, 210, 50, 52
STYLES = (
    ("black", "", "circle"), ("#777", "", "square"), ("black", "6 4", "triangle"), ("#777", "2 3", "diamond"),
    ("#aaa", "", "cross"), ("#aaa", "8 3 2 3", "circle"), ("#444", "1 4", "square"), ("#444", "10 4", "cross"),
)  # fmt: skip
"""Shade, dashes and marker of each series, in their order."""


@dataclass(frozen=True)
class Series:
    """A line, or points without one."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int
    has_line: bool = True
    has_marks: bool = True
    width: float = 1.6


@dataclass
class Chart:
    """Made, filled by `add`, drawn by `svg`."""

    title: str
    x_label: str
    y_label: str
    x_log: bool = False
    y_log: bool = False
    y_range: tuple[float, float] | None = None
    width: int = 760
    height: int = 440
    series: list[Series] = field(default_factory=list)

    def add(
        self,
        name: str,
        points: Sequence[tuple[float, float]],
        style: int | None = None,
        has_line: bool = True,
        has_marks: bool = True,
        width: float = 1.6,
    ) -> None:
        """Points that are not finite, or not positive on a logarithmic axis, are left out. No name, no legend entry."""
        shown = [(x, y) for x, y in points if self._is_shown(x, self.x_log) and self._is_shown(y, self.y_log)]
        if shown:
            chosen = len([s for s in self.series if s.name]) if style is None else style
            self.series.append(Series(name, shown, chosen % len(STYLES), has_line, has_marks, width))

    @staticmethod
    def _is_shown(value: float, is_log: bool) -> bool:
        return math.isfinite(value) and (value > 0 or not is_log)

    def svg(self) -> str:
        """The picture."""
        xs = [x for s in self.series for x, _ in s.points] or [1.0]
        ys = [y for s in self.series for _, y in s.points] or [1.0]
        low_y, high_y = self.y_range or (min(ys), max(ys))
        x_axis = _Axis(min(xs), max(xs), self.x_log, LEFT, self.width - RIGHT)
        y_axis = _Axis(low_y, high_y, self.y_log, self.height - BOTTOM, TOP)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}"',
            ' font-family="sans-serif" font-size="12">',
            f'<rect width="{self.width}" height="{self.height}" fill="white"/>',
            f'<text x="{LEFT}" y="26" font-size="14">{escape(self.title)}</text>',
            *self._grid(x_axis, y_axis),
        ]
        for series in self.series:
            parts += _draw(series, x_axis, y_axis)
        return "\n".join([*parts, *self._legend(), "</svg>"]) + "\n"

    def _grid(self, x_axis: _Axis, y_axis: _Axis) -> list[str]:
        right, bottom = self.width - RIGHT, self.height - BOTTOM
        parts = []
        for value in x_axis.ticks():
            x = x_axis.at(value)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" stroke="#e4e4e4"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{_number(value)}</text>')
        for value in y_axis.ticks():
            y = y_axis.at(value)
            parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
        middle = (TOP + bottom) / 2
        parts.append(f'<text x="{(LEFT + right) / 2:.0f}" y="{self.height - 12}" text-anchor="middle">'
                     f"{escape(self.x_label)}</text>")  # fmt: skip
        parts.append(f'<text x="16" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 16 {middle:.0f})">'
                     f"{escape(self.y_label)}</text>")  # fmt: skip
        return parts

    def _legend(self) -> list[str]:
        parts = []
        named = [series for series in self.series if series.name]
        for place, series in enumerate(named):
            shade, dashes, mark = STYLES[series.style]
            x, y = self.width - RIGHT + 14, TOP + 10 + 18 * place
            if series.has_line:
                parts.append(f'<line x1="{x}" x2="{x + 28}" y1="{y}" y2="{y}" stroke="{shade}" '
                             f'stroke-width="{series.width}" stroke-dasharray="{dashes}"/>')  # fmt: skip
            if series.has_marks:
                parts.append(_mark(mark, x + 14, y, shade))
            parts.append(f'<text x="{x + 34}" y="{y + 4}">{escape(series.name)}</text>')
        return parts


class _Axis:
    """From data to the picture; where everything has one value, it lies in the middle."""

    def __init__(self, low: float, high: float, is_log: bool, start: float, end: float) -> None:
        self.is_log, self.start, self.end = is_log, start, end
        low, high = (math.log10(low), math.log10(high)) if is_log else (low, high)
        margin = 0.04 * (high - low) or 0.5
        self.low, self.high = low - margin, high + margin

    def at(self, value: float) -> float:
        value = math.log10(value) if self.is_log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """About five round numbers."""
        if self.is_log:
            powers = range(math.ceil(self.low), math.floor(self.high) + 1)
            if len(powers) >= 3:
                return [10.0**power for power in powers[:: -(-len(powers) // 8)]]
            twos = range(math.ceil(self.low / math.log10(2)), math.floor(self.high / math.log10(2)) + 1)
            return [2.0**power for power in twos[:: max(1, -(-len(twos) // 8))]]
        rough = (self.high - self.low) / 5
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [step * i for i in range(first, last + 1)]


def _number(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.4g}"


def _draw(series: Series, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    shade, dashes, mark = STYLES[series.style]
    places = [(x_axis.at(x), y_axis.at(y)) for x, y in series.points]
    parts = []
    if series.has_line and len(places) > 1:
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{text}" fill="none" stroke="{shade}" stroke-width="{series.width}" '
                     f'stroke-dasharray="{dashes}"/>')  # fmt: skip
    if series.has_marks:
        parts += [_mark(mark, x, y, shade) for x, y in places]
    return parts


def _mark(kind: str, x: float, y: float, shade: str) -> str:
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{shade}"/>'
    paths = {
        "square": f"M{x - 3:.1f} {y - 3:.1f}h6v6h-6z",
        "triangle": f"M{x:.1f} {y - 4:.1f}l4 7h-8z",
        "diamond": f"M{x:.1f} {y - 4:.1f}l4 4l-4 4l-4 -4z",
        "cross": f"M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6",
    }
    fill = "none" if kind == "cross" else "white"
    return f'<path d="{paths[kind]}" fill="{fill}" stroke="{shade}" stroke-width="1.3"/>'
