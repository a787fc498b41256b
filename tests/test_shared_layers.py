"""The vLLM engine's parts that need no vLLM: sharding, placement, the batch's rows, flags."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bases import random_adapter

from lorasb_runtime.engines.vllm.core_message import (
    parse_message,
    version_in,
    version_path,
    write_message,
)
from lorasb_runtime.engines.vllm.placement import Group, place_targets
from lorasb_runtime.engines.vllm.plugin import register
from lorasb_runtime.engines.vllm.plugin_settings import PluginSettings
from lorasb_runtime.engines.vllm.resident import ResidentCores, split_rows
from lorasb_runtime.engines.vllm.sharding import (
    Segment,
    column_segments,
    qkv_segments,
    shard_a,
    shard_b,
)
from lorasb_runtime.engines.vllm.shared_delta import SharedDelta
from lorasb_runtime.errors import BasisMismatchError, EngineError, InputError
from lorasb_runtime.ops import group_delta
from lorasb_runtime.ops.core_matmul import scale_core
from lorasb_runtime.ops.group_delta import expands_of
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.types import TargetModule

CPU = torch.device("cpu")
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def target(module: str, rank: int = 4, out: int = 12, into: int = 8) -> TargetModule:
    return TargetModule(module, rank, into, out)


def qkv_basis(rank: int = 4, scaling: float = 0.5) -> Basis:
    """q, k, v of 12, 6 and 6 rows on 8 inputs, and an o of 8 rows on 12."""
    targets = (
        target("l.q_proj", rank),
        target("l.k_proj", rank, 6),
        target("l.v_proj", rank, 6),
        target("l.o_proj", rank, 8, 12),
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for t in targets:
        tensors[f"{t.module}.A"] = torch.randn(t.rank, t.in_features, generator=generator)
        tensors[f"{t.module}.B"] = torch.randn(t.out_features, t.rank, generator=generator)
    return Basis(targets, tensors, "lora-sb", scaling)


@pytest.mark.parametrize(("tp", "kv_heads"), [(1, 3), (2, 2), (4, 4), (4, 2), (6, 3)])
def test_qkv_is_cut_by_heads_and_key_heads_are_replicated(tp: int, kv_heads: int) -> None:
    heads, size = 12, 2
    b = torch.arange((heads + 2 * kv_heads) * size).float().unsqueeze(1)
    q, k, v = b.split([heads * size, kv_heads * size, kv_heads * size])
    for rank in range(tp):
        local = shard_b(b, qkv_segments(heads, kv_heads, size, size, tp, rank))
        first = rank * kv_heads // tp
        kv_rows = slice(first * size, (first + max(1, kv_heads // tp)) * size)
        q_rows = slice(rank * heads * size // tp, (rank + 1) * heads * size // tp)
        assert torch.equal(local, torch.cat([q[q_rows], k[kv_rows], v[kv_rows]]))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_merged_columns_are_cut_each_by_itself(tp: int) -> None:
    b = torch.randn(24, 3)
    locals_ = [shard_b(b, column_segments([16, 8], tp, rank)) for rank in range(tp)]
    gates = torch.cat([local[: 16 // tp] for local in locals_])
    ups = torch.cat([local[16 // tp :] for local in locals_])
    assert torch.equal(torch.cat([gates, ups]), b)


@pytest.mark.parametrize("tp", [2, 4])
def test_row_parallel_parts_add_up_to_the_whole(tp: int) -> None:
    a, b, core, x = (torch.randn(n, m).double() for n, m in ((3, 16), (5, 3), (3, 3), (7, 16)))
    whole = x @ a.t() @ core.t() @ b.t()
    parts = [
        x_part @ shard_a(a, tp, rank).t() @ core.t() @ b.t()
        for rank, x_part in enumerate(x.chunk(tp, dim=1))
    ]
    assert torch.allclose(sum(parts[1:], parts[0]), whole)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("largest", [0, group_delta.LARGEST_BLOCK_B])
def test_a_group_on_each_rank_gives_that_ranks_rows(
    tp: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of B or each member's own, over all ranks, give B R A x of each fused module."""
    monkeypatch.setattr(group_delta, "LARGEST_BLOCK_B", largest)
    basis = qkv_basis()
    adapter = random_adapter(basis, 1)
    x = torch.randn(5, 8)
    found: list[list[torch.Tensor]] = [[], [], []]
    for rank in range(tp):
        segments = (Segment(12, tp, rank), Segment(6, tp, rank), Segment(6, tp, rank))
        parts = [
            shard_b(basis.b(t.module), [s])
            for t, s in zip(basis.targets[:3], segments, strict=True)
        ]
        offsets = [0, segments[0].local, segments[0].local + segments[1].local]
        expands = expands_of(parts, offsets)
        assert len(expands) == (1 if largest else 3)
        a = torch.cat([basis.a(t.module) for t in basis.targets[:3]])
        h = (x @ a.t()).view(5, 3, 4)
        cores = adapter.cores[: 3 * 16].view(3, 4, 4)
        h = torch.einsum("mij,tmj->tmi", cores, h).reshape(5, 12)
        y = torch.zeros(5, sum(s.local for s in segments))
        for e in expands:
            e.add(y, h)
        for i, part in enumerate(y.split([s.local for s in segments], dim=1)):
            found[i].append(part)
    for i, t in enumerate(basis.targets[:3]):
        core = basis.core(adapter.cores, i)
        expected = x @ (basis.b(t.module) @ core @ basis.a(t.module)).t()
        assert torch.allclose(torch.cat(found[i], dim=1), expected, atol=1e-5)


