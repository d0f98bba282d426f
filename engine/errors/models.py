"""Errors of signed models: what keeps one from being packed, imported, removed or served."""

from __future__ import annotations

from vashista.engine.errors.startup import ModelError


class ModelKeyError(ModelError):
    """The key to sign or to check models with is missing, unreadable, or of another kind."""

    code = "model_key"
    remedy = (
        "Give an EC key in PEM: `openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384`, see docs/models.md."
    )


class ModelSignatureError(ModelError):
    """model.sig is missing, damaged, or was changed after it was signed."""

    code = "model_signature"
    remedy = "Copy the model again from whoever signed it; a model of your own is signed by `vashista models pack`."


class ModelUntrustedError(ModelError):
    """The model is signed by a key that is not trusted on this machine."""

    code = "model_untrusted"
    remedy = "If its fingerprint is the one you were told, put the signer's public key among those of model_trust."


class ModelChangedError(ModelError):
    """Files of the model are missing, extra, renamed, truncated or changed, compared with its signed manifest."""

    code = "model_changed"
    remedy = "Do not use these files; import the packed model again, and find out who changed them."


class ModelArchiveError(ModelError):
    """The file is no packed model, or it is damaged."""

    code = "model_archive"
    remedy = "Copy the packed model again from its medium and compare its checksum."


class ModelFileRefusedError(ModelError):
    """The folder holds something that a packed model may not: a link, a folder, code, or a file of no known kind."""

    code = "model_file_refused"
    remedy = "Move it away, or leave it out with `vashista models pack --leave-out NAME`."


class ModelExistsError(ModelError):
    """A model of this name is installed already, or something else stands in its place."""

    code = "model_exists"
    remedy = "Choose another name with `--as NAME`, or remove the installed one first."


class ModelNotInstalledError(ModelError):
    """No model of this name is installed."""

    code = "model_not_installed"
    remedy = "`vashista models list` prints what is installed."


class ModelInUseError(ModelError):
    """A running server serves the model."""

    code = "model_in_use"
    remedy = "Stop that server, or have it serve another model, and try again."


class ModelDiskError(ModelError):
    """The model cannot be written: the disk is full, or the folder may not be written to."""

    code = "model_disk"
    remedy = "Free space or choose another --models-dir, and try again; nothing was left behind."
