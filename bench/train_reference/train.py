"""Trains the reference model: stages of growing length, on batches that worker processes make meanwhile.

    python bench/train_reference/train.py --data PREPARED --output FOLDER

`corpus.py` makes PREPARED. A checkpoint is written now and then and found again by the same command; each line of
FOLDER/log.jsonl is one report. `export.py` turns the last checkpoint into a model folder.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from arguments import count, device, model_folder, output_folder, prepared_folder
from batches import BatchReader, Workers
from corpus import unpack
from export import load_model
from model import Attention, Model, compiled_parts, fast_attention
from optimizer import Optimizer
from stages import LABELS, PRESETS, Preset, Stage

REPORT_STEPS = 20
CHECKPOINT_S = 60.0
CHECKPOINT = "checkpoint.pt"


class Trainer:
    """One run: model, optimizer, and where it stands."""

    def __init__(self, preset: Preset, output: Path, device: torch.device, attention: str, is_compiled: bool) -> None:
        torch.manual_seed(preset.seed)
        torch.set_float32_matmul_precision("high")
        self.preset, self.output, self.device = preset, output, device
        self.backend = attention
        is_gpu = device.type == "cuda"
        self.model = Model(preset.shape, torch.bfloat16 if is_gpu else torch.float32).to(device)
        if is_compiled:
            self.model.parts = compiled_parts()
        self.optimizer = Optimizer(self.model, preset.optimizer, preset.weight_decay)
        self.attention = Attention()
        self.stage, self.step, self.elapsed_s, self.num_tokens = 0, 0, 0.0, 0
        """The next step to do, the time spent in its stage, and the tokens seen so far."""
        self._saved_at = time.perf_counter()

    def begin_from(self, model: Path) -> None:
        """Take the weights of an exported model, the optimizer new."""
        weights = load_model(model, self.model.dtype, self.device).state_dict()
        self.model.load_state_dict(weights)

    def run(self, workers: Workers) -> None:
        """All stages from where it stands."""
        with fast_attention(self.backend):
            while self.stage < len(self.preset.stages):
                self._run_stage(self.preset.stages[self.stage], workers)
                self.stage, self.step, self.elapsed_s = self.stage + 1, 0, 0.0
                self.save()

    def _run_stage(self, stage: Stage, workers: Workers) -> None:
        reader = BatchReader(workers, self.stage, self.step, self.device)
        sums = torch.zeros(2 * len(LABELS), device=self.device)
        start = reported = time.perf_counter()
        elapsed_before, reported_step = self.elapsed_s, self.step
        for ids, weights in reader:
            self.elapsed_s = elapsed_before + time.perf_counter() - start
            if self.elapsed_s > stage.seconds:
                break
            rate = learning_rate(stage, self.step, self.elapsed_s)
            loss, counted = self.model.loss(ids, weights, self.attention)
            loss.backward()
            self.optimizer.step(rate)
            sums += counted
            self.step += 1
            self.num_tokens += stage.batch_size * stage.num_tokens
            if self.step % REPORT_STEPS == 0 or self.step == stage.num_steps:
                found = sums.tolist()
                now = time.perf_counter()
                losses = {
                    f"{label}_loss": loss / max(number, 1)
                    for label, loss, number in zip(LABELS, found[::2], found[1::2], strict=True)
                }
                done = (self.step - reported_step) * stage.batch_size * stage.num_tokens
                self._report(
                    rate=rate,
                    **losses,
                    tokens_per_s=done / (now - reported),
                    waited_s=reader.waited_s,
                )
                sums.zero_()
                reported, reported_step = now, self.step
                if now - self._saved_at > CHECKPOINT_S:
                    self.save()
        reader.close()

    def _report(self, **figures: float) -> None:
        entry: dict[str, Any] = {
            "stage": self.stage,
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "num_tokens": self.num_tokens,
            "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0,
        }
        entry |= figures
        entry = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in entry.items()}
        line = json.dumps(entry)
        print(line, flush=True)
        with (self.output / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state(),
            "stage": self.stage,
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "num_tokens": self.num_tokens,
            "shape": self.preset.shape,
            "preset": self.preset.name,
        }
        part = self.output / (CHECKPOINT + ".part")
        torch.save(state, part)
        part.rename(self.output / CHECKPOINT)
        self._saved_at = time.perf_counter()

    def load(self) -> bool:
        """Go on from the folder's checkpoint; False if there is none."""
        path = self.output / CHECKPOINT
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.optimizer.load(state["optimizer"])
        self.stage, self.step = state["stage"], state["step"]
        self.elapsed_s, self.num_tokens = state["elapsed_s"], state["num_tokens"]
        return True


