"""docs/paper.md from the claims: a table of verdicts, then each claim with what was measured."""

from __future__ import annotations

from typing import Any

from claims import Claim, Table, leakage, linear, support
from criterion import criterion
from pictures import pictures
from serving import predictable, quality, speed

HEAD = """# The paper's claims, one by one

*Attention in Constant Time: Vashista Sparse Attention for Long-Context Decoding with Exponential Guarantees*
(arXiv 2602.13804) makes seven claims that can be measured. This page says what became of each on one model. It is made
by a program from measurements: `python bench/paper/run.py measure`, then `python bench/paper/run.py write`. Verdicts
follow from the figures by the rule that each section states. What the product promises is another matter, and stands in
[sparse-attention.md](sparse-attention.md).

"""


def document(data: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """(Markdown, SVG by file name). data: what `measure` wrote, and the results of other benchmarks or None."""
    measured = data["measured"]
    claims = [
        support(measured),
        leakage(measured),
        linear(measured),
        criterion(measured),
        speed(data["attention"], data["sparse_cpu"]),
        quality(data["suite"]),
        predictable(measured),
    ]
    drawn = pictures(data)
    parts = [HEAD, _summary(claims)]
    parts += [_section(number, claim, drawn) for number, claim in enumerate(claims, start=1)]
    shown = {name for claim in claims for name, _ in claim.pictures}
    return "\n".join(parts), {name: svg for name, svg in drawn.items() if name in shown}


def _summary(claims: list[Claim]) -> str:
    rows = [[number, claim.title, f"**{claim.finding}**"] for number, claim in enumerate(claims, start=1)]
    return table(Table(["", "claim", "on this model"], rows))


def _section(number: int, claim: Claim, drawn: dict[str, str]) -> str:
    parts = [
        f"## {number}. {claim.title}\n",
        f"**{claim.finding[0].upper()}{claim.finding[1:]}.** {claim.plainly}\n",
        f"- Claimed: {claim.claimed}",
        f"- Measured: {claim.measured}",
        f"- Rule: {claim.rule}\n",
    ]
    for name, caption in claim.pictures:
        if name in drawn:
            parts.append(f"![{caption}](paper/{name})\n")
    for title, rows in claim.tables:
        parts.append(f"{title[0].upper()}{title[1:]}:\n\n{table(rows)}")
    return "\n".join(parts)


def table(content: Table) -> str:
    """As Markdown."""
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |"
             for row in (content.headers, *content.rows)]  # fmt: skip
    lines.insert(1, "|" + " --- |" * len(content.headers))
    return "\n".join(lines) + "\n"
