"""One case of `vllm_native.py` in a process of its own; prints one JSON object.

Cases: base (vLLM without LoRA), stock (vLLM's own LoRA layers), native (lorasb's plugin), check
(native in float32 against the merged weights), resident (many slots filled).
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from lorasb_runtime.adapters.loaded_adapter import LoadedAdapter
from lorasb_runtime.adapters.names import AdapterName
from lorasb_runtime.models.load import load_causal_lm
from lorasb_runtime.models.targets import weight_of
from lorasb_runtime.ops.core_matmul import dense_delta, scale_core
from lorasb_runtime.storage.basis_file import Basis, load_basis

LAYERS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
CHECKED_TOKENS = 24


def cores_of(basis: Basis, number: int) -> torch.Tensor:
    """The adapters of a run: noise strong enough to change what the model says."""
    generator = torch.Generator().manual_seed(number)
    return 0.5 * torch.randn(basis.size, generator=generator)


def prompt_of(number: int, length: int) -> list[int]:
    return [100 + (7 * number + 13 * i) % 1000 for i in range(length)]


class Case:
    """An LLM, and how its requests name an adapter."""

    def __init__(self, options: argparse.Namespace) -> None:
        from vllm import LLM

        self.options = options
        self.basis = load_basis(options.basis)
        native = options.case in ("native", "check", "resident")
        if native:
            os.environ["LORASB_BASIS"] = str(Path(options.basis).absolute())
        lora: dict[str, Any] = {}
        if options.case != "base":
            lora = {"enable_lora": True, "max_loras": options.slots, "max_lora_rank": options.rank}
            lora["lora_target_modules"] = LAYERS
        self.llm = LLM(
            options.model,
            dtype="float32" if options.case == "check" else options.dtype,
            enforce_eager=not options.compiled,
            max_model_len=2048,
            max_num_seqs=max(options.batch, 36),
            max_num_batched_tokens=512,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=1 << 30,
            **lora,
        )
        self.engine = self.llm.llm_engine
        self._names: Any = None
        if native:
            from lorasb_runtime.engines.vllm.offline import StoreAdapters

            self._names = StoreAdapters(self.llm)

    def lora(self, number: int) -> Any:
        """What a request for adapter `number` carries; None without LoRA."""
        from vllm.lora.request import LoRARequest

        if self.options.case == "base":
            return None
        if self._names is not None:
            name, cores = AdapterName("default", f"a{number}"), cores_of(self.basis, number)
            return self._names.hold(LoadedAdapter(name, f"{number:064x}", cores))
        return LoRARequest(f"a{number}", number + 1, str(self.options.folders / f"a{number}"))

    def run(self, prompts: list[list[int]], loras: list[Any], tokens: int) -> "Marks":
        """All requests at once, greedy: when each step ended, and what came out."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        ids = [f"{time.monotonic_ns()}-{n}" for n in range(len(prompts))]
        began = time.perf_counter()
        for name, prompt, lora in zip(ids, prompts, loras, strict=True):
            self.engine.add_request(name, {"prompt_token_ids": prompt}, params, lora_request=lora)
        marks = Marks(began)
        outputs: dict[str, list[int]] = {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                outputs[output.request_id] = list(output.outputs[0].token_ids)
            marks.add(outputs, len(prompts))
        marks.tokens = [outputs[name] for name in ids]
        return marks


class Marks:
    """decode: tokens per second from the step on after which all requests decode."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.steps: list[tuple[float, int]] = []
        self.tokens: list[list[int]] = []
        self.ended = began

    def add(self, outputs: dict[str, list[int]], requests: int) -> None:
        self.ended = time.perf_counter()
        if len(outputs) == requests:
            self.steps.append((self.ended, sum(map(len, outputs.values()))))

    @property
    def decode(self) -> float:
        (began, first), (ended, last) = self.steps[0], self.steps[-1]
        return (last - first) / (ended - began)

    @property
    def overall(self) -> float:
        return sum(map(len, self.tokens)) / (self.ended - self.began)


def measure(case: Case) -> dict[str, Any]:
    """Speeds, the worker's memory for each adapter, and what a new adapter costs."""
    batch, length, tokens = case.options.batch, case.options.prompt, case.options.tokens
    case.run([prompt_of(0, 16)], [None], 2)
    before = worker_bytes()
    prompts = [prompt_of(n, length) for n in range(batch)]
    began = time.perf_counter()
    loras = [case.lora(n) for n in range(batch)]
    if case.options.case != "base":
        case.run([prompt[:1] for prompt in prompts], loras, 1)
    activation = (time.perf_counter() - began) / batch
    after = worker_bytes()
    runs = [case.run(prompts, loras, tokens) for _ in range(case.options.repeats)]
    prefills = []
    for n in range(case.options.repeats):
        marks = case.run([prompt_of(n, 512)], [loras[n % batch]], 1)
        prefills.append(marks.ended - marks.began)
    return {
        "decode": max(marks.decode for marks in runs),
        "overall": max(marks.overall for marks in runs),
        "prefill_seconds": min(prefills),
        "activation_seconds": activation,
        "slot_bytes": (after - before) / batch,
    }


def check(case: Case) -> dict[str, Any]:
    """Greedy tokens of 32 adapters and 4 requests for the base in one batch, against the merged."""
    owners = [*range(32), None, None, None, None]
    prompts = [prompt_of(n, 20 + n) for n in range(len(owners))]
    loras = [None if o is None else case.lora(o) for o in owners]
    found = case.run(prompts, loras, CHECKED_TOKENS).tokens
    right = 0
    for owner, prompt, tokens in zip(owners, prompts, found, strict=True):
        right += greedy_tokens(case, owner, [*prompt, *tokens], len(prompt)) == tokens
    return {"sequences": len(owners), "right": right}


def greedy_tokens(case: Case, owner: int | None, whole: list[int], start: int) -> list[int]:
    """The likeliest token after each one from `start - 1` on, by W0 + scaling * B R A."""
    model = load_causal_lm(Path(case.options.model), torch.float32)
    if owner is not None:
        cores = scale_core(cores_of(case.basis, owner), case.basis.scaling)
        for index, target in enumerate(case.basis.targets):
            b, a = case.basis.b(target.module), case.basis.a(target.module)
            delta = dense_delta(b, case.basis.core(cores, index), a)
            weight_of(model.get_submodule(target.module)).add_(delta)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([whole]), use_cache=False).logits[0]
    best: list[int] = logits[start - 1 : -1].argmax(-1).tolist()
    return best


