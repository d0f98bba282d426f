"""Where the server listens, and what it says when it cannot."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import httpx
import pytest

from vashista.engine.errors import PortTakenError, SettingsError
from vashista.server.listening import listen
from vashista.server.settings import Settings


def settings(**values) -> Settings:
    return Settings.model_validate({"model": "x", **values})


def test_a_taken_port_is_a_named_error_with_the_address():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"127.0.0.1:{port}"):
            listen(settings(port=port))


def test_port_zero_takes_a_free_one_and_any_address_is_reached_by_loopback():
    listener = listen(settings(host="0.0.0.0", port=0))
    assert listener.url == f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
    listener.close()


def test_an_address_that_is_not_ours_is_a_named_error():
    with pytest.raises(SettingsError, match=r"cannot listen on 192.0.2.1"):
        listen(settings(host="192.0.2.1", port=0))


@pytest.mark.parametrize("isolation", ["none", "required"])
@pytest.mark.parametrize("host", ["LOCALHOST", "name.example", "no such host", "x" * 300, "127.0.0.1."])
def test_a_name_is_not_looked_up_not_even_one_that_resolves_everywhere(host, isolation):
    with pytest.raises(SettingsError, match="looks up no names"):
        listen(settings(host=host, port=0, isolation=isolation))


@pytest.mark.parametrize(("host", "address"), [("localhost", "127.0.0.1"), ("127.0.0.2", "127.0.0.2")])
def test_localhost_is_loopback_without_asking_anybody(host, address):
    listener = listen(settings(host=host, port=0))
    assert listener.socket.getsockname()[0] == address
    listener.close()


def test_a_stale_socket_file_is_replaced_and_removed_at_the_end(tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    listener = listen(settings(uds=str(path)))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    with pytest.raises(PortTakenError):
        listen(settings(uds=str(path)))
    listener.close()
    assert not path.exists()


def test_a_file_that_is_no_socket_is_left_alone(tmp_path):
    path = tmp_path / "notes"
    path.write_text("precious")
    with pytest.raises(SettingsError, match="not a socket"):
        listen(settings(uds=str(path)))
    assert path.read_text() == "precious"


def test_a_folder_that_does_not_exist_is_a_named_error(tmp_path):
    with pytest.raises(SettingsError, match="cannot listen"):
        listen(settings(uds=str(tmp_path / "nowhere" / "socket")))


def test_an_fd_must_be_a_listening_socket(tmp_path):
    with socket.socket() as idle, pytest.raises(SettingsError, match="does not listen"):
        listen(settings(fd=idle.fileno()))
    with (tmp_path / "file").open("w") as file, pytest.raises(SettingsError, match="not a socket"):
        listen(settings(fd=file.fileno()))
    with pytest.raises(SettingsError, match="not a socket"):
        listen(settings(fd=9999))


def test_the_server_answers_on_an_inherited_socket(start_server):
    with socket.create_server(("127.0.0.1", 0)) as inherited:
        os.set_inheritable(inherited.fileno(), True)
        server = start_server(fd=inherited.fileno()).wait_ready()
        assert server.url.endswith(str(inherited.getsockname()[1]))
        assert server.complete().status_code == 200


def test_the_server_answers_on_a_unix_socket_and_removes_it(start_server, tmp_path):
    path = tmp_path / "socket"
    server = start_server(uds=str(path)).wait_ready()
    assert f"--unix-socket {path} " in server.announcement
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
        assert client.get("http://localhost/ready").status_code == 200
    server.process.terminate()
    assert server.process.wait(30) == 0
    assert not Path(path).exists()


def test_a_server_that_finds_its_port_taken_ends_before_it_starts_an_engine(start_server):
    with socket.create_server(("127.0.0.1", 0)) as other:
        server = start_server(port=other.getsockname()[1])
        assert server.process.wait(30) != 0
    assert "PortTakenError" in server.log()
    assert "engine process started" not in server.log()


def test_a_state_folder_that_cannot_be_made_is_a_named_error(start_server, tmp_path):
    (tmp_path / "file").write_text("")
    server = start_server(state_dir=str(tmp_path / "file" / "state"))
    assert server.process.wait(30) != 0
    assert "StateFolderError" in server.log()
