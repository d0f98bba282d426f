"""Which findings speak to which controls that auditors ask about; for `server/doctor/attestation.py`.

An entry says what was looked at, never that a control is met: that takes people and procedures, and is the auditor's
word. Nothing here is a statement about FIPS 140 validation.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from vashista.server.doctor.finding import State


class Control(msgspec.Struct, frozen=True):
    """A control, and the findings that are evidence for a part of it."""

    control: str
    part: str
    """The part of it that the findings speak to."""
    findings: tuple[str, ...]


CONTROLS = (
    Control("NIST SP 800-53 AU-3", "each receipt says who, what, when and with what outcome", ("ledger",)),
    Control("NIST SP 800-53 AU-8", "the clock is not behind the last signed record", ("clock",)),
    Control("NIST SP 800-53 AU-4", "there is space for further records", ("disk",)),
    Control(
        "NIST SP 800-53 AU-9", "records are hash-chained and unchanged; who may write them", ("ledger", "state folder")
    ),
    Control(
        "NIST SP 800-53 AU-10", "records are signed with a key that its owner alone can read", ("ledger", "signatures")
    ),
    Control(
        "NIST SP 800-53 SC-7",
        "the process has no interface and no route, and the kernel refuses it new ones",
        ("isolation", "network filter"),
    ),
    Control("NIST SP 800-53 SC-8", "the server speaks TLS with a certificate that is valid", ("certificates",)),
    Control("NIST SP 800-53 AC-6", "the process has an ordinary user's rights", ("rights",)),
    Control("NIST SP 800-53 SI-7", "software and model are what was installed", ("installation", "model")),
    Control("NIST SP 800-53 SI-7(15)", "a trusted key signed the model", ("model signer",)),
    Control("NIST SP 800-53 CM-6", "the settings in force are in this statement", ()),
    Control("NIST SP 800-53 CM-8", "a bill of materials is in this statement", ()),
    Control("HIPAA 45 CFR 164.312(b)", "activity is recorded and can be examined", ("ledger",)),
    Control("HIPAA 45 CFR 164.312(c)(1)", "a change of the records would be seen", ("ledger", "signatures")),
)


def map_controls(states: Mapping[str, State], *, has_bill: bool) -> list[dict[str, object]]:
    """Each control with the worst state of its findings; one whose findings were not checked is not checked."""
    order = (State.NOT_OK, State.NOT_CHECKED, State.OK)
    entries: list[dict[str, object]] = []
    for control in CONTROLS:
        found = [states[name] for name in control.findings]
        if control.control.endswith("CM-8"):
            found = [State.OK if has_bill else State.NOT_CHECKED]
        state = min(found, key=order.index, default=State.OK)
        entries.append(
            {"control": control.control, "part": control.part, "findings": list(control.findings), "state": state}
        )
    return entries