def place(
    targets: list[TargetModule],
    layers: list[str],
    elsewhere: Callable[[str], bool] = lambda name: False,
) -> list[Group]:
    return place_targets(targets, layers, FUSED, elsewhere)


def test_targets_find_their_fused_layer_whatever_the_basis_order() -> None:
    layers = ["m.0.attn.qkv_proj", "m.0.attn.o_proj", "m.0.mlp.gate_up_proj"]
    names = ["attn.v_proj", "attn.q_proj", "mlp.up_proj", "attn.o_proj"]
    groups = place([target(f"m.0.{name}") for name in names], layers)
    assert groups == [
        Group("m.0.attn.qkv_proj", (0, 2), (1, 0), 4),
        Group("m.0.mlp.gate_up_proj", (1,), (2,), 4),
        Group("m.0.attn.o_proj", (0,), (3,), 4),
    ]


def test_members_of_different_rank_are_groups_of_their_own() -> None:
    targets = [target("q_proj"), target("k_proj", 2), target("v_proj", 2)]
    groups = place(targets, ["qkv_proj"])
    assert [(g.members, g.rank) for g in groups] == [((0,), 4), ((1, 2), 2)]


def test_a_target_without_a_layer_is_refused_unless_another_rank_has_it() -> None:
    there = place([target("m.1.o_proj")], ["m.0.o_proj"], lambda name: name.startswith("m.1."))
    assert there == []
    with pytest.raises(BasisMismatchError, match="lm_head: found no linear layer"):
        place([target("lm_head")], ["m.0.o_proj"])


def qkv_delta(basis: Basis, resident: ResidentCores, group: int) -> SharedDelta:
    """All of q, k, v for group 0, o for group 1."""
    targets = basis.targets[:3] if group == 0 else basis.targets[3:]
    parts = [basis.b(t.module) for t in targets]
    offsets = [0, 12, 18][: len(parts)]
    a = torch.cat([basis.a(t.module) for t in targets])
    return SharedDelta(a, parts, offsets, resident, group)


def resident_cores_of(basis: Basis, device: torch.device = CPU) -> ResidentCores:
    groups = [Group("l.qkv_proj", (0, 1, 2), (0, 1, 2), 4), Group("l.o_proj", (0,), (3,), 4)]
    return ResidentCores(
        basis, groups, adapters=4, max_tokens=128, dtype=torch.float32, device=device
    )


def shuffled_rows(seed: int) -> list[int]:
    """Decoding rows, with every other seed long runs, and rows of the base model (0) among them."""
    rng = random.Random(seed)
    rows: list[int] = []
    while len(rows) < 90:
        count = rng.choice([1, 1, 1, 2, 20] if seed % 2 else [1, 2, 3])
        rows += [rng.choice([0, 0, 1, 2, 3])] * count
    return rows


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("group", [0, 1])
def test_each_row_gets_its_own_delta_in_any_order(seed: int, traced: bool, group: int) -> None:
    basis = qkv_basis()
    adapters = [random_adapter(basis, i) for i in range(3)]
    resident = resident_cores_of(basis)
    resident.on_device = traced
    delta = qkv_delta(basis, resident, group)
    scaled = {a.version: scale_core(a.cores, basis.scaling) for a in adapters}
    slots = resident.activate(scaled)
    owners = shuffled_rows(seed) if seed else [1] * 30
    resident.map_tokens(tuple(slots[adapters[o - 1].version] if o else 0 for o in owners))
    x = torch.randn(len(owners), 8 if group == 0 else 12)
    y = torch.randn(len(owners), 24 if group == 0 else 8)
    expected = y.clone()
    for row, owner in enumerate(owners):
        if owner:
            targets = range(3) if group == 0 else range(3, 4)
            expected[row] += torch.cat(
                [
                    basis.b(basis.targets[i].module)
                    @ basis.core(scaled[adapters[owner - 1].version], i)
                    @ basis.a(basis.targets[i].module)
                    @ x[row]
                    for i in targets
                ]
            )
    assert torch.allclose(delta.add_to(y.clone(), x), expected, atol=1e-4)


