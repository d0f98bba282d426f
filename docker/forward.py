"""Passes TCP connections on to a Unix socket: the proxy of docker/compose.yaml, in the image as forward.py.

    python3 -I forward.py 0.0.0.0:8000 /run/vashista/vashista.sock

A connection is closed in the direction in which its peer closed it, so that a client may stop sending and still read.
"""

import asyncio
import contextlib
import signal
import sys

CHUNK_BYTES = 1 << 16


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until the end, then end the other side too."""
    with contextlib.suppress(OSError):
        while chunk := await reader.read(CHUNK_BYTES):
            writer.write(chunk)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


async def forward(path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection; closed at once when nobody listens on the path."""
    try:
        inner_reader, inner_writer = await asyncio.open_unix_connection(path)
    except OSError as error:
        print(f"{path}: {error.strerror or error}", file=sys.stderr, flush=True)
        writer.close()
        return
    try:
        up = asyncio.ensure_future(copy(reader, inner_writer))
        # The server's end is the connection's end; a client that only stopped sending still gets its reply.
        await copy(inner_reader, writer)
        up.cancel()
    finally:
        inner_writer.close()
        writer.close()


async def serve(host: str, port: int, path: str) -> None:
    """Until SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await forward(path, reader, writer)

    server = await asyncio.start_server(connected, host, port)
    print(f"Listening on {host}:{server.sockets[0].getsockname()[1]}", flush=True)
    await stopped.wait()
    server.close()


def main() -> int:
    """2 when the command line is wrong."""
    host, _, port = sys.argv[1].rpartition(":") if len(sys.argv) == 3 else ("", "", "")
    if not host or not port.isdecimal():
        print("Give HOST:PORT and the path of a Unix socket.", file=sys.stderr)
        return 2
    asyncio.run(serve(host.strip("[]"), int(port), sys.argv[2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
