"""Tenants on the application: names are apart, and roles bound what may be done."""

from collections.abc import Callable
from pathlib import Path

import httpx
from fake_engine import FakeEngine, adapter_bytes, folder_loader, served, wait_until
from sites import BASIS, CONFIG, WHO, Site, error_of, opened

from lorasb_runtime.adapters.files import FileInfo
from lorasb_runtime.adapters.loader import AdapterLoader
from lorasb_runtime.adapters.loader_config import LoaderConfig
from lorasb_runtime.adapters.names import AdapterName
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.errors import StoreError
from lorasb_runtime.storage.adapter_file import version_of
from lorasb_server.app import create_app
from lorasb_server.tenants.keys_file import edit_keys


def test_a_tenant_has_the_names_of_its_own_namespace(site: Site, engine: FakeEngine) -> None:
    for value, (who, name) in enumerate(
        (("acme", "a"), ("beta", "a"), ("beta", "b"), ("root", "a"), ("root", "common/c"))
    ):
        assert site.put(who, name, 1.0 + value).json()["name"] == name
    assert site.listed("acme") == site.models("acme")[1:] == ["a", "common/c"]
    assert site.listed("acme-reads") == ["a", "common/c"]
    assert site.models("beta") == ["pico", "a", "b", "common/c"]
    assert site.listed("root") == site.models("root")[1:]
    assert site.listed("root") == ["acme/a", "beta/a", "beta/b", "common/c", "a"]
    texts = {who: site.say(who, "a").json()["choices"][0]["text"] for who in WHO}
    assert texts["acme"] == texts["acme-reads"]
    assert len({texts["acme"], texts["beta"], texts["root"]}) == 3
    assert site.say("root", "beta/a").json()["choices"][0]["text"] == texts["beta"]
    assert site.say("beta", "beta/a").json()["choices"][0]["text"] == texts["beta"]
    for who in WHO:
        assert site.say(who, "common/c").status_code == 200
        assert site.say(who, "pico", adapter="common/c").status_code == 200
    tenants = {(r.tenant, str(r.adapter.name)) for r in engine.requests if r.adapter}
    assert {("acme", "acme/a"), ("acme", "common/c"), ("beta", "common/c")} <= tenants
    assert {tenant for tenant, _ in tenants} == {"acme", "beta", "default"}
    card = site.api["acme"].get("/v1/adapters/common/c").json()
    assert card["name"] == "common/c" and card["versions"] == 1
    assert site.api["acme"].get("/v1/models/a").json()["id"] == "a"


Asking = Callable[[httpx.Client, str], httpx.Response]
GOOD = adapter_bytes(BASIS, 3.0)
READS: dict[str, Asking] = {
    "complete": lambda api, n: api.post("/v1/completions", json={"model": n, "prompt": "x"}),
    "adapter field": lambda api, n: api.post(
        "/v1/completions", json={"model": "pico", "prompt": "x", "adapter": n}
    ),
    "chat": lambda api, n: api.post(
        "/v1/chat/completions", json={"model": n, "messages": [{"role": "user", "content": "x"}]}
    ),
    "tokenize": lambda api, n: api.post("/tokenize", json={"model": n, "prompt": "x"}),
    "detokenize": lambda api, n: api.post("/detokenize", json={"model": n, "tokens": [5]}),
    "model": lambda api, n: api.get(f"/v1/models/{n}"),
    "card": lambda api, n: api.get(f"/v1/adapters/{n}"),
    "versions": lambda api, n: api.get(f"/v1/adapters/{n}/versions"),
}
WRITES: dict[str, Asking] = {
    "delete": lambda api, n: api.delete(f"/v1/adapters/{n}"),
    "roll back": lambda api, n: api.post(f"/v1/adapters/{n}/rollback"),
    "roll back to": lambda api, n: api.post(
        f"/v1/adapters/{n}/rollback", json={"version": version_of(GOOD)}
    ),
}


def put_good(api: httpx.Client, name: str) -> httpx.Response:
    return api.put(f"/v1/adapters/{name}", content=GOOD)


def answer(response: httpx.Response, name: str) -> tuple[int, str, list[tuple[str, str]]]:
    """All that a client sees of an answer, the asked name made neutral."""
    own = ("date", "content-length", "x-request-id")
    headers = [(k, v) for k, v in response.headers.items() if k not in own]
    return response.status_code, response.text.replace(name, "NAME"), headers


