"""Two tenants on a server process of its own, with the pico model and OpenAI's client."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from bases import random_adapter, random_basis
from fake_engine import wait_until
from openai import (
    AuthenticationError,
    NotFoundError,
    OpenAI,
    PermissionDeniedError,
    RateLimitError,
)
from serving import LORASB, lorasb, serving

from lorasb_runtime.storage.adapter_file import serialize_adapter
from lorasb_runtime.storage.basis_file import Basis, save_basis

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8}


@dataclass(frozen=True)
class Running:
    """The server's keys file, its log, and a client for each key; `ids` are the keys' ids."""

    file: Path
    log: Path
    clients: dict[str, OpenAI]
    ids: dict[str, str]

    def text(self, who: str, model: str, prompt: str = "The sea") -> str:
        answer = self.clients[who].completions.create(model=model, prompt=prompt, **GREEDY)
        return answer.choices[0].text

    def put(self, who: str, name: str, data: bytes) -> None:
        self.clients[who].put(f"/adapters/{name}", content=data, cast_to=httpx.Response)


@pytest.fixture(scope="module")
def basis(pico: Path) -> Basis:
    return random_basis(pico, rank=4, scaling=0.5)


@pytest.fixture(scope="module")
def running(
    pico: Path, basis: Basis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("tenants")
    file, log = folder / "keys.json", folder / "serve.log"
    save_basis(basis, folder / "basis.safetensors")
    made = {
        who: json.loads(lorasb("keys", "create", file, "--json", *flags).stdout)
        for who, flags in {
            "acme": ("--role", "publish", "--tenant", "acme"),
            "beta": ("--role", "publish", "--tenant", "beta"),
            "beta-reads": ("--role", "infer", "--tenant", "beta"),
            "root": ("--role", "admin"),
        }.items()
    }
    flags = ("--basis", folder / "basis.safetensors", "--adapters", folder / "store")
    more = ("--dtype", "float32", "--host", "0.0.0.0", "--api-keys", file)
    with serving(log, pico, *flags, *more) as url, ExitStack() as stack:
        url = url.replace("0.0.0.0", "127.0.0.1")
        clients = {
            who: stack.enter_context(
                OpenAI(base_url=f"{url}/v1", api_key=key["key"], max_retries=0)
            )
            for who, key in made.items()
        }
        yield Running(file, log, clients, {who: key["id"] for who, key in made.items()})


def test_each_tenant_has_its_own_alice(running: Running, basis: Basis) -> None:
    for number, who in enumerate(("acme", "beta")):
        running.put(who, "alice", serialize_adapter(random_adapter(basis, number)))
    texts = {who: running.text(who, "alice") for who in ("acme", "beta", "beta-reads")}
    assert texts["acme"] != texts["beta"] == texts["beta-reads"]
    assert running.text("root", "acme/alice") == texts["acme"]
    for who in ("acme", "beta"):
        assert [m.id for m in running.clients[who].models.list()] == ["pico", "alice"]
    listed = [m.id for m in running.clients["root"].models.list()]
    assert listed == ["pico", "acme/alice", "beta/alice"]
    for name in ("beta/alice", "beta/nobody"):
        with pytest.raises(NotFoundError) as refused:
            running.text("acme", name)
        assert refused.value.body == {
            "message": f"The model {name!r} does not exist",
            "type": "not_found_error",
            "param": "model",
            "code": "model_not_found",
        }
    with pytest.raises(PermissionDeniedError):
        running.clients["beta-reads"].delete("/adapters/alice", cast_to=httpx.Response)


def cached(running: Running, who: str, model: str, prompt: str) -> int:
    answer = running.clients[who].completions.create(model=model, prompt=prompt, **GREEDY)
    assert answer.usage and answer.usage.prompt_tokens_details
    return answer.usage.prompt_tokens_details.cached_tokens or 0


def test_no_tenant_gains_from_what_another_has_computed(running: Running) -> None:
    prompt = "A system prompt that is long enough to fill some blocks of the cache. " * 2
    assert cached(running, "acme", "pico", prompt) == 0
    assert cached(running, "acme", "pico", prompt) > 0
    assert cached(running, "beta", "pico", prompt) == 0
    assert cached(running, "beta-reads", "pico", prompt) > 0


def test_a_key_is_made_bounded_and_revoked_while_the_server_runs(running: Running) -> None:
    made = json.loads(
        lorasb("keys", "create", running.file, "--tenant", "gamma", "--role", "infer", "--json")
        .stdout
    )  # fmt: skip
    url = running.clients["acme"].base_url
    with OpenAI(base_url=url, api_key=made["key"], max_retries=0) as client:

        def status() -> int:
            headers = {"Authorization": f"Bearer {made['key']}"}
            return httpx.get(f"{url}models", headers=headers).status_code

        wait_until(lambda: status() == 200)
        lorasb("keys", "quota", running.file, "--tenant", "gamma", "--tokens-per-day", 1)
        client.completions.create(model="pico", prompt="x", **GREEDY)

        def refused() -> bool:
            try:
                client.completions.create(model="pico", prompt="x", **GREEDY)
            except RateLimitError as error:
                return 1 <= int(error.response.headers["retry-after"]) <= 86400
            return False

        wait_until(refused)
        lorasb("keys", "revoke", running.file, made["id"])
        wait_until(lambda: status() == 401)
        with pytest.raises(AuthenticationError) as wrong:
            client.models.list()
        assert wrong.value.code == "invalid_api_key"
    assert running.text("acme", "pico")
    log = running.log.read_text()
    for key in (made["key"], *(c.api_key for c in running.clients.values())):
        assert key.split("-")[2] not in log


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--host", "0.0.0.0"), "found '0.0.0.0', expected a loopback address"),
        (("--api-keys", "missing.json"), "missing.json: not found"),
        (("--api-keys", "bad.json"), "bad.json: found the whole"),
        (("--api-keys", "bad.json", "--allow-open"), "--allow-open: not with --api-keys"),
    ],
)
def test_a_server_that_would_be_open_or_closed_to_all_does_not_start(
    flags: tuple[str, ...], named: str, tmp_path: Path, pico: Path
) -> None:
    (tmp_path / "bad.json").write_text("{")
    command = [*LORASB, "serve", str(pico), "--port", "0", *flags]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert result.returncode == 2 and named in result.stderr
    assert result.stderr.splitlines()[-1].startswith("lorasb: error: ")