def fill(case: Case) -> dict[str, Any]:
    """Every slot filled with an adapter of its own; the memory that each takes.

    further_slot_bytes: of the second half alone, without what the worker grows by but once.
    """
    case.run([prompt_of(0, 16)], [None], 2)
    before, began = worker_bytes(), time.perf_counter()
    slots, batch = case.options.slots, case.options.batch
    half, filled = before, 0
    for start in range(0, slots, batch):
        if start <= slots // 2:
            half, filled = worker_bytes(), start
        numbers = range(start, min(start + batch, slots))
        case.run([[100 + n % 1000] for n in numbers], [case.lora(n) for n in numbers], 1)
    seconds, after = time.perf_counter() - began, worker_bytes()
    return {
        "slots": slots,
        "slot_bytes": (after - before) / slots,
        "further_slot_bytes": (after - half) / (slots - filled),
        "core_bytes": case.basis.size * case.engine.vllm_config.lora_config.lora_dtype.itemsize,
        "seconds": seconds,
    }


def worker_bytes() -> int:
    """Resident memory of the process with the model: the largest of our descendants."""
    return max(int(field(pid, "VmRSS").split()[0]) << 10 for pid in descendants(os.getpid()))


def descendants(pid: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *descendants(int(child))]
    return found


def field(pid: int, name: str) -> str:
    text = Path(f"/proc/{pid}/status").read_text()
    return text.partition(f"{name}:")[2].partition("\n")[0] or "0 kB"


def main() -> None:
    parser = argparse.ArgumentParser(description="one case of vllm_native.py")
    parser.add_argument("case", choices=["base", "stock", "native", "check", "resident"])
    parser.add_argument("model")
    parser.add_argument("basis")
    parser.add_argument("--folders", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compiled", action="store_true")
    case = Case(parser.parse_args())
    work = {"check": check, "resident": fill}.get(case.options.case, measure)
    print(json.dumps(work(case)))


if __name__ == "__main__":
    main()
