"""The LLM class on two CPU processes: A and B in two parts, a store, the same tokens."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make vllm")
from bases import reference_logits
from vllm_asking import random_prompt

from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.errors import NotFoundError
from lorasb_runtime.storage.adapter_file import Adapter, serialize_adapter
from lorasb_runtime.storage.basis_file import Basis


@pytest.fixture(scope="module")
def llm(
    vllm_model: Path, vllm_basis_file: Path, vllm_adapters: list[Adapter], tmp_path_factory: Any
) -> Iterator[Any]:
    from vllm import LLM

    from lorasb_runtime.engines.vllm.plugin import register

    store = AdapterStore(str(tmp_path_factory.mktemp("store")))
    for adapter in vllm_adapters[:4]:
        store.publish(parse_name(adapter.name), serialize_adapter(adapter))
    environment = {
        "LORASB_BASIS": str(vllm_basis_file),
        "LORASB_ADAPTERS": store.url,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # by default each rank wants a NUMA node of its own
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        register()
        yield from started(LLM, vllm_model)


def started(make: Any, model: Path) -> Iterator[Any]:
    llm = make(
        str(model),
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        max_loras=3,
        max_num_seqs=8,
        max_model_len=128,
        max_num_batched_tokens=48,
        kv_cache_memory_bytes=64 << 20,
        tensor_parallel_size=2,
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()


def test_two_ranks_give_the_merged_models_tokens(
    llm: Any, vllm_model: Path, vllm_basis: Basis, vllm_adapters: list[Adapter]
) -> None:
    from vllm import SamplingParams

    from lorasb_runtime.engines.vllm.offline import StoreAdapters

    names = StoreAdapters(llm)
    rng = random.Random(6)
    owners = [None, 0, 1, 2, None, 3, 0, 3]
    prompts = [random_prompt(rng) for _ in owners]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        lora_request=[None if o is None else names.request(vllm_adapters[o].name) for o in owners],
        use_tqdm=False,
    )
    for owner, prompt, output in zip(owners, prompts, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        adapter = None if owner is None else vllm_adapters[owner]
        logits = reference_logits(vllm_model, vllm_basis, adapter, [*prompt, *tokens])
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
    with pytest.raises(NotFoundError, match="nobody"):
        names.request("nobody")
