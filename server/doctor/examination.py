"""All checks in their order: what `vashista doctor` prints and `vashista attest` signs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from vashista.server.doctor import evidence, machine, trust
from vashista.server.doctor.finding import Finding, State
from vashista.server.doctor.process import Process
from vashista.server.ledger.verify import Verdict
from vashista.server.settings import Settings


class Examination(msgspec.Struct, frozen=True, kw_only=True):
    """What was found, with the facts behind it."""

    findings: list[Finding]
    verdict: Verdict | None
    """Of the ledger; None where there is none."""
    model: dict[str, object] | None
    """Folder and digests; None where none is set or it cannot be read."""

    @property
    def failed(self) -> list[str]:
        """Names of what is not ok."""
        return [finding.name for finding in self.findings if finding.state is State.NOT_OK]


def examine(
    *, state_dir: Path, model: Path | None, device: str, process: Process, settings: Settings | None = None
) -> Examination:
    """Look at everything once. Hashes the model and walks the ledger: seconds for gigabytes, minutes for hundreds."""
    ledger, verdict = evidence.ledger(state_dir)
    signer, digests = trust.signer(model, None if settings is None else settings.model_trust)
    model_finding, facts = evidence.model(model, digests)

    def findings() -> Iterator[Finding]:
        yield process.isolation("none" if settings is None else settings.isolation)
        yield process.network_filter()
        yield process.rights()
        yield machine.installation()
        yield model_finding
        yield signer
        yield machine.gpu(device)
        yield machine.kernels(device)
        yield machine.clusters(device)
        yield ledger
        yield evidence.signing_key(state_dir)
        yield evidence.clock(state_dir)
        yield trust.certificates(settings)
        yield machine.disk(state_dir)
        yield machine.state_folder(state_dir)
        yield machine.updates()

    return Examination(findings=list(findings()), verdict=verdict, model=facts)
