"""What predictions have learnt, in one file of the state folder: step times, output lengths, errors of the past.

`server/serve.py` reads it at the start, writes it once a minute while there is something new, and at the end. It may be
deleted at any time: the server then starts from the model's calibrated times, or from a guess. A file that cannot be
read or is of another model is put aside in words, never in the way of a start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from vashista.engine.config import SavedStepTimes
from vashista.engine.predict.features import StepFeatures
from vashista.engine.predict.learnt_support import SavedSupport
from vashista.engine.whole_file import write_whole

logger = logging.getLogger(__name__)
FILE_NAME = "predictions.json"
VERSION = 6
"""1 knew nothing of cold steps, 2 nothing of split ones and of pauses, 3 did not tell errors of requests that were
alone from those of others, 4 nothing of hitches, 5 nothing of padded prompts: what those have learnt is learnt anew."""
MAX_FILE_BYTES = 16 << 20
SAVE_S = 60.0
LEAST_STEP_S = 1e-6
"""No step takes less; the engine divides by what steps take."""


class SavedPredictions(msgspec.Struct, frozen=True, kw_only=True):
    """The file."""

    version: int = VERSION
    step_times: SavedStepTimes
    lengths: tuple[list[float], list[float]] | None = None
    """`OutputLengths.state`."""
    errors: dict[str, dict[str, list[float]]] = {}
    """`Conformal.state` of each quantity."""
    pickup_s: float | None = None
    support: SavedSupport | None = None
    """`SupportForecast.state`."""


class _Version(msgspec.Struct):
    """What every version of the file says."""

    version: int


class PredictionFile:
    """In this folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self._last: bytes | None = None

    def load(self) -> SavedPredictions | None:
        """What an earlier server learnt; None without a file, and with one that is of no use, which is logged."""
        try:
            if self.path.stat().st_size > MAX_FILE_BYTES:
                raise ValueError("it is far too large")
            data = self.path.read_bytes()
            version = msgspec.json.decode(data, type=_Version).version
            if version != VERSION:
                raise ValueError(f"it is of version {version}, not {VERSION}")
            saved = msgspec.json.decode(data, type=SavedPredictions)
            if saved.step_times.coefficients.step_s(StepFeatures(1)) < LEAST_STEP_S:
                raise ValueError("by it a step takes no time")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, msgspec.DecodeError, RecursionError) as error:
            logger.warning("predictions start anew: %s cannot be used: %s", self.path, error)
            return None
        return saved

    def save(self, saved: SavedPredictions) -> None:
        """Write it, whole or not at all; nothing where it would be the same. A failure is logged: nothing is lost
        but time to learn again."""
        data = msgspec.json.encode(saved)
        if data == self._last:
            return
        try:
            write_whole(self.path, data)
            self._last = data
        except OSError as error:
            logger.warning("what predictions have learnt cannot be kept in %s: %s", self.path, error.strerror)

    @contextlib.asynccontextmanager
    async def kept(self, state: Callable[[], SavedPredictions | None]) -> AsyncIterator[None]:
        """Write the state every SAVE_S seconds, and at the end of the block; None is not written."""

        async def keep() -> None:
            while True:
                await asyncio.sleep(SAVE_S)
                saved = state()
                if saved is not None:
                    await asyncio.to_thread(self.save, saved)

        task = asyncio.create_task(keep())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            saved = state()
            if saved is not None:
                self.save(saved)
