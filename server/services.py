"""Everything that a route needs, made once by `server/serve.py` and passed in."""

from __future__ import annotations

import time
from dataclasses import dataclass

from vashista.server.admission import Admission
from vashista.server.auth import Authenticator
from vashista.server.body import Bodies
from vashista.server.books import Books
from vashista.server.engine_client import EngineClient
from vashista.server.forecaster import Forecaster
from vashista.server.keys import KeyStore
from vashista.server.ledger.ledger import Ledger
from vashista.server.ledger.sealing import load_sealer
from vashista.server.ledger.usage import uses_since
from vashista.server.limits import Window
from vashista.server.metrics import Metrics
from vashista.server.prices import NANO, Prices
from vashista.server.quotas import Quotas
from vashista.server.served_model import ServedModel
from vashista.server.settings import Settings
from vashista.server.waiting_room import WaitingRoom


@dataclass(frozen=True)
class Services:
    """The parts of a running server."""

    settings: Settings
    model: ServedModel
    engine: EngineClient
    room: WaitingRoom
    admission: Admission
    metrics: Metrics
    authenticator: Authenticator
    books: Books
    prices: Prices
    quotas: Quotas
    forecaster: Forecaster
    bodies: Bodies

    @classmethod
    def build(
        cls, settings: Settings, model: ServedModel, engine: EngineClient, keys: KeyStore, ledger: Ledger
    ) -> Services:
        """Connect the parts."""
        metrics = Metrics()
        metrics.follow_engine(engine)
        metrics.follow_ledger(ledger)
        key_path = settings.ledger_prompt_key if settings.ledger_prompts == "encrypted" else None
        books = Books(
            ledger,
            metrics,
            model=model.name,
            model_digest=model.digest,
            refuses_on_failure=settings.ledger_on_failure == "refuse",
            sealer=None if key_path is None else load_sealer(key_path),
        )
        prices = settings.prices()
        quotas = Quotas(price_per_request_nano=round(prices.per_request * NANO))
        if keys.are_needed():
            quotas.load(uses_since(ledger.path, Window.MONTH.span(time.time())[0]))
        room = WaitingRoom(
            max_running_requests=settings.max_running_requests,
            max_waiting_requests=settings.max_queued_requests,
            max_waiting_tokens=settings.max_queued_tokens,
        )
        forecaster = Forecaster(
            engine, model.config, metrics, prices, model_dir=str(settings.model), model_digest=model.sampled_digest
        )
        metrics.follow_forecaster(forecaster)
        admission = Admission(settings, model, engine, room, books, quotas, forecaster, metrics)
        return cls(
            settings=settings,
            model=model,
            engine=engine,
            room=room,
            admission=admission,
            metrics=metrics,
            authenticator=Authenticator(keys),
            books=books,
            prices=prices,
            quotas=quotas,
            forecaster=forecaster,
            bodies=Bodies(settings.max_body_bytes, settings.max_body_values),
        )

    @property
    def max_context(self) -> int:
        """Tokens a request may have: the engine's word, before it is ready that of settings and model."""
        if self.engine.ready is not None:
            return self.engine.ready.max_context
        own = self.model.config.max_position_embeddings
        return min(self.settings.max_context or own, own)
