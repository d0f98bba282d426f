"""The model as the server knows it: its name, tokenizer, chat template and configuration. No weights, no torch.

`server/serve.py` loads it once; admission tokenises with it, the reply builders name tokens with it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import lru_cache

from vashista.engine.errors import ModelNotFoundError
from vashista.engine.model_config import ModelConfig, load_model_config
from vashista.engine.model_digest import model_digest
from vashista.engine.tokenizer import Tokenizer
from vashista.server.chat_prompts import ChatPrompts
from vashista.server.model_store.startup import VerifiedModel
from vashista.server.settings import Settings


@dataclass(frozen=True)
class ServedModel:
    """One model under one name."""

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    chat_template: ChatPrompts | None
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix seconds at which the server loaded it."""
    sampled_digest: str | None = None
    """Of `engine/model_digest.py`: what the engine calls the model, signed or not."""
    digest: str | None = None
    """What tells the model's files from others, for the receipts: the root digest of the signed manifest that they were
    checked against, else the sampled one."""
    signed_by: str | None = None
    """Fingerprint of the key, where the files were checked."""

    @classmethod
    def load(cls, settings: Settings, verified: VerifiedModel | None = None) -> ServedModel:
        """Read the text files of the model's folder, and start the process that renders its chat template.

        ModelError or a child when they are not usable.
        """
        config = load_model_config(settings.model)
        tokenizer = Tokenizer.load(settings.model, config.vocab_size)
        prompts = ChatPrompts(settings.model, settings.max_body_bytes)
        sampled = model_digest(settings.model)
        return cls(
            settings.model_name,
            config,
            tokenizer,
            prompts if prompts.start() else None,
            sampled_digest=sampled,
            digest=sampled if verified is None else verified.root_digest,
            signed_by=None if verified is None else verified.signer,
        )

    def close(self) -> None:
        """End the process of the chat template."""
        if self.chat_template is not None:
            self.chat_template.close()

    def check_name(self, name: str | None) -> None:
        """ModelNotFoundError unless the name is this model's; None stands for it."""
        if name is not None and name != self.name:
            raise ModelNotFoundError(f"There is no model {name[:200]!r}; this server has {self.name!r}.", param="model")

    def token_label(self, token_id: int) -> str:
        """A token as text; as `bytes:\\xe2\\x80` when it holds a part of a character, so that labels stay distinct."""
        return _label(self.tokenizer.token_bytes(token_id))


@lru_cache(maxsize=1 << 16)
def _label(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
