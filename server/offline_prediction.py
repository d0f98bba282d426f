"""Predictions without a server: a model's folder, what is known of step times, and an engine with nobody in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vashista.engine.errors import MeasurementError
from vashista.engine.messages import AttentionMode, SamplingParams, SchedulerRules, Submit
from vashista.engine.model_config import ModelConfig, load_model_config
from vashista.engine.model_digest import model_digest
from vashista.engine.predict.coefficients import StepCoefficients
from vashista.engine.predict.conformal import Conformal
from vashista.engine.predict.expected_support import SupportForecast
from vashista.engine.predict.prediction import Prediction
from vashista.engine.predict.predictor import Predictor
from vashista.engine.predict.queue import QueueMirror
from vashista.engine.predict.step_time import guess_of
from vashista.engine.support_profile import FILE_NAME, DeviceTimes, SupportProfile
from vashista.engine.work import WorkModel
from vashista.server.foresight import QUANTITIES, Rates, look_ahead
from vashista.server.prediction_file import PredictionFile, SavedPredictions
from vashista.server.settings import Settings

BATCH_TOKENS = {"cpu": 512, "cuda": 8192}
DENSE_BELOW = {"cpu": 2048, "cuda": 8192}
"""What the engine takes where the settings say `auto`."""


class IdleMachine:
    """One model on one device, without load."""

    def __init__(
        self,
        settings: Settings,
        config: ModelConfig,
        device: str,
        coefficients: StepCoefficients,
        profile: SupportProfile | None,
        saved: SavedPredictions | None,
    ) -> None:
        self._settings = settings
        self.max_context = min(settings.max_context or config.max_position_embeddings, config.max_position_embeddings)
        num_pages = -(-self.max_context // settings.page_size) * settings.max_running_requests
        rules = SchedulerRules(
            page_size=settings.page_size,
            num_pages=num_pages,
            max_running_requests=settings.max_running_requests,
            max_batch_tokens=settings.max_batch_tokens or max(BATCH_TOKENS[device], settings.max_running_requests),
            prefix_caching=settings.prefix_caching,
        )
        dense_below = DENSE_BELOW[device] if settings.dense_below is None else settings.dense_below
        support = SupportForecast(config.layer_windows, profile, dense_below)
        self._predictor = Predictor(WorkModel.of(config), rules, coefficients, support)
        self._conformal = {name: Conformal() for name in QUANTITIES}
        for name, state in (saved.errors if saved is not None else {}).items():
            if name in self._conformal:
                self._conformal[name].restore(state)

    @classmethod
    def of(cls, settings: Settings, device_name: str | None = None) -> IdleMachine:
        """From the model's folder, its support profile and the state folder. MeasurementError if nothing was measured,
        and the errors of a folder that is no model or a profile that is none."""
        config, digest = load_model_config(settings.model), model_digest(settings.model)
        path = settings.support_profile or Path(settings.model) / FILE_NAME
        profile = SupportProfile.load(path, settings.model) if path.exists() or settings.support_profile else None
        saved = PredictionFile(settings.state_dir).load()
        if saved is not None and saved.step_times.model_digest == digest:
            times = saved.step_times
            if device_name in (None, times.device_name):
                device = "cpu" if times.device_name.startswith("CPU") else "cuda"
                return cls(settings, config, device, times.coefficients, profile, saved)
        name, measured = _choose_device(profile, device_name, path)
        device = "cpu" if name.startswith("CPU") else "cuda"
        guess = guess_of(WorkModel.of(config), device=device, dtype=measured.dtype, times=measured)
        return cls(settings, config, device, guess, profile, None)

    def predict(self, num_prompt: int, max_tokens: int, num_choices: int, limits: dict[str, Any]) -> Prediction:
        """What a request of this size takes here; limits: of `AttentionMode`."""
        prompt = [0] * num_prompt
        submits = [
            Submit(str(choice), prompt, SamplingParams(choice, max_tokens), 0.0, attention=AttentionMode(**limits))
            for choice in range(num_choices)
        ]
        shared = (num_prompt - 1) // self._settings.page_size * self._settings.page_size
        return look_ahead(
            self._predictor,
            QueueMirror(),
            submits,
            [0, *([shared] * (num_choices - 1))],
            now_s=0.0,
            before_s=0.0,
            conformal=self._conformal,
            rates=Rates(self._settings.prices()),
        ).prediction


def _choose_device(profile: SupportProfile | None, name: str | None, path: Path) -> tuple[str, DeviceTimes]:
    names = sorted(profile.devices) if profile is not None else []
    if profile is None or not names:
        raise MeasurementError(
            f"Nothing is known of step times: {path} has none, and no server has kept any in the state folder. Run "
            "`vashista calibrate` with the model, or ask a running server with --url."
        )
    if name is None and len(names) == 1:
        name = names[0]
    if name not in profile.devices:
        asked = "--device-name is not given" if name is None else f"--device-name is {name!r}"
        raise MeasurementError(f"{asked}; {path} has times of: {', '.join(names)}.")
    return name, profile.devices[name]