def test_anothers_name_answers_as_a_missing_one(site: Site) -> None:
    site.put("beta", "a", 3.0).raise_for_status()
    site.put("beta", "a", 4.0).raise_for_status()
    site.put("root", "a", 3.0).raise_for_status()
    for what, ask in {**READS, **WRITES}.items():
        missing = answer(ask(site.api["acme"], "nobody"), "nobody")
        assert missing[0] == 404, what
        for name in ("beta/a", "beta/nobody", "nowhere/a", "default/a", "acme/nobody"):
            assert answer(ask(site.api["acme"], name), name) == missing, (what, name)
    for name in ("beta/a", "beta/nobody", "nowhere/a", "default/a"):
        refused = put_good(site.api["acme"], name)
        missing = WRITES["delete"](site.api["acme"], "nobody")
        assert answer(refused, name) == answer(missing, "nobody")
    assert site.listed("beta") == ["a"]
    assert site.listed("root") == ["beta/a", "a"]
    assert site.api["beta"].get("/v1/adapters/a").json()["versions"] == 2


class DownStore(AdapterStore):
    """A store that never answers."""

    def current(self, name: AdapterName) -> str:
        raise StoreError("down")

    def listing(self, namespace: str | None = None) -> dict[AdapterName, dict[str, FileInfo]]:
        raise StoreError("down")


def test_anothers_name_is_not_looked_up(tmp_path: Path, engine: FakeEngine) -> None:
    loader = AdapterLoader(DownStore(str(tmp_path / "store")), BASIS, LoaderConfig(refresh=0.0))
    with opened(tmp_path, engine, loader=loader) as site:
        asked = 0
        for what, ask in {**READS, **WRITES, "put": put_good}.items():
            assert ask(site.api["acme"], "beta/a").status_code == 404, what
            if what not in ("delete", "put"):
                assert ask(site.api["acme"], "a").status_code == 503, what
                asked += 1
        assert asked == 10


def test_roles_bound_what_a_key_may_do(site: Site) -> None:
    site.put("acme", "a", 3.0).raise_for_status()
    site.put("root", "common/c", 3.0).raise_for_status()
    for what, ask in READS.items():
        assert ask(site.api["acme-reads"], "a").status_code == 200, what
    for what, ask in {**WRITES, "put": put_good}.items():
        for name in ("a", "new", "beta/a", "common/c"):
            refused = ask(site.api["acme-reads"], name)
            assert refused.status_code == 403, (what, name)
            assert error_of(refused)["type"] == "permission_error"
            assert "found 'infer', expected 'publish'" in refused.text
        for name in ("common/c", "common/new"):
            refused = ask(site.api["acme"], name)
            assert refused.status_code == 403, (what, name)
            assert "'common' is shared" in error_of(refused)["message"]
    for who in ("acme", "acme-reads", "beta"):
        refused = site.api[who].get("/metrics")
        assert refused.status_code == 403 and "lorasb_" not in refused.text
    metrics = site.api["root"].get("/metrics").text
    assert 'lorasb_requests_total{outcome="refused",path="/metrics",status="403"} 3.0' in metrics
    for ask in (put_good, *WRITES.values()):
        assert ask(site.api["root"], "common/c").status_code != 403
    assert site.listed("acme") == ["a"]
    assert site.put("root", "acme/a", 5.0).status_code == 200
    assert site.api["root"].delete("/v1/adapters/acme/a").json()["name"] == "acme/a"
    assert site.listed("acme") == []


def test_the_owner_of_a_shared_namespace_may_change_it(tmp_path: Path, engine: FakeEngine) -> None:
    with opened(tmp_path, engine) as site:
        edit_keys(tmp_path / "keys.json", lambda keys: keys.with_shared("acme"))
        site.put("acme", "a").raise_for_status()
        wait_until(lambda: site.listed("beta") == ["acme/a"])  # seen while the server runs
        assert site.put("beta", "acme/a").status_code == 403
        assert site.put("acme", "a", 2.0).status_code == 200
        assert site.listed("acme") == ["a"]


def test_a_name_of_the_base_model_stays_the_base_models(site: Site) -> None:
    for who, name in (("acme", "pico"), ("root", "org/pico"), ("root", "acme/pico")):
        status = site.put(who, name).status_code
        assert status == (200 if name == "acme/pico" else 409), name
    assert site.models("acme") == ["pico"]


def test_without_keys_everyone_is_admin(tmp_path: Path, engine: FakeEngine) -> None:
    app = create_app(engine, folder_loader(tmp_path / "store", BASIS), CONFIG)
    with served(app) as url, httpx.Client(base_url=url) as api:
        for headers in ({}, {"Authorization": "Bearer none"}):
            assert api.put("/v1/adapters/acme/a", content=GOOD, headers=headers).status_code == 200
            assert api.get("/metrics", headers=headers).status_code == 200
        assert api.put("/v1/adapters/b", content=GOOD).json()["name"] == "b"
        assert [c["name"] for c in api.get("/v1/adapters").json()["data"]] == ["acme/a", "b"]
        api.post("/v1/completions", json={"model": "b", "prompt": "x"}).raise_for_status()
        assert engine.requests[-1].tenant == "default"
