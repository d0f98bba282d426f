"""HTTPS with the operator's certificates, by clients that nobody here wrote; a new certificate cuts no stream."""

from __future__ import annotations

import datetime
import http.client
import ipaddress
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from vashista.engine.errors import (
    SettingsError,
    TlsError,
    TlsExpiredError,
    TlsFileError,
    TlsKeyMismatchError,
    TlsKeyOpenError,
)
from vashista.server.doctor import trust
from vashista.server.doctor.finding import State
from vashista.server.settings import Settings, load_settings
from vashista.server.tls import load

DAY = datetime.timedelta(days=1)
NOW = datetime.datetime.now(datetime.UTC)


class Authority:
    """A private CA in a folder."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._build(self.name, self.key, NOW - DAY, NOW + 100 * DAY, is_ca=True)
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *, days: float = 90, start: float = -1, mode: int = 0o600) -> tuple[Path, Path]:
        """Certificate and key, written over those of the same name."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._build(subject, key, NOW + start * DAY, NOW + days * DAY)
        paths = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        paths[1].write_bytes(key.private_bytes(*form))
        paths[1].chmod(mode)
        return paths

    def _build(self, subject: x509.Name, key: Any, start: Any, end: Any, *, is_ca: bool = False) -> x509.Certificate:
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        constraints, usage = x509.BasicConstraints(is_ca, None), x509.KeyUsage(
            True, False, False, False, False, is_ca, is_ca, False, False
        )  # fmt: skip
        identity = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = x509.CertificateBuilder(self.name, subject, key.public_key(), x509.random_serial_number(), start, end)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False).add_extension(constraints, True)
        builder = builder.add_extension(usage, True).add_extension(identity, False)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        return builder.add_extension(identifier, False).sign(self.key, hashes.SHA256())

    def context(self, client: tuple[Path, Path] | None = None) -> ssl.SSLContext:
        """Of a client that trusts this CA alone."""
        context = ssl.create_default_context(cafile=str(self.path))
        if client is not None:
            context.load_cert_chain(*map(str, client))
        return context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def secure(start_server: Callable[..., Any], authority: Authority) -> Any:
    certificate, key = authority.issue("server")
    return start_server(tls_certificate=str(certificate), tls_key=str(key)).wait_ready()


def port_of(server: Any) -> int:
    return int(server.url.rsplit(":", 1)[1])


def serial(server: Any, context: ssl.SSLContext) -> str:
    """Of the certificate that a new connection gets."""
    plain = socket.create_connection(("127.0.0.1", port_of(server)))
    with context.wrap_socket(plain, server_hostname="localhost") as connection:
        return str(connection.getpeercert()["serialNumber"])  # type: ignore[index]


def test_the_openai_client_and_curl_work_over_https_with_a_private_ca(secure: Any, authority: Authority) -> None:
    assert secure.url.startswith("https://127.0.0.1:")
    with openai.DefaultHttpxClient(verify=authority.context()) as http, openai.OpenAI(
        base_url=secure.url + "/v1", api_key="none", http_client=http
    ) as client:  # fmt: skip
        stream = client.completions.create(model="reference-26m", prompt="hello", max_tokens=8, stream=True)
        assert len([chunk for chunk in stream if chunk.choices]) >= 8
        assert client.models.list().data[0].id == "reference-26m"
    curl = ["curl", "--silent", "--fail", "--cacert", str(authority.path), secure.url + "/health"]
    assert subprocess.run(curl, check=False).returncode == 0
    assert subprocess.run(["curl", "--silent", secure.url + "/health"], check=False).returncode == 60, "unknown CA"


@pytest.mark.parametrize(
    ("options", "works"),
    [
        (["-tls1_3"], True),
        (["-tls1_2"], True),
        (["-tls1_2", "-cipher", "ECDHE-ECDSA-CHACHA20-POLY1305"], True),
        (["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA256:@SECLEVEL=0"], False),
        (["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"], False),
        (["-tls1", "-cipher", "ALL:@SECLEVEL=0"], False),
    ],
    ids=str,
)
def test_openssl_gets_in_with_modern_protocols_alone(
    secure: Any, authority: Authority, options: list[str], works: bool
) -> None:
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port_of(secure)}", "-CAfile", str(authority.path)]
    done = subprocess.run(
        [*command, "-verify_return_error", "-brief", *options], input=b"", capture_output=True, check=False, timeout=30
    )
    assert (done.returncode == 0) is works, done.stderr.decode()


def test_a_new_certificate_is_taken_while_a_stream_runs_on(secure: Any, authority: Authority) -> None:
    context = authority.context()
    before = serial(secure, context)
    connection = http.client.HTTPSConnection("127.0.0.1", port_of(secure), context=context, timeout=60)
    body = b'{"model": "reference-26m", "prompt": "hello", "max_tokens": 64, "stream": true}'
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    first = reply.readline()
    authority.issue("server")
    secure.process.send_signal(signal.SIGHUP)
    secure.wait_for(lambda: serial(secure, context) != before)
    text = first + reply.read()
    assert text.rstrip().endswith(b"data: [DONE]")
    connection.request("GET", "/metrics")  # on the old connection, which lives on
    metrics = connection.getresponse().read().decode()
    connection.close()
    assert "vashista_tls_reloads_total 1.0" in metrics
    [line] = [line for line in metrics.splitlines() if line.startswith("vashista_tls_certificate_expiry_timestamp")]
    assert abs(float(line.split()[1]) - (NOW + 90 * DAY).timestamp()) < 2


