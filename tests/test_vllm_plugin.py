"""The names of vLLM that the plugin uses are there; where not, or set up wrong, it says so."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make vllm")
from bases import random_adapter
from vllm_native import loaded

from lorasb_runtime.config import EngineConfig
from lorasb_runtime.engines.vllm import patches
from lorasb_runtime.engines.vllm.plugin import register
from lorasb_runtime.errors import EngineError, InputError
from lorasb_runtime.storage.basis_file import Basis

LOAD = "from vllm.plugins import load_general_plugins as load; load(); print('went on')"


def test_every_name_that_is_used_is_there() -> None:
    patches.check_version()
    patches.check_names((*patches.USED_BY_WORKER, *patches.USED_BY_SERVER))


def test_another_version_and_a_missing_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.33.1")
    with pytest.raises(EngineError, match=r"found version 0\.33\.1, expected 0\.32\.\*"):
        patches.check_version()
    with pytest.raises(EngineError, match=r"found no vllm\.lora\.request:LoRARequest\.gone"):
        patches.check_names(["vllm.lora.request:LoRARequest.gone"])


def test_a_failing_plugin_ends_vllm_instead_of_being_logged(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", LOAD],
        env={"LORASB_BASIS": str(tmp_path / "none"), "PATH": "/usr/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0 and "went on" not in result.stdout
    assert "LORASB_BASIS: found no file" in result.stderr


def test_binding_twice_is_binding_once(
    vllm_basis_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorasb_runtime.engines.vllm.manager import SharedBasisManager

    monkeypatch.setenv("LORASB_BASIS", str(vllm_basis_file))
    register()
    register()
    assert patches.find(f"{patches.WORKER.module}:{patches.WORKER.name}") is SharedBasisManager


def test_our_engine_does_not_start_where_the_plugin_is_left_out(
    vllm_model: Path, vllm_basis_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorasb_runtime.engines.vllm.build import load_engine

    monkeypatch.setenv("VLLM_PLUGINS", "others")
    with pytest.raises(EngineError, match="expected 'lorasb' among them"):
        load_engine(vllm_model, vllm_basis_file, EngineConfig())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("max-loras=3", "found 'max-loras', which lorasb sets itself"),
        ("kv_cache_memory_bytes=3", "which lorasb sets itself"),
        ("structured-outputs-config.backend=xgrammar", "which lorasb sets itself"),
        ("tensor-parallel-size=two", "invalid int value: 'two'"),
        ("nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_vllm_arguments_are_vllms_own_or_refused(
    vllm_model: Path, argument: str, message: str
) -> None:
    from lorasb_runtime.engines.vllm.build import engine_args

    with pytest.raises(InputError, match=message):
        engine_args(vllm_model, True, EngineConfig(), [argument])


def test_vllm_arguments_reach_vllm(vllm_model: Path) -> None:
    from lorasb_runtime.engines.vllm.build import engine_args

    words = ["tensor-parallel-size=2", "distributed_executor_backend=ray", "enforce-eager"]
    args = engine_args(vllm_model, True, EngineConfig(slots=500), [*words, "quantization=fp8"])
    assert (args.tensor_parallel_size, args.distributed_executor_backend) == (2, "ray")
    assert (args.enforce_eager, args.quantization, args.max_loras) == (True, "fp8", 499)


@pytest.fixture
def held_of(vllm_basis: Basis) -> Callable[..., Any]:
    from lorasb_runtime.engines.vllm.held_versions import HeldVersions

    def make(in_use: set[int], clock: Callable[[], float]) -> Any:
        import torch

        held = HeldVersions(vllm_basis, torch.float32, 1, lambda: in_use, clock)
        held.capacity = 2
        return held

    return make


def test_versions_leave_the_workers_when_old_and_in_no_request(
    vllm_basis: Basis, held_of: Callable[..., Any]
) -> None:
    now = 0.0
    in_use: set[int] = set()
    held = held_of(in_use, lambda: now)
    numbers = []
    for seed in range(4):
        adapter = loaded(random_adapter(vllm_basis, seed))
        assert held.request(adapter) is None
        message = held.message(adapter)
        held.added(adapter, message.lora_int_id)
        assert held.request(adapter).lora_int_id == message.lora_int_id
        numbers.append(message.lora_int_id)
    assert held.take_surplus() == []  # too young: vLLM may not know their requests yet
    now = 61.0
    in_use.add(numbers[0])
    held.request(loaded(random_adapter(vllm_basis, 1)))
    assert held.take_surplus() == [numbers[2], numbers[3]]
    assert held.take_surplus() == [] and len(held) == 2


def test_two_versions_of_a_name_are_two_adapters_to_vllm(
    vllm_basis: Basis, held_of: Callable[..., Any]
) -> None:
    held = held_of(set(), lambda: 0.0)
    old = loaded(random_adapter(vllm_basis, 1))
    new = replace(loaded(random_adapter(vllm_basis, 2)), name=old.name)
    first, second = (held.message(adapter) for adapter in (old, new))
    assert first != second and first.lora_int_id != second.lora_int_id
