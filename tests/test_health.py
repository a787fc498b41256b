"""/health and /ready tell the truth about the engine, and /metrics what it did."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import served, wait_until

from lorasb_runtime.config import CacheConfig, EngineConfig, SchedulerConfig
from lorasb_runtime.engines.torch.build import load_engine
from lorasb_runtime.engines.torch.engine import TorchEngine
from lorasb_server.app import create_app
from lorasb_server.settings import ServerConfig

DOC = Path(__file__).parent.parent / "docs" / "operations.md"
BODY: dict[str, Any] = {"model": "pico", "prompt": "x" * 40, "max_tokens": 8, "ignore_eos": True}


@pytest.fixture
def engine(pico: Path) -> TorchEngine:
    """With room for two sequences of three blocks' length, so that a third waits."""
    cache = CacheConfig(1 << 20, smallest_region=16, prefix_nbytes=1 << 16, prefix_block=4)
    config = EngineConfig(dtype="float32", cache=cache, scheduler=SchedulerConfig(max_num_seqs=2))
    return load_engine(pico, None, config)


@pytest.fixture
def url(engine: TorchEngine) -> Iterator[str]:
    with served(create_app(engine, None, ServerConfig("pico"))) as url:
        yield url


def status(url: str, path: str) -> tuple[int, str]:
    response = httpx.get(f"{url}{path}")
    return response.status_code, response.json()["status"]


def metrics(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    parts = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    return {name: float(value) for name, _, value in parts}


def test_an_engine_that_has_died_is_not_alive(
    url: str, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 200
    assert status(url, "/health") == (200, "alive")
    assert status(url, "/ready") == (200, "ready")

    def broken(error: Exception) -> None:
        raise RuntimeError("beyond repair")

    monkeypatch.setattr(engine._runner, "run", broken)
    monkeypatch.setattr(engine, "_fail_running", broken)
    failed = httpx.post(f"{url}/v1/completions", json=BODY)
    assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
    wait_until(lambda: status(url, "/health") == (503, "failed"))
    assert status(url, "/ready") == (503, "failed")
    assert "the engine died" in caplog.text and "beyond repair" in caplog.text
    later = httpx.post(f"{url}/v1/completions", json=BODY)
    assert later.status_code == 500 and "not running" in later.json()["error"]["message"]


def test_a_request_that_cannot_be_admitted_ends_alone(
    url: str, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler, "add", None)
        assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 500
    assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 200
    assert status(url, "/health") == (200, "alive")


def test_metrics_tell_times_and_sizes(url: str) -> None:
    httpx.post(f"{url}/v1/completions", json={**BODY, "n": 3}).raise_for_status()
    first = metrics(url)
    httpx.post(f"{url}/v1/completions", json=BODY).raise_for_status()
    requests = 'lorasb_requests_total{outcome="ok",path="/v1/completions",status="200"}'
    wait_until(lambda: metrics(url).get(requests) == 2)  # counted once the answer has gone
    found = metrics(url)
    assert found['lorasb_sequences_finished_total{finished_reason="length"}'] == 4
    assert found["lorasb_prompt_tokens_total"] == 80
    assert found["lorasb_generation_tokens_total"] == 32
    assert found["lorasb_prefix_cache_queries_total"] == 80
    assert found["lorasb_prefix_cache_hits_total"] - first["lorasb_prefix_cache_hits_total"] == 36
    assert found["lorasb_time_to_first_token_seconds_count"] == 2
    assert found["lorasb_e2e_request_latency_seconds_count"] == 2
    assert found["lorasb_request_queue_time_seconds_count"] == 4
    assert found["lorasb_inter_token_latency_seconds_count"] == 28
    assert found["lorasb_request_time_per_output_token_seconds_count"] == 4
    inter = found["lorasb_inter_token_latency_seconds_sum"]
    mean = found["lorasb_request_time_per_output_token_seconds_sum"]
    assert mean == pytest.approx(inter / 7)
    ttft = found["lorasb_time_to_first_token_seconds_sum"]
    assert 0 < ttft < found["lorasb_e2e_request_latency_seconds_sum"]
    # Two of the three ran at once, and the third for itself.
    assert found['lorasb_batch_size_bucket{le="1"}'] > 0
    assert found['lorasb_batch_size_bucket{le="2"}'] == found["lorasb_batch_size_count"]
    assert found["lorasb_batch_size_count"] == found["lorasb_steps"]
    assert found["lorasb_batch_size_sum"] >= 32
    assert found["lorasb_kv_cache_usage_perc"] == 0
    assert found["lorasb_num_preemptions_total"] == 0
    assert found["process_resident_memory_bytes"] > 0


def test_kv_use_and_preemptions_are_told(pico_long: Path) -> None:
    """A cache that two long sequences do not fit into: one goes back to the queue."""
    cache = CacheConfig(80 << 10, smallest_region=16, prefix_nbytes=0)
    config = EngineConfig(
        dtype="float32", max_model_len=300, cache=cache, scheduler=SchedulerConfig(max_num_seqs=2)
    )
    engine = load_engine(pico_long, None, config)
    body = {**BODY, "n": 2, "max_tokens": 220, "stream": True}
    with served(create_app(engine, None, ServerConfig("pico"))) as url:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            assert 0 < metrics(url)["lorasb_kv_cache_usage_perc"] <= 1
            assert list(lines)[-2] == "data: [DONE]"
        assert metrics(url)["lorasb_num_preemptions_total"] > 0


def test_the_doc_names_every_metric(url: str) -> None:
    text = httpx.get(f"{url}/metrics").text
    served_names = set(re.findall(r"^# TYPE (lorasb_\w+?)(?:_total)? ", text, re.MULTILINE))
    told = set(re.findall(r"`(lorasb_\w+)`", DOC.read_text()))
    created = {name for name in served_names if name.endswith("_created")}
    assert served_names - created <= told
    assert {name for name in told if not name.startswith("lorasb_loader_")} <= served_names
