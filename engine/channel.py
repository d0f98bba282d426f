"""The one narrow channel between server and engine: length-prefixed MessagePack over a socket pair.

A frame is four bytes of length (little endian) and that many bytes of one message. The engine's side blocks and is
used from two threads (one reads, one writes); the server's side lives in `server/engine_client.py` on asyncio and uses
`encode_frame` and the decoders here.
"""

from __future__ import annotations

import socket
import struct

import msgspec

from vashista.engine.messages import FromEngine, ToEngine

HEADER = struct.Struct("<I")
MAX_FRAME_BYTES = 1 << 30

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    """One message as a frame, header included."""
    body = _encoder.encode(message)
    assert len(body) <= MAX_FRAME_BYTES
    return HEADER.pack(len(body)) + body


def decode_from_engine(body: bytes) -> FromEngine:
    """The message of a frame's body, as the server reads it."""
    message: FromEngine = _from_engine.decode(body)
    return message


class EngineChannel:
    """The engine's end of the channel. `receive` returns None once the server is gone."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, message: FromEngine) -> None:
        """Write one frame; raises OSError when the server is gone."""
        self._sock.sendall(encode_frame(message))

    def receive(self) -> ToEngine | None:
        """Block for the next message."""
        header = self._read(HEADER.size)
        if header is None:
            return None
        body = self._read(HEADER.unpack(header)[0])
        return None if body is None else _to_engine.decode(body)

    def _read(self, num_bytes: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < num_bytes:
            part = self._sock.recv(num_bytes - len(parts))
            if not part:
                return None
            parts += part
        return bytes(parts)
