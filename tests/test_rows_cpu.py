"""The kernels between a layer's multiplies against float64, and which layers they take over."""

from pathlib import Path

import pytest
import torch
from closeness import close
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import make_pico
from torch import nn

from lorasb_runtime.engines.torch.prepare import load_model
from lorasb_runtime.models.fused_layers import FusedRMSNorm, fuse_layers, fusible_layers
from lorasb_runtime.models.shared_inputs import Call
from lorasb_runtime.ops.rows_cpu import RowKernels, row_kernels

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


def kernels_for(dtype: torch.dtype) -> RowKernels:
    kernels = row_kernels(dtype, CPU)
    assert kernels is not None
    return kernels


def strided(rows: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, n], a part of wider rows."""
    return torch.randn(rows, n + 5).to(dtype)[:, 2 : 2 + n]


SHAPES = given(rows=st.integers(1, 40), n=st.integers(1, 700), dtype=st.sampled_from(DTYPES))


@settings(max_examples=60, deadline=None)
@SHAPES
def test_rms_norm(rows: int, n: int, dtype: torch.dtype) -> None:
    x, scale = strided(rows, n, dtype), torch.randn(n)
    found = kernels_for(dtype).rms_norm(x, scale, 1e-5)
    wide = x.double()
    expected = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * scale.double()
    assert close(found, expected, dtype)


@settings(max_examples=60, deadline=None)
@SHAPES
def test_silu_mul(rows: int, n: int, dtype: torch.dtype) -> None:
    gate, up = 8 * strided(rows, n, dtype), strided(rows, n, dtype)
    found = kernels_for(dtype).silu_mul(gate, up)
    assert close(found, torch.nn.functional.silu(gate.double()) * up.double(), dtype)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    heads=st.integers(1, 9),
    half=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
)
def test_rotate(rows: int, heads: int, half: int, dtype: torch.dtype) -> None:
    d = 2 * half
    q, k = (strided(rows, n * d, dtype).unflatten(1, (n, d)) for n in (heads, 2))
    cos, sin = torch.randn(2, rows, d).to(dtype)
    expected = []
    for x in (q.double(), k.double()):
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        expected.append(x * cos.double()[:, None] + turned * sin.double()[:, None])
    kernels_for(dtype).rotate(q, k, cos, sin)
    assert close(q, expected[0], dtype) and close(k, expected[1], dtype)


def test_extremes_are_those_of_silu() -> None:
    gate = torch.tensor([[-torch.inf, -200, -88, -0.0, 0.0, 88, 200, torch.inf, torch.nan]])
    found = kernels_for(torch.float32).silu_mul(gate, torch.ones_like(gate))
    expected = torch.nn.functional.silu(gate)
    assert torch.allclose(found, expected, equal_nan=True, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "fused"),
    [
        ("llama", {"RotaryAttention": 2, "GatedMLP": 2, "FusedRMSNorm": 5}),
        ("mistral", {"RotaryAttention": 2, "GatedMLP": 2, "FusedRMSNorm": 5}),
        ("qwen2", {"RotaryAttention": 2, "GatedMLP": 2, "FusedRMSNorm": 5}),
        ("qwen3", {"RotaryAttention": 2, "GatedMLP": 2, "FusedRMSNorm": 9}),
        ("gemma2", {"RotaryAttention": 2, "GatedMLP": 0, "FusedRMSNorm": 9}),  # its gate is a GELU
        ("gemma3", {"RotaryAttention": 2, "GatedMLP": 0, "FusedRMSNorm": 13}),
        ("phi3", {"RotaryAttention": 0, "GatedMLP": 0, "FusedRMSNorm": 5}),  # fused weights
        ("mixtral", {"RotaryAttention": 2, "GatedMLP": 0, "FusedRMSNorm": 5}),
        ("gpt2", {"RotaryAttention": 0, "GatedMLP": 0, "FusedRMSNorm": 0}),
    ],
)
def test_layers_are_replaced_where_they_compute_the_same(
    kind: str, fused: dict[str, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = load_model(make_pico(kind, tmp_path), dtype, CPU)
    found = [type(module).__name__ for module in model.modules()]
    assert {name: found.count(name) for name in fused} == fused


class Norm(nn.Module):
    """As a name and a weight can tell, an RMSNorm."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(24) + 1, False)
        self.eps = 1e-6
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "centred":
            x = x - x.mean(-1, keepdim=True)
        y = x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()
        return y * (self.weight + (self.kind == "shifted"))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain, self.shifted, self.centred = Norm(""), Norm("shifted"), Norm("centred")
        self.unseen = Norm("")


def test_what_only_looks_alike_stays() -> None:
    model = Model()
    names = fusible_layers(model)
    assert names == ["plain", "shifted", "centred", "unseen"]
    calls = {name: Call((torch.randn(1, 5, 24),), {}) for name in names[:3]}
    inputs = torch.randn(3, 24)
    expected = [model.get_submodule(name)(inputs) for name in names]
    fuse_layers(model, names, calls, kernels_for(torch.float32))
    kinds = [type(model.get_submodule(name)) for name in names]
    assert kinds == [FusedRMSNorm, FusedRMSNorm, Norm, Norm]
    for name, wanted in zip(names, expected, strict=True):
        assert torch.allclose(model.get_submodule(name)(inputs), wanted, atol=1e-5)


def test_a_layer_that_is_given_another_dtype_stays() -> None:
    model = Model()
    calls = {"plain": Call((torch.randn(1, 5, 24, dtype=torch.float64),), {})}
    fuse_layers(model, ["plain"], calls, kernels_for(torch.float32))
    assert type(model.plain) is Norm
