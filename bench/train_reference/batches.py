"""Batches of lessons, made by worker processes ahead of the training and handed over as files in memory.

Batch i of stage s is drawn from the seed (run, s, i, row) alone, so a run sees the same batches whatever the number of
workers, and a resumed run goes on where it was. `Workers` starts the processes, `BatchReader` hands over tensors.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from chat import Conversations
from corpus import Corpus
from lessons import Lesson, Teacher
from stages import Stage
from tokenizers import Tokenizer

AHEAD = 64
"""Batches that wait at most."""
WEIGHT_UNIT = 0.25
"""Weights are stored as bytes, in this unit."""

Arrays = tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8]]


class BatchMaker:
    """Draws the batches of a run; one a process."""

    def __init__(self, folder: Path, tokenizer_path: Path, seed: int) -> None:
        self._teacher = Teacher(Corpus(folder), Tokenizer.from_file(str(tokenizer_path)))
        self._conversations = Conversations(self._teacher)
        self._seed = seed

    def make(self, stage_index: int, stage: Stage, batch: int) -> Arrays:
        """(ids, weights in WEIGHT_UNIT), both [batch_size, num_tokens + 1]; the first weight of a row is not used."""
        ids = np.empty((stage.batch_size, stage.num_tokens + 1), dtype=np.uint16)
        weights = np.empty(ids.shape, dtype=np.uint8)
        kinds, shares = list(stage.mixture), list(stage.mixture.values())
        for row in range(stage.batch_size):
            rng = random.Random(f"{self._seed}/{stage_index}/{batch}/{row}")
            lesson = self.lesson(rng.choices(kinds, shares)[0], stage.num_tokens + 1, rng)
            ids[row] = lesson.ids[: ids.shape[1]]
            weights[row] = np.rint(np.array(lesson.weights[: ids.shape[1]]) / WEIGHT_UNIT)
        return ids, weights

    def lesson(self, kind: str, num_tokens: int, rng: random.Random) -> Lesson:
        """A lesson of at least `num_tokens` tokens."""
        if kind == "plain":
            return self._teacher.plain(num_tokens, rng)
        if kind == "chat":
            return self._conversations.fill(num_tokens, rng)
        if kind == "recall":
            return self._teacher.recall(num_tokens, rng)
        if kind == "repeat":
            return self._teacher.repeat(num_tokens, rng)
        return self._teacher.word_list(kind, num_tokens, rng)


class Workers:
    """Processes that keep batches ready, in stage order; stop them with `close`."""

    def __init__(
        self,
        corpus: Path,
        tokenizer_path: Path,
        folder: Path,
        stages: tuple[Stage, ...],
        seed: int,
        num_workers: int,
        first: tuple[int, int] = (0, 0),
    ) -> None:
        """folder: where batches wait, emptied now; first: the stage and the batch to begin with."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        context = multiprocessing.get_context("fork")  # before the process uses a GPU: nothing is imported again
        self.folder = folder
        self.stages = stages
        self.stage = context.Value("i", first[0])
        self.taken = context.Value("i", first[1])
        self._processes = [
            context.Process(
                target=_work,
                args=(corpus, tokenizer_path, folder, stages, seed, index, num_workers, self.stage, self.taken),
                daemon=True,
            )
            for index in range(num_workers)
        ]
        for process in self._processes:
            process.start()

    def check(self) -> None:
        """RuntimeError when a worker has died."""
        if any(process.exitcode not in (None, 0) for process in self._processes):
            raise RuntimeError("a worker that makes batches has ended with an error")

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


def _work(
    corpus: Path,
    tokenizer_path: Path,
    folder: Path,
    stages: tuple[Stage, ...],
    seed: int,
    index: int,
    num_workers: int,
    stage_now: Any,
    taken: Any,
) -> None:
    """One worker: every `num_workers`-th batch of each stage; the next stage's first ones before it begins."""
    os.nice(5)
    maker = BatchMaker(corpus, tokenizer_path, seed)
    for stage_index, stage in enumerate(stages):
        if stage_index < stage_now.value:
            continue
        first = taken.value if stage_index == stage_now.value else 0
        for batch in range(first + (index - first) % num_workers, stage.num_steps, num_workers):
            while batch - (taken.value if stage_index == stage_now.value else 0) > AHEAD:
                if stage_index < stage_now.value:
                    break
                time.sleep(0.02)
            if stage_index < stage_now.value:
                break
            ids, weights = maker.make(stage_index, stage, batch)
            path = folder / f"{stage_index}-{batch}"
            with path.with_suffix(".part").open("wb") as file:
                np.save(file, ids)
                np.save(file, weights)
            path.with_suffix(".part").rename(path)


class BatchReader:
    """Batches of one stage as tensors on the device, the next ones loaded meanwhile by a thread."""

    def __init__(self, workers: Workers, stage_index: int, first: int, device: torch.device) -> None:
        self._workers, self._stage_index, self._device = workers, stage_index, device
        self._queue: queue.Queue[tuple[torch.Tensor, torch.Tensor] | BaseException] = queue.Queue(3)
        self._is_open, self._first = True, first
        self.waited_s = 0.0
        """Time the trainer stood still for want of a batch."""
        with workers.taken.get_lock():
            workers.taken.value = first
        workers.stage.value = stage_index
        self._thread = threading.Thread(target=self._load, args=(first,), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(ids [B, T+1] int64, weights [B, T+1] float32)."""
        for _ in range(self._first, self._workers.stages[self._stage_index].num_steps):
            start = time.perf_counter()
            item = self._queue.get()
            self.waited_s += time.perf_counter() - start
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop loading and drop what waits."""
        self._is_open = False
        while self._thread.is_alive():
            while not self._queue.empty():
                self._queue.get()
            self._thread.join(0.05)

    def _load(self, first: int) -> None:
        try:
            for batch in range(first, self._workers.stages[self._stage_index].num_steps):
                path = self._workers.folder / f"{self._stage_index}-{batch}"
                while not path.exists():
                    if not self._is_open:
                        return
                    self._workers.check()
                    time.sleep(0.005)
                with path.open("rb") as file:
                    ids, weights = np.load(file), np.load(file)
                path.unlink()
                self._workers.taken.value = batch + 1
                tokens = torch.from_numpy(ids.astype(np.int32))
                scale = torch.from_numpy(weights)
                if self._device.type == "cuda":
                    tokens, scale = tokens.pin_memory(), scale.pin_memory()
                tokens = tokens.to(self._device, non_blocking=True).long()
                self._queue.put((tokens, scale.to(self._device, non_blocking=True).float() * WEIGHT_UNIT))
                if not self._is_open:
                    return
        except BaseException as error:
            self._queue.put(error)