def test_a_new_certificate_that_cannot_be_used_is_named_and_the_old_one_stays(
    secure: Any, authority: Authority
) -> None:
    context = authority.context()
    before = serial(secure, context)
    certificate = authority.folder / "server.pem"
    good = certificate.read_bytes()
    certificate.write_text("nonsense")
    secure.process.send_signal(signal.SIGHUP)
    secure.wait_for(lambda: "error[tls_file]" in secure.log())
    assert serial(secure, context) == before
    certificate.write_bytes(good)


def test_a_changed_file_is_taken_without_a_signal(secure: Any, authority: Authority) -> None:
    context = authority.context()
    before = serial(secure, context)
    authority.issue("server")
    secure.wait_for(lambda: serial(secure, context) != before)


def test_only_clients_with_a_certificate_of_the_ca_get_in_and_the_ca_can_be_changed(
    start_server: Callable[..., Any], tmp_path: Path
) -> None:
    mine, other = Authority(tmp_path, "mine"), Authority(tmp_path, "other")
    certificate, key = mine.issue("server")
    clients = tmp_path / "clients.pem"
    shutil.copy(mine.path, clients)
    server = start_server(tls_certificate=str(certificate), tls_key=str(key), tls_client_ca=str(clients)).wait_ready()

    def status(client: tuple[Path, Path] | None) -> int:
        try:
            with httpx.Client(verify=mine.context(client)) as http:
                return http.get(server.url + "/health").status_code
        except httpx.TransportError:
            return 0

    friend, stranger = mine.issue("friend"), other.issue("stranger")
    assert (status(friend), status(None), status(stranger)) == (200, 0, 0)
    shutil.copy(other.path, clients)
    server.process.send_signal(signal.SIGHUP)
    server.wait_for(lambda: status(stranger) == 200)
    assert status(friend) == 0


def test_an_inherited_socket_and_a_unix_socket_speak_https_too(
    start_server: Callable[..., Any], authority: Authority, tmp_path: Path
) -> None:
    certificate, key = authority.issue("inherited")
    files = {"tls_certificate": str(certificate), "tls_key": str(key)}
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = start_server(fd=listening.fileno(), **files).wait_ready()
        assert httpx.get(server.url + "/health", verify=authority.context()).status_code == 200
    path = f"/tmp/tls-{tmp_path.name[-40:]}.sock"
    start_server(uds=path, **files).wait_ready()
    transport = httpx.HTTPTransport(uds=path, verify=authority.context())
    with httpx.Client(transport=transport) as http:
        assert http.get("https://localhost/health").status_code == 200


@pytest.fixture
def broken(tmp_path: Path) -> tuple[Authority, Callable[..., Settings]]:
    def settings(certificate: Path, key: Path, **more: Path) -> Settings:
        return Settings.model_validate({"model": tmp_path, "tls_certificate": certificate, "tls_key": key, **more})

    return Authority(tmp_path), settings


def test_each_unusable_file_has_an_error_that_names_it(
    broken: tuple[Authority, Callable[..., Settings]], tmp_path: Path
) -> None:
    authority, settings = broken
    good, other = authority.issue("good"), authority.issue("other")
    assert load(settings(*good)).subject == "CN=good"
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    locked = tmp_path / "locked.key"
    key = serialization.load_pem_private_key(good[1].read_bytes(), None)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    locked.write_bytes(key.private_bytes(*form, serialization.BestAvailableEncryption(b"secret")))
    locked.chmod(0o600)
    nonsense.chmod(0o600)
    cases: list[tuple[type[TlsError], str, Settings]] = [
        (TlsFileError, "none.pem of tls_certificate cannot be read", settings(tmp_path / "none.pem", good[1])),
        (TlsFileError, "nonsense.pem of tls_certificate holds no certificates", settings(nonsense, good[1])),
        (TlsFileError, "nonsense.pem is not a private key", settings(good[0], nonsense)),
        (TlsFileError, "locked.key is encrypted", settings(good[0], locked)),
        (TlsFileError, "nonsense.pem of tls_client_ca", settings(*good, tls_client_ca=nonsense)),
        (TlsKeyMismatchError, "other.key is not the key of CN=good", settings(good[0], other[1])),
        (TlsKeyOpenError, "open.key", settings(*authority.issue("open", mode=0o644))),
        (TlsExpiredError, "expired at", settings(*authority.issue("old", start=-20, days=-10))),
        (TlsExpiredError, "is valid only from", settings(*authority.issue("young", start=2))),
    ]
    for kind, words, given in cases:
        with pytest.raises(kind, match=words):
            load(given)
        assert trust.certificates(given).state is State.NOT_OK
    assert trust.certificates(settings(*good)).state is State.OK
    assert "in 3 days" in trust.certificates(settings(*authority.issue("soon", days=3.5))).detail
    with pytest.raises(SettingsError, match="belong together"):
        load_settings({"model": "m", "tls_key": "k"}, {})