def learning_rate(stage: Stage, step: int, elapsed_s: float) -> float:
    """Straight from the stage's first rate to its last, by steps or by the clock, whichever is further on."""
    progress = min(1.0, max(step / stage.num_steps, elapsed_s / stage.seconds))
    rate = stage.first_rate + (stage.last_rate - stage.first_rate) * progress
    return rate * min(1.0, (step + 1) / stage.warmup_steps)


def resume_place(output: Path, preset: str) -> tuple[int, int]:
    """(stage, step) of the checkpoint, read before a GPU is used; (0, 0) without one.

    Raises ValueError for a checkpoint of another preset, whose stages are others.
    """
    path = output / CHECKPOINT
    if not path.exists():
        return 0, 0
    state = torch.load(path, map_location="cpu", weights_only=False)
    if state["preset"] != preset:
        raise ValueError(
            f"{path} is of the preset {state['preset']}, not {preset}: give each leg an --output of its own"
        )
    return state["stage"], state["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=prepared_folder, required=True, help="folder written by corpus.py")
    parser.add_argument(
        "--output", type=output_folder, required=True, help="checkpoint and log; a checkpoint there is continued"
    )
    parser.add_argument(
        "--begin-from", type=model_folder, help="exported model of an earlier leg, whose weights are taken"
    )
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm/train_reference"), help="tokens and batches")
    parser.add_argument("--preset", choices=PRESETS, default="short")
    parser.add_argument("--device", type=device, default="cuda")
    parser.add_argument("--optimizer", choices=("muon", "adamw"))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--attention", choices=("flash", "cudnn", "efficient", "math"), default="flash")
    parser.add_argument("--workers", type=count, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--stages", help="numbers of the stages to run, such as 0,1")
    parser.add_argument("--steps", type=count, help="at most so many steps a stage: a trial")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    if options.seed is not None:
        preset = replace(preset, seed=options.seed)
    if options.optimizer is not None:
        preset = replace(preset, optimizer=options.optimizer)
    stages = preset.stages
    if options.stages:
        numbers = options.stages.split(",")
        if not all(number.isdecimal() and int(number) < len(stages) for number in numbers):
            parser.error(
                f"--stages is {options.stages}; the preset {preset.name} has the stages 0 to {len(stages) - 1}"
            )
        stages = tuple(stages[int(number)] for number in numbers)
    if options.steps:
        stages = tuple(replace(stage, num_steps=options.steps) for stage in stages)
    preset = replace(preset, stages=stages)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        place = resume_place(options.output, preset.name)
    except ValueError as error:
        parser.error(str(error))
    unpack(options.data, options.scratch, options.workers)
    workers = Workers(
        options.scratch,
        options.data / "tokenizer.json",
        options.scratch / "batches",
        stages,
        preset.seed,
        options.workers,
        place,
    )
    try:
        trainer = Trainer(preset, options.output, options.device, options.attention, not options.eager)
        if not trainer.load() and options.begin_from is not None:
            trainer.begin_from(options.begin_from)
        trainer.run(workers)
    finally:
        workers.close()


if __name__ == "__main__":
    main()
