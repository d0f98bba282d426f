"""The OpenAPI document says what the server does: checked by schemathesis and by hostile bodies."""

from __future__ import annotations

import json
import random
import re
import string

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from vashista.engine.errors import ERRORS
from vashista.server.app import all_endpoints
from vashista.server.openapi import openapi_document

PATHS = ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/tokenize", "/detokenize"]
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
DOCUMENT = openapi_document(all_endpoints())


def operations(server):
    schema = schemathesis.openapi.from_dict(json.loads(json.dumps(DOCUMENT)))
    schema.config.update(base_url=server.url)
    return [result.ok() for result in schema.get_all_operations()]


POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
CASES = [(path, POSITIVE) for path in DOCUMENT["paths"]] + [(path, NEGATIVE) for path in PATHS]


@pytest.mark.parametrize(("path", "mode"), CASES)
def test_every_reply_is_documented_and_none_is_a_server_error(server, path, mode):
    (operation,) = [operation for operation in operations(server) if operation.path == path]
    checks = [*CHECKS, negative_data_rejection] if mode is NEGATIVE else CHECKS
    statuses = set()
    # about one request in ten that is drawn for a chat is one that can be answered
    num_examples = 150 if mode is POSITIVE and path in PATHS else 50

    @settings(
        max_examples=num_examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
        derandomize=True,
        database=None,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        if (
            isinstance(case.body, dict)
            and isinstance(case.body.get("model"), str)
            and 0 < len(case.body["model"]) <= 512
        ):
            case.body["model"] = "reference-26m"
        response = case.call(timeout=30)
        statuses.add(response.status_code)
        case.validate_response(response, checks=checks)

    check()
    assert statuses != {400} or mode is NEGATIVE


def test_every_error_of_a_route_is_listed_with_its_explanation():
    completion = DOCUMENT["paths"]["/v1/completions"]["post"]["responses"]
    assert set(completion) == {"200", "400", "401", "403", "404", "405", "413", "429", "500", "503"}
    for code in ("queue_full", "rate_limit_exceeded", "quota_exceeded"):
        assert code in completion["429"]["description"]
    assert ERRORS["draining"].__doc__ in completion["503"]["description"]


def test_every_reference_resolves_and_ids_are_unique():
    text = json.dumps(DOCUMENT)
    names = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert names <= set(DOCUMENT["components"]["schemas"])
    ids = re.findall(r'"operationId": "(\w+)"', text)
    assert len(ids) == len(set(ids)) == sum(len(item) for item in DOCUMENT["paths"].values())


def test_the_document_and_the_page_name_no_other_host(server):
    for path in ("/openapi.json", "/docs", "/docs/docs.css", "/docs/docs.js"):
        reply = httpx.get(server.url + path)
        assert reply.status_code == 200
        assert not re.search(r"https?://|//[a-z0-9.-]+\.[a-z]{2,}", reply.text), path
    policy = httpx.get(server.url + "/docs").headers["content-security-policy"]
    assert "default-src 'none'" in policy


def test_the_docs_can_be_switched_off(start_server):
    server = start_server(api_docs=False).wait_ready()
    for path in ("/docs", "/openapi.json", "/docs/docs.js"):
        assert httpx.get(server.url + path).status_code == 404


HUGE = ["x" * 100_000, [0] * 20_000, "𐍈" * 20_000, ["a"] * 5_000, {str(number): 1 for number in range(5_000)}]
WEIRD = [{"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}, [[[]]], {}, [None], [[0, "a"]]]
INTEGERS = [0, 1, -1, 2**31, 2**63, -(2**63), 2**64, 10**40, 8191, 8192]
FLOATS = [0.0, -0.0, 1e308, -1e308, 5e-324, 0.5, 1.0, 2.0]
CHARACTERS = string.printable + "é€𐍈\u0000\u202e\ufeff"


def hostile_value(rng: random.Random, depth: int = 0):
    makers = [
        lambda: rng.choice([None, True, False]),
        lambda: rng.choice(INTEGERS),
        lambda: rng.choice(FLOATS),
        lambda: "".join(rng.choices(CHARACTERS, k=rng.randint(0, 30))),
        lambda: [hostile_value(rng, depth + 1) for _ in range(rng.randint(0, 4))],
        lambda: {rng.choice(["type", "role", "content", "a", ""]): hostile_value(rng, depth + 1) for _ in range(3)},
        lambda: rng.choice(HUGE),
        lambda: rng.choice(WEIRD),
    ]
    return rng.choice(makers[:4] if depth > 3 else makers)()


def hostile_body(rng: random.Random, path: str) -> bytes:
    name = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].split("/")[
        -1
    ]
    fields = list(DOCUMENT["components"]["schemas"][name]["properties"])
    body = {"model": "reference-26m", "prompt": "hello", "messages": [{"role": "user", "content": "hi"}], "tokens": [1]}
    body = {key: value for key, value in body.items() if key in fields}
    if "max_tokens" in fields:
        body["max_tokens"] = 2
    if path == "/tokenize":
        del body["messages"]
    for _ in range(rng.choice([1, 1, 2, 3])):
        body[rng.choice(fields)] = hostile_value(rng)
    data = json.dumps(body).encode()
    if rng.random() < 0.25:
        position = rng.randrange(len(data))
        data = (
            data[:position] + bytes(rng.choices(range(256), k=rng.randint(0, 5))) + data[position + rng.randint(0, 5) :]
        )
    return data


def test_500_hostile_bodies_get_a_documented_reply_and_the_server_lives(server):
    rng = random.Random(20261)
    statuses = []
    with httpx.Client(timeout=60) as client:
        for number in range(500):
            path = PATHS[number % len(PATHS)]
            data = hostile_body(rng, path)
            reply = client.post(server.url + path, content=data, headers={"content-type": "application/json"})
            statuses.append(reply.status_code)
            assert str(reply.status_code) in DOCUMENT["paths"][path]["post"]["responses"], data[:500]
            assert reply.status_code < 500, (data[:500], reply.text)
            if reply.status_code != 200:
                assert reply.json()["error"]["code"] in ERRORS
    assert statuses.count(400) > 200
    assert statuses.count(200) > 8
    assert server.complete().status_code == 200
    server.wait_for(lambda: server.metric("vashista_requests_running") == 0)
