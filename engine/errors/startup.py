"""Errors of settings, state folder, keys and model: what keeps a server or a command from starting."""

from __future__ import annotations

from vashista.engine.errors.root import VashistaError


class SettingsError(VashistaError):
    """A setting is unknown, mistyped or out of range."""

    code = "invalid_settings"
    remedy = "Correct the setting; `vashista serve --help` lists them all."


class PortTakenError(VashistaError):
    """Another process listens on the address."""

    code = "port_taken"
    remedy = "Stop the other process or choose another --port."


class StateFolderError(VashistaError):
    """The state folder cannot be created or written."""

    code = "state_folder_not_writable"
    remedy = "Give the server's user write permission, free space on its disk, or choose another --state-dir."


class StateFolderNewerError(StateFolderError):
    """A newer version wrote the state folder, in a layout that this one does not know."""

    code = "state_folder_newer"
    remedy = "Start the newer version again, restore the state folder from before it, or choose another --state-dir."


class StateFolderTakenError(StateFolderError):
    """Another server runs on the state folder; receipts and the limits of keys are counted by one server alone."""

    code = "state_folder_taken"
    remedy = "Stop the other server, or give this one a --state-dir of its own."


class IsolationMissingError(VashistaError):
    """Isolation was asked for and is not there, so that nothing is served."""

    code = "isolation_missing"
    remedy = (
        "Run the server in the units of deploy/systemd or a container with --network none; or, knowing what it means, "
        "choose another --isolation."
    )


class KeyNotFoundError(VashistaError):
    """No API key has this id."""

    code = "key_not_found"
    http_status = 404
    remedy = "`vashista keys list` prints the ids."


class ModelError(VashistaError):
    """The model folder cannot be served."""

    code = "invalid_model"
    remedy = "Correct what the message names, or copy the model folder again."


class ModelFolderError(ModelError):
    """The model folder or one of its files is missing or unreadable."""

    code = "model_folder"
    remedy = "Give the path of a folder with config.json, tokenizer.json and *.safetensors."


class ModelConfigError(ModelError):
    """config.json is not valid or lacks something the model needs."""

    code = "model_config"
    remedy = "Copy config.json from the model's publisher again."


class UnsupportedArchitectureError(ModelError):
    """The architecture is none that this server runs."""

    code = "unsupported_architecture"
    remedy = "Use a model of a supported architecture; the message lists them."


class UnsupportedRopeError(ModelError):
    """The rotary position scaling is of a type that this server does not know."""

    code = "unsupported_rope"
    remedy = "Use a model with one of the rope types that the message lists."


class CheckpointError(ModelError):
    """The safetensors files do not match the index or the architecture."""

    code = "invalid_checkpoint"
    remedy = "Copy the model's safetensors files and index again and compare their checksums."


class PickleRefusedError(ModelError):
    """The folder holds weights as pickle files only; loading them would run code."""

    code = "pickle_refused"
    remedy = "Convert the weights to safetensors on a machine where running their code is acceptable."


class TokenizerError(ModelError):
    """tokenizer.json is missing or cannot be read."""

    code = "invalid_tokenizer"
    remedy = "Copy tokenizer.json from the model's publisher; sentencepiece files alone must be converted first."


class ChatTemplateFileError(ModelError):
    """The model's chat template is no valid Jinja, or the process that renders it cannot be started."""

    code = "invalid_chat_template"
    http_status = 503
    remedy = "The operator must copy the template from the model's publisher again, or free what the message names."


class NotEnoughMemoryError(ModelError):
    """The model and a minimal KV cache do not fit into the device's memory."""

    code = "not_enough_memory"
    remedy = (
        "Use a smaller dtype or model, lower max_context, set kv_cache_bytes to what is free, free memory, or raise "
        "the limit that is named."
    )


class DeviceError(ModelError):
    """The device that was asked for is not there or cannot run the model."""

    code = "device_unavailable"
    remedy = "Choose --device cpu, or make the GPU and its driver visible to this process."


class SupportProfileError(ModelError):
    """The support profile cannot be used with this model."""

    code = "invalid_support_profile"
    remedy = "Make it anew with `vashista calibrate MODEL`."


class SupportProfileFileError(SupportProfileError):
    """The file of the support profile is missing, or cannot be read or written."""

    code = "support_profile_file"
    remedy = "Correct the path or its permissions, or make a profile with `vashista calibrate MODEL --out FILE`."


class SupportProfileDamagedError(SupportProfileError):
    """The file of the support profile is not JSON, lacks a field, or contradicts itself."""

    code = "support_profile_damaged"


class SupportProfileVersionError(SupportProfileError):
    """The support profile was written by a version of this program with another format."""

    code = "support_profile_version"


class SupportProfileMismatchError(SupportProfileError):
    """The support profile was measured on another model."""

    code = "support_profile_mismatch"
    remedy = "Use the profile of this model, or make it with `vashista calibrate MODEL`."
