"""A large random checkpoint with a basis and an adapter for it, made without a model in memory."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from lorasb_runtime.storage.adapter_file import Adapter, save_adapter
from lorasb_runtime.storage.basis_file import Basis, load_basis, save_basis
from lorasb_runtime.storage.checkpoint import INDEX
from lorasb_runtime.types import TargetModule

SHARD_BYTES = 2 << 30
NOISE = 1 << 26  # numbers that every tensor is cut out of, somewhere else each


@dataclass(frozen=True)
class Shape:
    """Llama's; by default Llama-3.2-3B's, heads 128 wide, with tied embeddings."""

    hidden: int = 3072
    inner: int = 8192
    vocab: int = 128256
    kv: float = 1 / 3  # of the heads

    def linear(self, layer: int) -> dict[str, tuple[int, int]]:
        """The linear layers' [out, in] by module name."""
        wide, narrow = self.hidden, int(self.hidden * self.kv) // 16 * 16
        sizes = {
            "self_attn.q_proj": (wide, wide),
            "self_attn.k_proj": (narrow, wide),
            "self_attn.v_proj": (narrow, wide),
            "self_attn.o_proj": (wide, wide),
            "mlp.gate_proj": (self.inner, wide),
            "mlp.up_proj": (self.inner, wide),
            "mlp.down_proj": (wide, self.inner),
        }
        return {f"model.layers.{layer}.{name}": size for name, size in sizes.items()}


@dataclass(frozen=True)
class Files:
    model: Path
    basis: Path
    adapter: Path


def make_checkpoint(folder: Path, shape: Shape, layers: int, rank: int) -> Files:
    """The model in `folder`, basis and adapter beside it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_config(shape, layers)))
    shard: dict[str, torch.Tensor] = {}
    homes: dict[str, str] = {}
    size = count = 0
    for name, tensor in _tensors(shape, layers):
        shard[name] = tensor
        size += tensor.nbytes
        if size > SHARD_BYTES or name == "model.norm.weight":
            count += 1
            file = f"model-{count:05}.safetensors"
            homes |= dict.fromkeys(shard, file)
            safetensors.torch.save_file(shard, folder / file, {"format": "pt"})
            shard, size = {}, 0
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    files = Files(folder, folder.with_suffix(".basis"), folder.with_suffix(".adapter"))
    _save_adapter(files, shape, layers, rank)
    return files


def make_lora(files: Files, folder: Path) -> Path:
    """The same adapter as an ordinary LoRA in PEFT's form, the core folded into B."""
    basis = load_basis(files.basis)
    cores = safetensors.torch.load_file(files.adapter)["cores"]
    tensors = {}
    for i, target in enumerate(basis.targets):
        prefix = f"base_model.model.{target.module}"
        folded = basis.b(target.module) @ basis.core(cores, i)
        tensors[f"{prefix}.lora_A.weight"] = basis.a(target.module).clone()
        tensors[f"{prefix}.lora_B.weight"] = folded
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    rank = basis.targets[0].rank
    names = sorted({target.module.rpartition(".")[2] for target in basis.targets})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": names}))
    return folder


def _tensors(shape: Shape, layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    largest = max(shape.vocab, shape.inner) * shape.hidden
    noise = (torch.randn(min(NOISE, largest), generator=generator) * 0.02).bfloat16()
    noise = noise.repeat(-(-largest // noise.numel()) + 1)

    def random(*size: int) -> torch.Tensor:
        count = torch.Size(size).numel()
        start = int(torch.randint(noise.numel() - count, (), generator=generator))
        return noise[start : start + count].view(size).clone()

    yield "model.embed_tokens.weight", random(shape.vocab, shape.hidden)
    for layer in range(layers):
        for name, size in shape.linear(layer).items():
            yield f"{name}.weight", random(*size)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", torch.ones(shape.hidden).bfloat16()
    yield "model.norm.weight", torch.ones(shape.hidden).bfloat16()


def _config(shape: Shape, layers: int) -> dict[str, object]:
    head = 128 if shape.hidden >= 1024 else 16
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.hidden // head,
        "num_key_value_heads": shape.linear(0)["model.layers.0.self_attn.k_proj"][0] // head,
        "head_dim": head,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": True,
    }


def _save_adapter(files: Files, shape: Shape, layers: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(1)
    targets, tensors = [], {}
    for layer in range(layers):
        for name, (rows, columns) in shape.linear(layer).items():
            targets.append(TargetModule(name, rank, columns, rows))
            tensors[f"{name}.A"] = torch.randn(rank, columns, generator=generator) / columns**0.5
            tensors[f"{name}.B"] = torch.randn(rows, rank, generator=generator) / rows**0.5
    basis = Basis(tuple(targets), tensors, "imported")
    save_basis(basis, files.basis)
    cores = 0.5 * torch.randn(basis.size, generator=generator)
    save_adapter(Adapter(cores, basis.digest, "random"), files.adapter)
