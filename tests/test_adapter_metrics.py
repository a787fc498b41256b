"""What /metrics tells about adapters, on a real server process."""

from pathlib import Path

import httpx
from bases import random_adapter, random_basis
from fake_engine import FakeEngine
from serving import serving

from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.models.load import load_tokenizer
from lorasb_runtime.models.text import TextCodec
from lorasb_runtime.storage.adapter_file import serialize_adapter
from lorasb_runtime.storage.basis_file import save_basis
from lorasb_server.metrics import MAX_ADAPTER_LABELS, Metrics


def value(metrics: str, line: str) -> float:
    return float(metrics.partition(f"\n{line} ")[2].partition("\n")[0])


def test_what_a_swap_and_some_requests_leave_in_the_metrics(pico: Path, tmp_path: Path) -> None:
    basis = random_basis(pico)
    save_basis(basis, tmp_path / "basis.safetensors")
    store = AdapterStore(str(tmp_path / "store"))
    first, second = (serialize_adapter(random_adapter(basis, seed)) for seed in range(2))
    store.publish(parse_name("a"), first)
    flags = ("--basis", tmp_path / "basis.safetensors", "--adapters", store.url, "--refresh", 60)
    body = {"model": "a", "prompt": "hello", "max_tokens": 2}
    with serving(tmp_path / "log", pico, *flags) as url:

        def ask() -> None:
            httpx.post(f"{url}/v1/completions", json=body, timeout=30).raise_for_status()

        ask()
        ask()
        httpx.put(f"{url}/v1/adapters/a", content=second, timeout=30).raise_for_status()
        ask()
        metrics = httpx.get(f"{url}/metrics").text
    assert value(metrics, 'lorasb_adapter_requests_total{adapter="a"}') == 3
    assert value(metrics, "lorasb_slots_used") == 2
    assert value(metrics, "lorasb_slot_fills_total") == 2
    assert value(metrics, "lorasb_slot_hits_total") == 1
    assert value(metrics, "lorasb_slot_evictions_total") == 0
    assert value(metrics, "lorasb_loader_swaps_total") == 1
    assert value(metrics, "lorasb_loader_fetches_total") == 1
    assert value(metrics, "lorasb_loader_bytes_fetched_total") == len(first)
    assert value(metrics, 'lorasb_loader_fetch_seconds_bucket{le="+Inf"}') == 1


def test_adapters_over_the_bound_share_one_label(pico: Path) -> None:
    metrics = Metrics(FakeEngine(TextCodec(load_tokenizer(pico))), None)
    for index in range(MAX_ADAPTER_LABELS + 5):
        metrics.count_adapter(f"u{index}")
    metrics.count_adapter("u3")
    text = metrics.render().decode()
    assert text.count("lorasb_adapter_requests_total{") == MAX_ADAPTER_LABELS + 1
    assert value(text, 'lorasb_adapter_requests_total{adapter="other"}') == 5
    assert value(text, 'lorasb_adapter_requests_total{adapter="u3"}') == 2
