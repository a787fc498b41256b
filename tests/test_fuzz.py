"""5,000 requests made from the server's own OpenAPI document: no 5xx, no malformed answer."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from bases import random_adapter, random_basis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from serving import lorasb, serving

from lorasb_runtime.storage.adapter_file import save_adapter
from lorasb_runtime.storage.basis_file import save_basis

LEAST = 5000
# How many bodies that are right by the document, and how many that are wrong.
EXAMPLES = {
    "POST /v1/chat/completions": (350, 200),
    "POST /v1/completions": (800, 300),
    "POST /v1/responses": (250, 150),
    "PUT /v1/adapters/{name}": (300, 200),
    "POST /v1/adapters/{name}/rollback": (150, 100),
    "POST /tokenize": (200, 150),
    "POST /detokenize": (500, 200),
}
OTHERS = 250  # of an operation without a body
RIGHT = {200, 400, 401, 403, 404, 405, 409, 413, 415, 422, 429}
BASE, *ADAPTERS = NAMES = ("pico", "alice", "team/bob")
VOCAB = 259
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def url(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("fuzz")
    basis = random_basis(pico)
    save_basis(basis, folder / "basis.safetensors")
    for seed, name in enumerate(ADAPTERS):
        save_adapter(random_adapter(basis, seed), folder / "adapter.safetensors")
        lorasb("publish", folder / "adapter.safetensors", folder / "store", name)
    words = ("--basis", folder / "basis.safetensors", "--adapters", folder / "store")
    with serving(folder / "serve.log", pico, *words) as url:
        yield url


def test_no_request_breaks_the_server(url: str) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    seen: Counter[tuple[str, int]] = Counter()
    labels = set()
    with requests.Session() as session:
        for found in schema.get_all_operations():
            operation = found.ok()
            labels.add(operation.label)
            right, wrong = EXAMPLES.get(operation.label, (OTHERS, 0))
            _fuzz(operation, GenerationMode.POSITIVE, right, session, seen)
            if wrong:
                _fuzz(operation, GenerationMode.NEGATIVE, wrong, session, seen)
        assert session.get(f"{url}/v1/models").json()["data"][0]["id"] == BASE
    assert set(EXAMPLES) <= labels
    assert sum(seen.values()) >= LEAST, seen
    for label in EXAMPLES:  # the requests went deeper than the first checks
        if "{name}" not in label:
            assert seen[label, 200] >= 20, seen


def _fuzz(
    operation: Any,
    mode: GenerationMode,
    count: int,
    session: requests.Session,
    seen: Counter[tuple[str, int]],
) -> None:
    """Ask `count` times, and check each answer against the document and OpenAI's error object."""

    @given(operation.as_strategy(generation_mode=mode), st.sampled_from(NAMES))
    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any, name: str) -> None:
        _steer(case, name)
        response = case.call(session=session, timeout=60)
        seen[operation.label, response.status_code] += 1
        assert response.status_code in RIGHT, response.text
        case.validate_response(response, checks=CHECKS)
        if response.status_code != 200:
            _check_error(response.json())
        elif response.headers["content-type"][0].startswith("text/event-stream"):
            _check_events(response.text, cut_short=response.stream_cut_short)

    ask()


def _steer(case: Any, name: str) -> None:
    """Names that exist, tokens of the vocabulary and short answers, so that requests run."""
    if "name" in (case.path_parameters or ()) and case.method in ("GET", "POST"):
        case.path_parameters["name"] = name
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        body["model"] = name
    if body.get("adapter") is not None and name == BASE:
        _steer_adapter(body)
    elif name != BASE:
        body.pop("adapter", None)
    for field in ("stop_token_ids", "prompt", "tokens"):
        if isinstance(body.get(field), list):
            body[field] = [_token(entry) for entry in body[field]]
    if isinstance(body.get("logit_bias"), dict):
        body["logit_bias"] = {str(len(key)): bias for key, bias in body["logit_bias"].items()}
    _shorten(case.operation.path, body)


def _steer_adapter(body: dict[str, Any]) -> None:
    if isinstance(body["adapter"], str):
        body["adapter"] = ADAPTERS[0]
    elif isinstance(body["adapter"], list):
        for part in body["adapter"]:
            if isinstance(part, dict) and "name" in part:
                part["name"] = ADAPTERS[1]


def _token(entry: Any) -> Any:
    if isinstance(entry, list):
        return [_token(token) for token in entry]
    return int(entry % VOCAB) if type(entry) in (int, float) else entry


def _shorten(path: str, body: dict[str, Any]) -> None:
    if path not in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        return
    field = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    if body.get(field) is None or (type(body[field]) is int and body[field] > 3):
        body[field] = 3
    body.pop("max_completion_tokens", None)
    for name in ("n", "min_tokens", "best_of"):
        if type(body.get(name)) is int and body[name] > 3:
            body[name] = 3
    if not body.get("stream"):
        body.pop("stream_options", None)


def _check_error(body: dict[str, Any]) -> None:
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]


def _check_events(text: str, *, cut_short: bool) -> None:
    """`cut_short`: the reader had enough after many events, and closed the connection."""
    *events, done, end = text.split("\n\n")
    assert cut_short or (done, end) == ("data: [DONE]", "")
    for event in events:
        payload = json.loads(event.rsplit("\n", 1)[-1].removeprefix("data: "))
        assert payload.get("error") is None and payload.get("type") != "response.failed"
