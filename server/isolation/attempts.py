"""The count of attempts to reach out, whoever saw them, and a log line that names the culprit.

Three report here: the audit hook of the server and that of the engine (`engine/egress.py`), which know the line of
Python that asked, and the supervisor of the filter (`server/isolation/sentry.py`), which knows the program. One attempt
may be seen by two of them, so that counts are kept by who saw it. /metrics reads the counts.
"""

from __future__ import annotations

import logging
from collections import Counter

logger = logging.getLogger(__name__)
MAX_CULPRITS = 1000


class Attempts:
    """One server's. All methods may be called from any thread."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        """By who saw it (server, engine, kernel) and what was tried; both are words of this program."""
        self._by_culprit: Counter[tuple[str, str, str]] = Counter()

    def count(self, seen_by: str, what: str, detail: str, culprit: str, times: int = 1) -> None:
        """One more attempt, or several alike. Logged the first time and at 10, 100, 1000 … by the same culprit."""
        self.counts[seen_by, what] += times
        key = (seen_by, what, culprit)
        if len(self._by_culprit) >= MAX_CULPRITS and key not in self._by_culprit:
            key = (seen_by, what, "others")
        before = self._by_culprit[key]
        self._by_culprit[key] += times
        if before == 0 or len(str(before)) < len(str(self._by_culprit[key])):
            fields = {"seen_by": seen_by, "detail": detail, "culprit": culprit, "times": self._by_culprit[key]}
            logger.error("an attempt to reach out: %s", what, extra={"fields": fields})