def test_the_device_path_compiles_whole_and_serves_another_batch_without_a_new_trace() -> None:
    basis = qkv_basis()
    resident = resident_cores_of(basis)
    resident.on_device = True
    delta = qkv_delta(basis, resident, 0)
    traces = 0

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        nonlocal traces
        traces += 1
        return graph.forward

    compiled = torch.compile(delta.add_to, backend=count, fullgraph=True, dynamic=True)
    for seed in (1, 2):
        adapter = random_adapter(basis, seed)
        slot = resident.activate({adapter.version: adapter.cores})[adapter.version]
        x, y = torch.randn(5 + seed, 8), torch.zeros(5 + seed, 24)
        resident.map_tokens((slot,) * x.shape[0])
        found = compiled(y.clone(), x)
        assert torch.allclose(found, delta.add_to(y, x), atol=1e-5)
        assert found.abs().max() > 0.1
    assert traces == 1


def test_slots_are_reused_and_rows_after_the_batch_are_of_the_base_model() -> None:
    basis = qkv_basis()
    resident = resident_cores_of(basis)
    adapters = [random_adapter(basis, i) for i in range(6)]
    first = resident.activate({a.version: a.cores for a in adapters[:4]})
    assert sorted(first.values()) == [1, 2, 3, 4]
    with pytest.raises(EngineError, match="found 5 adapters in one step, expected at most 4"):
        resident.activate({a.version: a.cores for a in adapters[:5]})
    after = resident.activate({a.version: a.cores for a in adapters[3:6]})
    assert after[adapters[3].version] == first[adapters[3].version]
    assert resident.slots.evictions == 2
    resident.on_device = True
    resident.map_tokens((1, 2, 3, 4))
    resident.map_tokens((2,))
    assert resident.token_slots[:5].tolist() == [2, 0, 0, 0, 0]


def test_a_pipeline_rank_has_the_columns_of_its_own_targets() -> None:
    basis = qkv_basis()
    resident = ResidentCores(
        basis,
        [Group("l.o_proj", (0,), (3,), 4), Group("l.qkv_proj", (1,), (1,), 4)],
        adapters=1,
        max_tokens=8,
        dtype=torch.float32,
        device=CPU,
    )
    adapter = random_adapter(basis, 0)
    slot = resident.activate({adapter.version: adapter.cores})[adapter.version]
    assert resident.slots.cores.shape == (2, 32)
    assert torch.equal(resident.cores(0, 1, 4)[slot, 0], basis.core(adapter.cores, 3))
    assert torch.equal(resident.cores(1, 1, 4)[slot, 0], basis.core(adapter.cores, 1))


def test_long_runs_are_told_from_single_rows() -> None:
    single, runs = split_rows([5, 0, *[7] * 16, 5, 5])
    assert single == [(0, 5), (1, 0), (18, 5), (19, 5)]
    assert runs == [(7, 2, 18)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cores_survive_their_message(dtype: torch.dtype) -> None:
    cores = torch.randn(99).to(dtype)
    path = write_message("a1b2", cores)
    version, found = parse_message(path, dtype)
    assert version == version_in(path) == version_in(version_path("a1b2")) == "a1b2"
    assert torch.equal(found, cores)
    for other in ("/some/folder", version_path("a1b2")):
        with pytest.raises(EngineError, match="found the LoRA path"):
            parse_message(other, dtype)


def test_the_plugin_does_nothing_unless_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORASB_BASIS", "LORASB_ADAPTERS", "LORASB_REFRESH"):
        monkeypatch.delenv(name, raising=False)
    register()
    assert PluginSettings.read(os.environ) is None
    with pytest.raises(InputError, match="LORASB_ADAPTERS: found 'x' without LORASB_BASIS"):
        PluginSettings.read({"LORASB_ADAPTERS": "x"})
    with pytest.raises(InputError, match="LORASB_REFRESH: found 'soon', expected seconds"):
        PluginSettings.read({"LORASB_BASIS": "b", "LORASB_REFRESH": "soon"})


def test_settings_pass_through_the_environment(tmp_path: Path) -> None:
    settings = PluginSettings(tmp_path / "b.safetensors", "s3://bucket/adapters", 2.5)
    assert PluginSettings.read(settings.as_environment()) == settings


def test_serve_refuses_flags_that_do_not_go_with_its_engine(
    pico: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    for words, message in (
        (["--vllm-arg", "seed=1"], "--vllm-arg: found 'seed=1' without --engine vllm"),
        (["--engine", "sglang"], "--engine: found 'sglang', input should be 'torch' or 'vllm'"),
        (["--engine", "vllm"], "--engine vllm: vLLM is not installed here"),
    ):
        status, _, said = command("serve", pico, *words)
        assert (status, message in said) == (2, True), said
