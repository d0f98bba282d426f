"""The image's health check: asks /health over the server's Unix socket; exit status 0 when it answers 200."""

import http.client
import os
import socket
import sys


def main() -> int:
    """1 with a line on stderr when the server does not answer or is not well."""
    path = os.environ.get("VASHISTA_UDS", "/run/vashista/vashista.sock")
    connection = http.client.HTTPConnection("localhost", timeout=4)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(4)
    try:
        connection.sock.connect(path)
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    if status != 200:
        print(f"/health answers {status}", file=sys.stderr)
    return int(status != 200)


if __name__ == "__main__":
    sys.exit(main())
