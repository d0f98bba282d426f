"""API keys over HTTP: needed on every route but /health as soon as one was ever made."""

from __future__ import annotations

import base64

import anthropic
import httpx
import openai
import pytest

from vashista.server.app import all_endpoints
from vashista.server.keys import KeyStore, Role


@pytest.fixture(scope="module")
def locked(start_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    store = KeyStore(folder / "keys.db")
    _, secret = store.create("alice", [Role.INFER, Role.METRICS])
    revoked, revoked_secret = store.create("bob")
    store.revoke(revoked.id)
    store.close()
    return start_server(state_dir=str(folder)).wait_ready(), secret, revoked_secret


def ask(server, method, path, **headers):
    return httpx.request(method, server.url + path, headers=headers)


def test_every_route_but_health_needs_a_key(locked):
    server, _, _ = locked
    paths = {endpoint.path: endpoint.method for endpoint in all_endpoints()}
    assert len(paths) > 10
    for path, method in paths.items():
        reply = ask(server, method, path.replace("{model}", "x"))
        assert reply.status_code == (200 if path == "/health" else 401), path
    reply = ask(server, "GET", "/nowhere")
    assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    assert "Bearer" in reply.headers["www-authenticate"]


def test_wrong_revoked_and_malformed_keys_are_refused(locked):
    server, secret, revoked = locked
    wrong = [secret[:-1] + ("a" if secret[-1] != "a" else "b"), revoked, "x", "vsk__", "ü"]
    headers = [f"Bearer {key}".encode() for key in wrong] + [b"Bearer", b"Basic ???", b"Basic", b"Digest x"]
    for value in headers:
        assert ask(server, "GET", "/v1/models", authorization=value).status_code == 401, value


def test_a_right_key_opens_by_bearer_header_basic_password_and_x_api_key(locked):
    server, secret, _ = locked
    basic = base64.b64encode(f"anyone:{secret}".encode()).decode()
    for headers in ({"authorization": f"Bearer {secret}"}, {"authorization": f"Basic {basic}"}, {"x-api-key": secret}):
        assert ask(server, "GET", "/v1/models", **headers).status_code == 200
    with openai.OpenAI(base_url=server.url + "/v1", api_key=secret) as client:
        assert client.completions.create(model="reference-26m", prompt="hello world", max_tokens=1).choices
    wrong = openai.OpenAI(base_url=server.url + "/v1", api_key="wrong")
    with wrong as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_the_anthropic_client_is_let_in_by_its_key_and_told_so_in_its_words(locked):
    server, secret, _ = locked
    fields = {"model": "reference-26m", "max_tokens": 1, "messages": [{"role": "user", "content": "hello"}]}
    with anthropic.Anthropic(base_url=server.url, api_key=secret) as client:
        assert client.messages.create(**fields).content
    wrong = anthropic.Anthropic(base_url=server.url, api_key="wrong")
    with wrong as client, pytest.raises(anthropic.AuthenticationError) as caught:
        client.messages.create(**fields)
    assert caught.value.body["error"]["type"] == "authentication_error"
    assert caught.value.body["error"]["code"] == "invalid_api_key"


def test_each_role_opens_its_paths_and_admin_opens_all(start_server, tmp_path):
    store = KeyStore(tmp_path / "keys.db")
    keys = {role: store.create(str(role), [role])[1] for role in Role}
    store.close()
    server = start_server(state_dir=str(tmp_path)).wait_ready()
    expected = {
        "/v1/models": {Role.INFER, Role.ADMIN},
        "/v1/models/reference-26m": {Role.INFER, Role.ADMIN},
        "/metrics": {Role.METRICS, Role.ADMIN},
        **{path: set(Role) for path in ("/ready", "/version", "/docs", "/openapi.json", "/health")},
    }
    for path, roles in expected.items():
        for role, secret in keys.items():
            reply = ask(server, "GET", path, authorization=f"Bearer {secret}")
            assert reply.status_code == (200 if role in roles else 403), (path, role)
    body = {"model": "reference-26m", "prompt": "x", "max_tokens": 1}
    header = {"authorization": f"Bearer {keys[Role.METRICS]}"}
    reply = httpx.post(server.url + "/v1/completions", json=body, headers=header, timeout=60)
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "role_missing")
    assert "needs infer or admin" in reply.json()["error"]["message"]


def test_refusals_are_counted_by_code(locked):
    server, secret, _ = locked
    ask(server, "GET", "/v1/models")
    text = ask(server, "GET", "/metrics", authorization=f"Bearer {secret}").text
    assert 'vashista_requests_refused_total{code="invalid_api_key"}' in text


def test_the_announced_command_names_the_key(locked):
    # Not a name with VASHISTA_: exported, it would be an unknown setting of the next `vashista serve`.
    assert "Authorization: Bearer $KEY" in locked[0].announcement
    assert locked[1] not in locked[0].announcement + locked[0].log()


def test_unreadable_keys_let_nobody_in_and_name_no_file_to_callers(start_server, tmp_path):
    store = KeyStore(tmp_path / "keys.db")
    _, secret = store.create("alice")
    store.close()
    server = start_server(state_dir=str(tmp_path)).wait_ready()
    (tmp_path / "keys.db").rename(tmp_path / "elsewhere")
    header = {"authorization": f"Bearer {secret}"}
    reply = server.wait_for(lambda: (r := ask(server, "GET", "/v1/models", **header)).status_code != 200 and r)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "keys_unreadable")
    assert str(tmp_path) not in reply.text
    assert "keys.db" not in reply.text
    assert "keys.db was removed" in server.log()
    assert ask(server, "GET", "/health").status_code == 200
