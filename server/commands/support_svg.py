"""A support profile as a picture: tokens of 90 % of the mass against context, a line for each KV head.

`vashista calibrate` writes what `support_svg` returns. Plain SVG in shades of grey, so that a print says as much.
"""

from __future__ import annotations

import math
from html import escape
from statistics import median

from vashista.engine.support_profile import SupportProfile
from vashista.server.commands.support_table import heads

WIDTH, HEIGHT = 760, 520
LEFT, RIGHT, TOP, BOTTOM = 80, 110, 56, 60
NUM_LABELS = 3
"""Heads with the largest, and with the smallest support, that are named at their line's end."""


def support_svg(profile: SupportProfile, title: str) -> str:
    """The picture; `title` is any text."""
    axes = _Axes(profile)
    lines = {(layer, head): [s.tokens_90_median for s in stats] for layer, head, stats in heads(profile)}
    middle = [median(values[i] for values in lines.values()) for i in range(len(profile.contexts))]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15">{escape(title)}</text>',
        f'<text x="{LEFT}" y="42" fill="#444">tokens that hold 90 % of the attention mass, by context; '
        "grey: each KV head, black: their median, dotted: all tokens</text>",
        *axes.grid(),
        axes.line(list(map(float, profile.contexts)), 'stroke="black" stroke-dasharray="2 4"'),
        *(axes.line(values, 'stroke="#999" stroke-width="1"') for values in lines.values()),
        axes.line(middle, 'stroke="black" stroke-width="3"'),
        *axes.labels(lines),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _Axes:
    """Where tokens and contexts lie on the picture; both axes are logarithmic."""

    def __init__(self, profile: SupportProfile) -> None:
        self.contexts = profile.contexts
        smallest = min(stats.tokens_90_median for _, _, values in heads(profile) for stats in values)
        self._low_x, self._high_x = math.log2(self.contexts[0]) - 0.2, math.log2(self.contexts[-1]) + 0.2
        self._low_y = math.floor(math.log2(max(smallest, 1.0)))
        self._high_y = math.ceil(math.log2(self.contexts[-1]))

    def x(self, context: float) -> float:
        share = (math.log2(context) - self._low_x) / (self._high_x - self._low_x)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, tokens: float) -> float:
        height = max(self._high_y - self._low_y, 1)
        share = (math.log2(max(tokens, 2.0**self._low_y)) - self._low_y) / height
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> list[str]:
        """Lines and numbers of both axes."""
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = []
        for power in range(self._low_y, self._high_y + 1):
            y = self.y(2.0**power)
            parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{2**power}</text>')
        for context in self.contexts:
            x = self.x(context)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" stroke="#e4e4e4"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{context}</text>')
        parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 14}" text-anchor="middle">tokens of context</text>')
        return parts

    def line(self, values: list[float], style: str) -> str:
        """A line over the contexts, or dots where there is one context only."""
        points = [(self.x(context), self.y(value)) for context, value in zip(self.contexts, values, strict=True)]
        if len(points) == 1:
            return f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3" fill="none" {style}/>'
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        return f'<polyline points="{text}" fill="none" {style}/>'

    def labels(self, lines: dict[tuple[int, int], list[float]]) -> list[str]:
        """Names of the most and the least diffuse heads, moved apart where they would overlap."""
        ordered = sorted(lines, key=lambda head: lines[head][-1])
        named = ordered[:NUM_LABELS] + [head for head in ordered[-NUM_LABELS:] if head not in ordered[:NUM_LABELS]]
        parts = []
        lowest = math.inf
        x = WIDTH - RIGHT + 6
        for layer, head in named:  # from the bottom of the picture upwards
            lowest = min(self.y(lines[layer, head][-1]) + 4, lowest - 14)
            parts.append(f'<text x="{x:.1f}" y="{lowest:.1f}" fill="#444">layer {layer} head {head}</text>')
        return parts
