"""What `vashista selftest` checks, in order: files, kernels, answers, recall, sparse against dense.

The command (`server/commands/selftest.py`) runs `list_checks` one after the other. Kernels come before the model, so
that a broken one is named as itself; the model is loaded by a check of its own, and what needs it is skipped if that
fails. Known answers are those of the CPU in float32, whatever else the machine has; where there is a GPU, recall and
sparse attention are checked there.
"""

from __future__ import annotations

from pathlib import Path

from vashista.engine.config import EngineConfig
from vashista.engine.runner import resolve_device
from vashista.engine.selftest_answers import SelftestAnswers, digest_file
from vashista.engine.selftest_check import Check, CheckFailed, CheckSkipped
from vashista.engine.selftest_cpu import cpu_checks
from vashista.engine.selftest_gpu import gpu_checks
from vashista.engine.selftest_model import ModelTest

COPY = "Copy the model folder again from the medium that it came on."
REINSTALL = (
    "If `model files` passed, the installation computes wrongly: install the package and the torch that deploy/lock "
    "pins again, and test the machine's memory."
)


class Selftest:
    """The checks of one installation and one model folder."""

    def __init__(self, folder: Path, answers: SelftestAnswers, config: EngineConfig) -> None:
        """config: device and num_threads count. Raises DeviceError for a device that is not there."""
        self._folder, self._answers, self._config = folder, answers, config
        self._device = resolve_device(config.device)
        self._tests: dict[str, ModelTest] = {}

    def list_checks(self) -> list[Check]:
        """In their order; each may be run once."""
        checks = [Check("model files", self._check_files, COPY), *cpu_checks()]
        if self._device.type == "cuda":
            checks += gpu_checks(self._device)
        recall = self._answers.recall
        checks += [
            Check("model loads on the CPU", lambda: self._load("cpu", "float32"), COPY),
            Check("known answers", lambda: self._test("cpu").check_known(self._answers.known), REINSTALL),
        ]
        device = str(self._device)
        if self._device.type != "cpu":
            checks.append(Check("model loads on the GPU", lambda: self._load(device, "auto"), COPY))
        return [
            *checks,
            Check("recall, dense", lambda: self._test(device).check_recall(recall), REINSTALL),
            Check("recall, sparse", lambda: self._test(device).check_sparse(recall), REINSTALL),
            Check(
                "sparse equals dense where all is kept", lambda: self._test(device).check_identity(recall), REINSTALL
            ),
        ]

    def _check_files(self) -> str:
        """Every file has the digest that was recorded."""
        wrong = [name for name, digest in self._answers.files.items() if digest_file(self._folder / name) != digest]
        if wrong:
            raise CheckFailed(f"not the file that the answers were made with: {', '.join(wrong)}")
        num_bytes = sum((self._folder / name).stat().st_size for name in self._answers.files)
        return f"SHA-256 of {len(self._answers.files)} files, {num_bytes / 1e6:.1f} MB"

    def _load(self, device: str, dtype: str) -> str:
        recall = self._answers.recall
        is_long = recall is not None and device == str(self._device)
        config = EngineConfig(
            model_dir=str(self._folder), device=device, dtype=dtype, num_threads=self._config.num_threads
        )
        test = ModelTest(self._folder, recall.num_tokens if recall is not None and is_long else 1024, config)
        self._tests[device] = test
        return test.describe()

    def _test(self, device: str) -> ModelTest:
        test = self._tests.get(device)
        if test is None:
            raise CheckSkipped("the model is not loaded")
        return test
