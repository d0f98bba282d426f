"""Errors of the commands that measure, check and load, such as calibrate, doctor and bench, and of `vashista keys`."""

from __future__ import annotations

from vashista.engine.errors.root import VashistaError
from vashista.engine.errors.startup import ModelError, SettingsError


class SampleTextError(SettingsError):
    """The sample text is missing, unreadable, or too short for the contexts that were asked for."""

    code = "sample_text"
    remedy = "Give a longer UTF-8 text with --text, or ask for shorter --contexts."


class MeasurementError(SettingsError):
    """A context, position, layer or head that was asked for is not one of this model's."""

    code = "invalid_measurement"
    remedy = "Correct the option that the message names; `--help` lists them all."


class SelftestAnswersError(VashistaError):
    """The known answers of a model are missing, damaged, or of another version."""

    code = "selftest_answers"
    remedy = (
        "Give --model the bundled model, copy selftest.json again, or make it with `vashista selftest --write` on a "
        "machine that you trust."
    )


class SelftestModelError(ModelError):
    """A file of the model is not the one that the known answers were made with, or cannot be read."""

    code = "selftest_model"
    remedy = "Copy the model folder again from the medium that it came on, and let the user who runs this read it."


class SelftestFailedError(VashistaError):
    """A check of the installation failed."""

    code = "selftest_failed"
    remedy = "Do what the lines marked `remedy` say; do not serve with this installation before."


class DoctorFailedError(VashistaError):
    """A check of `vashista doctor` found something that is not as it should be."""

    code = "doctor_failed"
    remedy = "Do what the lines marked `remedy` say, and run it again."


class DoctorOptionError(SettingsError):
    """An option of `vashista doctor` or `vashista attest` names something that is not there."""

    code = "invalid_doctor_option"
    remedy = "Correct the option that the message names; `--help` lists them all."


class AttestationError(VashistaError):
    """The file is no attestation, was changed since it was signed, or is signed by another key."""

    code = "attestation_invalid"
    remedy = "Do not believe the file; have `vashista attest write` run again on the machine, and compare fingerprints."


class KeyOptionError(SettingsError):
    """A name, a role or a limit of an API key is not possible."""

    code = "invalid_key_option"
    remedy = "Correct what the message names; `vashista keys COMMAND --help` says what is possible."


class WorkloadError(SettingsError):
    """An option of the load generator, or of `vashista predict`, is mistyped, out of range, or contradicts another."""

    code = "invalid_workload"
    remedy = "Correct the option that the message names; `--help` lists them all."


class ServerUnreachableError(VashistaError):
    """The load generator gets no connection to the server, or the connection ends without a reply."""

    code = "server_unreachable"
    http_status = 502
    remedy = "Start the server, or correct --url; `curl URL/v1/models` must answer."


class UnexpectedReplyError(VashistaError):
    """The server answers, but not as an OpenAI-compatible server does."""

    code = "unexpected_reply"
    http_status = 502
    remedy = "Give the base URL of an OpenAI-compatible server, without /v1, and an --endpoint that it has."


class WarmUpFailedError(VashistaError):
    """A warm-up request of the load generator failed, so the measured ones most likely would too."""

    code = "warm_up_failed"
    http_status = 502
    remedy = "Correct what the server's message names, or measure nevertheless with --warmup 0."


class ReportFileError(VashistaError):
    """The file for the results cannot be written."""

    code = "report_file"
    remedy = "Choose a path in a folder that exists and that you may write to, on a disk with room."
