"""Basis methods and the truncated SVD under them, against the full SVD."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasb_runtime.basis import find_method
from lorasb_runtime.basis.svd import FULL_SVD_LIMIT, truncated_svd
from lorasb_runtime.errors import InputError


def decaying(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A matrix with singular values 1, 0.9, 0.81, ..."""
    generator = torch.Generator().manual_seed(seed)
    k = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, k, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, k, generator=generator, dtype=torch.float64)).Q
    return ((u * 0.9 ** torch.arange(k)) @ v.t()).float()


@pytest.mark.parametrize("shape", [(300, 500), (700, 280)])
def test_the_randomised_svd_is_the_full_one_on_a_decaying_spectrum(shape: tuple[int, int]) -> None:
    assert min(shape) > FULL_SVD_LIMIT
    matrix = decaying(*shape)
    u, s, vt = truncated_svd(matrix, 16)
    full_u, full_s, full_vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert torch.allclose(s.double(), full_s[:16], rtol=1e-5)
    wanted = (full_u[:, :16] * full_s[:16]) @ full_vt[:16]
    assert (((u * s) @ vt).double() - wanted).norm() / wanted.norm() < 1e-5


def test_the_randomised_svd_captures_a_sign_matrix_as_the_full_one_does() -> None:
    """Sign matrices have a flat spectrum, the worst case; what counts is the energy captured."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(320, 640, generator=generator)
    signal = torch.randn(320, 4, generator=generator) @ torch.randn(4, 640, generator=generator)
    matrix = (noise + 0.3 * signal).sign()
    u, s, vt = truncated_svd(matrix, 16)
    full = torch.linalg.svdvals(matrix)[:16]
    assert s.square().sum() / full.square().sum() > 0.999
    assert (u.t() @ u - torch.eye(16)).abs().max() < 1e-5
    assert (vt @ vt.t() - torch.eye(16)).abs().max() < 1e-5


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6), st.data())
def test_small_matrices_are_exact_and_signs_are_fixed(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    u, s, vt = truncated_svd(matrix, rank)
    assert (u.shape, s.shape, vt.shape) == ((rows, rank), (rank,), (rank, columns))
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    full = torch.linalg.svdvals(matrix)
    error = ((u * s) @ vt - matrix).norm()
    assert error <= full[rank:].norm() + 1e-4


def test_two_runs_agree_bit_for_bit_and_the_global_generator_is_left_alone() -> None:
    matrix = decaying(300, 300, seed=3)
    torch.manual_seed(0)
    first = truncated_svd(matrix, 8)
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    second = truncated_svd(matrix, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_lora_sb_is_the_first_step_of_full_fine_tuning() -> None:
    gradient = torch.randn(20, 30, generator=torch.Generator().manual_seed(5))
    pair = find_method("lora-sb").make_pair(gradient, 6)
    u, s, vt = torch.linalg.svd(-gradient.double().sign(), full_matrices=False)
    wanted = (u[:, :6] * s[:6]) @ vt[:6]
    assert pair.r0 is not None and (pair.r0.diagonal() < 0).all()
    assert torch.allclose((pair.b @ pair.r0 @ pair.a).double(), wanted, atol=1e-4)
    assert torch.allclose(pair.b.t() @ pair.b, torch.eye(6), atol=1e-5)
    assert torch.allclose(pair.a @ pair.a.t(), torch.eye(6), atol=1e-5)


def test_lora_xs_keeps_the_published_convention() -> None:
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(6))
    pair = find_method("lora-xs").make_pair(weight, 6)
    assert pair.r0 is None
    assert torch.allclose(pair.b.t() @ pair.b, torch.eye(6), atol=1e-5)
    assert torch.allclose(pair.a.norm(dim=1), torch.linalg.svdvals(weight)[:6], rtol=1e-4)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(InputError, match="found 'pissa', expected one of lora-sb, lora-xs"):
        find_method("pissa")
