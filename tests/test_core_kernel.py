"""The Triton kernel for cores: in the interpreter, through the compiler, and without Triton."""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorasb_runtime.ops.core_kernel import kernel_works, use_kernel

CASES = Path(__file__).with_name("kernel_cases.py")

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed (torch's CPU build comes without it)",
)


def run_cases(what: str, folder: Path, **settings: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(folder), **settings}
    command = [sys.executable, str(CASES), what]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


@needs_triton
def test_the_kernel_agrees_with_einsum_in_the_interpreter(tmp_path: Path) -> None:
    run_cases("interpret", tmp_path, TRITON_INTERPRET="1")


@needs_triton
def test_the_kernel_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    run_cases("compile", tmp_path)


def test_without_triton_a_warning_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "lorasb_runtime.ops.core_triton", raising=False)
    kernel_works.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert not kernel_works(1, 4, torch.float32, torch.float32, torch.device("cpu"))
    kernel_works.cache_clear()
    assert len(caplog.records) == 1 and "triton" in caplog.text


def test_a_cpu_never_asks_for_it() -> None:
    assert not use_kernel(torch.ones(1, 1, 4), torch.ones(2, 1, 4, 4))


def test_importing_the_ops_leaves_triton_alone() -> None:
    code = (
        "import sys, lorasb_runtime.ops.core_matmul\n"
        "assert 'lorasb_runtime.ops.core_triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
