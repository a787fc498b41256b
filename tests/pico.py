"""Random models of many architectures, small enough for every test: 2 layers, hidden 32."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WINDOW = 16  # of every layer that slides; prompts longer than this show it
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
WIDE: dict[str, Any] = {**GROUPED, "head_dim": 16}  # heads wider than hidden size / heads
QWEN2: dict[str, Any] = {**GROUPED, "use_sliding_window": True, "sliding_window": WINDOW}
GEMMA: dict[str, Any] = {
    **WIDE,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 4,
    "final_logit_softcapping": 5.0,
}
LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": 128,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

# kind: (transformers' model type, what its configuration has besides the common settings)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "mistral": ("mistral", {**GROUPED, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", {**QWEN2, "max_window_layers": 1}),
    "qwen3": ("qwen3", WIDE),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", GEMMA),
    "phi3": ("phi3", {**GROUPED, **LONGROPE, "sliding_window": WINDOW}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 24}),
    "mixtral": ("mixtral", {**GROUPED, "num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {**WIDE, **MOE, "num_experts": 4, "decoder_sparse_step": 1}),
    # Refused by the torch engine.
    "bloom": ("bloom", {}),
    "doge": ("doge", GROUPED),
    "mamba": ("mamba", {}),
    "gpt_oss": ("gpt_oss", {**WIDE, "num_local_experts": 4, "sliding_window": WINDOW}),
    "llama4": ("llama4_text", {**GROUPED, "head_dim": 8, "attention_chunk_size": 64}),
    "phimoe": ("phimoe", {**GROUPED, "num_local_experts": 4, "sliding_window": 64}),
}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pico_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and three special ones; <|im_end|> ends a sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[2],
        chat_template=CHAT_TEMPLATE,
    )


def make_pico(kind: str, folder: Path, seed: int = 0, **config_overrides: Any) -> Path:
    """Save a random model of one of KINDS with its tokenizer into `folder`."""
    tokenizer = pico_tokenizer()
    model_type, own = deepcopy(KINDS[kind])
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **own,
        **config_overrides,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    _move_off_defaults(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_pico_llama(folder: Path, seed: int = 0, **config_overrides: Any) -> Path:
    """Save a random Llama with its tokenizer into `folder`."""
    return make_pico("llama", folder, seed, **config_overrides)


def make_pico_gpt2(folder: Path, seed: int = 0) -> Path:
    """Save a random GPT-2, whose projections are Conv1D layers, into `folder`."""
    return make_pico("gpt2", folder, seed)


def _move_off_defaults(model: PreTrainedModel) -> None:
    """Random values for what models start at zero or one (biases, norms), so that they count."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
