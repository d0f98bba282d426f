"""The image's health check: asks the server within the container; exit status 0 when it answers 200.

    python3 -I health.py [ADDRESS [PATH [KEYFILE]]]

ADDRESS is the server's Unix socket (/run/vashista/vashista.sock unless given) or http[s]://127.0.0.1:PORT, PATH is
/health, which needs no key, or /ready, which needs one of any role once there are keys. KEYFILE may be missing.
"""

import http.client
import socket
import ssl
import sys
import urllib.parse

UDS = "/run/vashista/vashista.sock"
TIMEOUT_S = 4


def connect(address: str) -> http.client.HTTPConnection:
    """A connection to the server; OSError."""
    url = urllib.parse.urlsplit(address)
    if url.scheme:
        sock = socket.create_connection((url.hostname, url.port), TIMEOUT_S)
        if url.scheme == "https":  # our own certificate, whose names are those that the LAN knows
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            sock = context.wrap_socket(sock)
    else:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(TIMEOUT_S)
        sock.connect(address)
    connection = http.client.HTTPConnection("localhost", timeout=TIMEOUT_S)
    connection.sock = sock
    return connection


def headers(key_file: str) -> dict[str, str]:
    """With the key, where there is one."""
    try:
        with open(key_file, encoding="ascii") as file:
            return {"Authorization": f"Bearer {file.read().strip()}"}
    except FileNotFoundError:
        return {}


def main() -> int:
    """1 with a line on stderr when the server does not answer or is not well."""
    address, path, key_file = [*sys.argv[1:], *(UDS, "/health", "")[len(sys.argv) - 1 :]]
    try:
        connection = connect(address)
        connection.request("GET", path, headers=headers(key_file))
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        print(f"{address}: {error}", file=sys.stderr)
        return 1
    if status != 200:
        print(f"{path} answers {status}", file=sys.stderr)
    return int(status != 200)


if __name__ == "__main__":
    sys.exit(main())
