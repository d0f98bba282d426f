"""The arithmetic of the chain: what is hashed and what is signed. docs/ledger.md states the same for other programs.

The writer (`ledger.py`), `prune.py` and `verify.py` use it; `deploy/verify_ledger.py` has it a second time, on purpose.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

Kind = Literal["head", "anchor", "checkpoint"]

GENESIS_DOMAIN = b"vashista-ledger-v1\n"
RECEIPT_DOMAIN = b"vashista-receipt-v1\n"


def genesis(ledger_id: str) -> bytes:
    """The hash before the first receipt; `ledger_id` is 32 hexadecimal digits."""
    return hashlib.sha256(GENESIS_DOMAIN + ledger_id.encode()).digest()


def link(previous: bytes, seq: int, body: bytes) -> bytes:
    """The hash of receipt `seq` after the hash of the one before."""
    return hashlib.sha256(RECEIPT_DOMAIN + previous + seq.to_bytes(8, "big") + body).digest()


class Mark(msgspec.Struct, frozen=True):
    """A signed statement that the chain had this hash at this receipt.

    The head is the last receipt and is renewed with every commit; the anchor is the last one that was pruned;
    checkpoints stay.
    """

    kind: Kind
    seq: int
    hash: bytes
    previous: int
    """The last checkpoint before; 0 for none. So no checkpoint can vanish unseen."""
    time: str
    signature: bytes = b""

    def statement(self, ledger_id: str) -> bytes:
        """The bytes that are signed."""
        parts = ("vashista-mark-v1", ledger_id, self.kind, self.seq, self.hash.hex(), self.previous, self.time)
        return "".join(f"{part}\n" for part in parts).encode()
