"""Architectures: each one's own logits in a mixed batch, and what is not supported is refused."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bases import random_adapter, random_basis, reference_logits
from driving import CPU, drive
from pico import KINDS, WINDOW, make_pico
from torch import nn

from lorasb_runtime.config import EngineConfig
from lorasb_runtime.engines.torch.build import load_engine
from lorasb_runtime.engines.torch.prepare import load_model, shared_inputs
from lorasb_runtime.errors import BasisMismatchError, InputError
from lorasb_runtime.models.adapted_linear import check_targets
from lorasb_runtime.models.load import load_causal_lm
from lorasb_runtime.models.targets import find_targets

REFUSED = {
    "bloom": "BloomForCausalLM.*layer 0: found an attention of its own",
    "doge": "DogeForCausalLM.*attention needs a mask of its own",
    "mamba": "MambaForCausalLM.*layer 0: found linear_attention",
    "gpt_oss": "GptOssForCausalLM.*attention needs s_aux",
    "llama4": "Llama4ForCausalLM.*layer 0: found chunked_attention",
    "phimoe": "PhimoeForCausalLM.*found attention to all positions, expected a window of 64",
}
SUPPORTED = [kind for kind in KINDS if kind not in REFUSED]


@pytest.mark.parametrize("kind", SUPPORTED)
def test_a_mixed_batch_has_the_logits_of_the_architecture(kind: str, tmp_path: Path) -> None:
    """Prompts past the window in chunks, 20 decode steps, against Hugging Face's eager forward."""
    folder = make_pico(kind, tmp_path / kind)
    basis = random_basis(folder, rank=4, scaling=0.5)
    first, second = random_adapter(basis, 0), random_adapter(basis, 1)
    owners = [None, first, second, first]
    rng = random.Random(7)
    prompts = [[rng.randrange(3, 250) for _ in range(n)] for n in (3 * WINDOW, 50, 37, 5)]
    driven = drive(folder, basis, prompts, owners, steps=21)
    for sequence, owner in zip(driven, owners, strict=True):
        exact = reference_logits(folder, basis, owner, sequence.tokens)
        assert sequence.error(exact) < 2e-5
        plain = reference_logits(folder, basis, owner, sequence.tokens, torch.float32)
        assert sequence.error(plain.double()) < 2e-5
        if owner is not None:
            base = reference_logits(folder, basis, None, sequence.tokens)
            assert sequence.error(base) > 0.1


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": False}),
        ("gemma2", {"sliding_window": 200}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 16}),
        ("gemma3", {"sliding_window": 200}),
        ("phi3", {"sliding_window": None}),
    ],
)
def test_what_sets_an_architecture_apart_shows_in_its_logits(
    kind: str, change: dict[str, object], tmp_path: Path
) -> None:
    """The pico models have windows and caps that count, or the test above would prove nothing."""
    folder, other = make_pico(kind, tmp_path / "a"), make_pico(kind, tmp_path / "b", **change)
    tokens = random.Random(7).choices(range(3, 250), k=50)
    found, expected = (
        load_causal_lm(f, torch.float32, attention="eager")(torch.tensor([tokens])).logits
        for f in (folder, other)
    )
    assert (found - expected).abs().max() / expected.abs().max() > 0.01


@pytest.mark.parametrize("kind", REFUSED)
def test_an_architecture_that_is_not_supported_is_refused_by_name(
    kind: str, tmp_path: Path
) -> None:
    folder = make_pico(kind, tmp_path / kind)
    with pytest.raises(InputError, match=REFUSED[kind]):
        load_model(folder, torch.float32, CPU)


def test_a_window_beyond_the_context_is_none(tmp_path: Path) -> None:
    load_model(make_pico("phimoe", tmp_path, sliding_window=256), torch.float32, CPU)


def test_training_sees_capped_scores(tmp_path: Path) -> None:
    """Derivation and training load the model plainly: it must be the one that is served."""
    folder = make_pico("gemma2", tmp_path)
    tokens = torch.tensor([list(range(40, 80))])
    found = load_causal_lm(folder, torch.float32)(tokens).logits
    expected = load_causal_lm(folder, torch.float32, attention="eager")(tokens).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_are_no_targets(kind: str, tmp_path: Path) -> None:
    """transformers holds all experts of a layer in one 3-D weight."""
    folder = make_pico(kind, tmp_path)
    basis = random_basis(folder, rank=4)
    assert {t.module.split(".")[-2] for t in basis.targets} == {"self_attn"}
    model = load_causal_lm(folder, torch.float32)
    with pytest.raises(InputError, match="'experts' matches none of the model's linear layers"):
        find_targets(model, 4, "experts")
    for module, found in (
        ("model.layers.0.mlp.experts.0.w1", "no such module"),
        ("model.layers.0.mlp.experts", f"{type(model).__name__[:5]}.*Experts"),
    ):
        first = replace(basis.targets[0], module=module)
        aimed = replace(basis, targets=(first, *basis.targets[1:]))
        with pytest.raises(BasisMismatchError, match=f"{module}: found {found}, expected a linear"):
            check_targets(model, aimed)


class Routed(nn.Module):
    """A layer that only every second token passes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[..., ::2, :] = self.layer(x[..., ::2, :])
        return y


def test_a_target_that_some_tokens_pass_by_is_refused(pico: Path) -> None:
    model = load_model(pico, torch.float32, CPU)
    projection = model.get_submodule("model.layers.1.self_attn.o_proj")
    model.set_submodule("model.layers.1.self_attn.o_proj", Routed(projection))
    basis = random_basis(pico, rank=4, pattern="layers.1.self_attn.o_proj")
    target = replace(basis.targets[0], module="model.layers.1.self_attn.o_proj.layer")
    with pytest.raises(BasisMismatchError, match=r"o_proj\.layer: found a layer that not all"):
        shared_inputs(model, replace(basis, targets=(target,)))


def test_an_output_embedding_of_its_own_may_be_a_target(pico: Path) -> None:
    basis = random_basis(pico, rank=4, pattern="lm_head|q_proj")
    assert basis.targets[-1].module == "lm_head"
    owners = [random_adapter(basis, 0), None, random_adapter(basis, 1)]
    prompts = [list(range(40, 40 + n)) for n in (50, 7, 30)]
    driven = drive(pico, basis, prompts, owners, steps=4)
    for sequence, owner in zip(driven, owners, strict=True):
        assert sequence.error(reference_logits(pico, basis, owner, sequence.tokens)) < 2e-5


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "opt"])
def test_a_tied_output_embedding_is_no_target(kind: str, tmp_path: Path) -> None:
    model = load_causal_lm(make_pico(kind, tmp_path), torch.float32)
    assert all(t.module != "lm_head" for t in find_targets(model, 4))
    with pytest.raises(InputError, match="matches lm_head, whose weight is the input embedding's"):
        find_targets(model, 4, "attn|lm_head")


def test_the_context_ends_where_longrope_turns_cached_keys_otherwise(tmp_path: Path) -> None:
    folder = make_pico("phi3", tmp_path)
    engine = load_engine(folder, None, EngineConfig(dtype="float32"))
    assert engine.info.max_model_len == 128
    with pytest.raises(InputError, match="found 200, expected at most the model's 128"):
        load_engine(folder, None, EngineConfig(dtype="float32", max_model_len=200))
