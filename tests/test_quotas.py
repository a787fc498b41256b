"""Quotas on the application: 429 with Retry-After, and all that was held is given back."""

import json
import threading
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine, wait_until
from sites import error_of, opened

from lorasb_server.tenants.keys_file import edit_keys
from lorasb_server.tenants.quota import Quota


def quota_error(response: httpx.Response) -> int:
    """Retry-After of a refusal for a quota."""
    assert response.status_code == 429, response.text
    assert error_of(response)["type"] == "rate_limit_error"
    return int(response.headers["retry-after"])


def test_requests_a_minute_are_all_of_the_tenants_requests(
    tmp_path: Path, engine: FakeEngine
) -> None:
    with opened(tmp_path, engine, Quota(requests_per_minute=3)) as site:
        assert site.say("acme", "pico").status_code == 200
        assert site.say("acme-reads", "nobody").status_code == 404
        assert site.models("acme") == ["pico"]
        for who in ("acme", "acme-reads"):
            refused = site.say(who, "pico")
            assert 50 <= quota_error(refused) <= 60
            assert error_of(refused)["code"] == "rate_limit_exceeded"
            assert "found 3, at most 3" in error_of(refused)["message"]
        assert site.say("beta", "pico").status_code == 200
        assert httpx.get(f"{site.url}/ready").status_code == 200
        edit_keys(tmp_path / "keys.json", lambda keys: keys.with_quota("acme", Quota()))
        wait_until(lambda: site.say("acme", "pico").status_code == 200)
    assert engine.open == 0


def test_tokens_a_day_are_those_of_the_usage(tmp_path: Path, engine: FakeEngine) -> None:
    with opened(tmp_path, engine, Quota(tokens_per_day=60)) as site:
        used = 0
        for stream in (False, True):
            more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
            answer = site.say("acme", "pico", n=2, max_tokens=7, ignore_eos=True, **more)
            text = answer.text.split("data: ")[-2] if stream else answer.text
            used += json.loads(text)["usage"]["total_tokens"]
        assert used == 2 * (14 + 1)
        assert site.say("acme", "pico", n=129).status_code == 400  # counts nothing
        rest = 60 - used - 1
        answer = site.say("acme", "pico", max_tokens=rest, ignore_eos=True)
        assert answer.json()["usage"]["total_tokens"] == rest + 1
        begun = len(engine.requests)
        for stream in (False, True):
            refused = site.say("acme", "pico", stream=stream)
            assert 1 <= quota_error(refused) <= 86400
            assert error_of(refused)["code"] == "insufficient_quota"
            assert "found 60 used, at most 60" in error_of(refused)["message"]
        assert len(engine.requests) == begun
        assert site.models("acme") == ["pico"]
        assert site.say("beta", "pico").status_code == 200


def test_new_adapters_are_bounded(tmp_path: Path, engine: FakeEngine) -> None:
    with opened(tmp_path, engine, Quota(adapters=2)) as site:
        assert [site.put("acme", name).status_code for name in ("a", "b")] == [200, 200]
        refused = site.put("acme", "c")
        assert quota_error(refused) == 60
        assert "found 2, at most 2; delete one" in error_of(refused)["message"]
        assert site.put("acme", "a", 2.0).status_code == 200
        assert site.put("beta", "c").status_code == site.put("root", "acme/c").status_code == 200
        for name in ("b", "c"):
            site.api["acme"].delete(f"/v1/adapters/{name}").raise_for_status()
        statuses: list[int] = []
        names = [f"n{i}" for i in range(6)]
        threads = [
            threading.Thread(target=lambda n=n: statuses.append(site.put("acme", n).status_code))
            for n in names
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(statuses) == [200, 429, 429, 429, 429, 429]
        assert len(site.listed("acme")) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_gone_client_ran_is_given_back(
    tmp_path: Path, engine: FakeEngine, stream: bool
) -> None:
    engine.pace = 0.02
    with opened(tmp_path, engine, Quota(concurrent_requests=1)) as site:
        body = {"model": "pico", "prompt": "x", "max_tokens": 200, "stream": stream}
        body["ignore_eos"] = True
        key = site.api["acme"].headers["authorization"]
        with httpx.Client(base_url=site.url, headers={"Authorization": key}) as going:
            if stream:
                with going.stream("POST", "/v1/completions", json=body) as answer:
                    lines = answer.iter_lines()  # dropping it would end the stream
                    next(lines)
                    refused = site.say("acme", "pico")
            else:
                with pytest.raises(httpx.ReadTimeout):
                    going.post("/v1/completions", json=body, timeout=0.5)
                refused = None
        if refused is not None:
            assert quota_error(refused) == 1
            assert "found 1 running, at most 1" in error_of(refused)["message"]
        wait_until(lambda: engine.open == 0)
        wait_until(lambda: site.say("acme", "pico", max_tokens=1).status_code == 200)
        assert engine.aborted == 1
