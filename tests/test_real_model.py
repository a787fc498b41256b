"""The whole journey on the real SmolLM2-135M-Instruct: derive, train, publish, serve, swap, merge.

One basis and two adapters are made by the command line, once for all tests of this file.
"""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from bases import reference_logits
from openai import AsyncOpenAI
from serving import lorasb, serving

from lorasb_runtime.adapters.slots import SlotTable
from lorasb_runtime.config import SchedulerConfig
from lorasb_runtime.engines.base import SamplingParams
from lorasb_runtime.engines.torch.kv_cache import KVCache
from lorasb_runtime.engines.torch.kv_regions import KVRegions
from lorasb_runtime.engines.torch.prepare import kv_shape, load_model
from lorasb_runtime.engines.torch.runner import ModelRunner
from lorasb_runtime.engines.torch.scheduler import Scheduler
from lorasb_runtime.engines.torch.sequence import Sequence
from lorasb_runtime.models.load import load_causal_lm, load_tokenizer
from lorasb_runtime.storage.adapter_file import Adapter, load_adapter
from lorasb_runtime.storage.basis_file import Basis, load_basis

pytestmark = pytest.mark.slow

DATA = Path(__file__).parent.parent / "examples" / "data"
QUESTIONS = ("What is the capital of France?", "Why is the sky blue?", "Tell me about dogs.")
NAMES = ("pirate", "json")
COUNT = 24


@pytest.fixture(scope="module")
def work(smol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """basis.safetensors, pirate.safetensors, json.safetensors and a store with both."""
    folder = tmp_path_factory.mktemp("journey")
    basis = folder / "basis.safetensors"
    lorasb("derive", smol, "--data", DATA, "--samples", 12, "--rank", 16, "-o", basis)
    for name in NAMES:
        out = folder / f"{name}.safetensors"
        words = ("--data", DATA / f"{name}.jsonl", "-o", out, "--epochs", 1, "--json")
        result = json.loads(lorasb("train", smol, "--basis", basis, *words).stdout)
        assert result["held_out_after"] < 0.8 * result["held_out_before"]
        lorasb("publish", out, folder / "store", name)
    return folder


@pytest.fixture(scope="module")
def basis(work: Path) -> Basis:
    return load_basis(work / "basis.safetensors")


@pytest.fixture(scope="module")
def adapters(work: Path, basis: Basis) -> dict[str, Adapter]:
    return {name: load_adapter(work / f"{name}.safetensors", basis) for name in NAMES}


@pytest.fixture(scope="module")
def url(smol: Path, work: Path) -> Iterator[str]:
    flags = ("--basis", work / "basis.safetensors", "--adapters", work / "store")
    with serving(work / "log", smol, *flags, "--dtype", "float32") as url:
        yield url


def test_a_mixed_batch_has_the_logits_of_float64_weights(
    smol: Path, basis: Basis, adapters: dict[str, Adapter]
) -> None:
    """Rows of the base model and two adapters, prefilled in chunks and decoded in one batch."""
    cpu = torch.device("cpu")
    model = load_model(smol, torch.float32, cpu)
    regions = KVRegions(4096, 64, 1024, 8)
    slots = SlotTable(4, basis.size, torch.float32, cpu, basis.scaling)
    cache = KVCache(kv_shape(model), regions, torch.float32, cpu)
    runner = ModelRunner(model, basis, slots, cache)
    tokenizer = load_tokenizer(smol)
    owners: list[Adapter | None] = [adapters["pirate"], None, adapters["json"], None]
    params = SamplingParams(temperature=0.0)
    leases = [slots.lease(a.version, a.cores) if a else 0 for a in owners]
    sequences = []
    for i, _ in enumerate(owners):
        ids = tokenizer.encode(" ".join(QUESTIONS[: i + 1]) * (i + 1))
        sequences.append(Sequence(str(i), 0, ids, len(ids), 999, params, 0))
    scheduler = Scheduler(
        SchedulerConfig(8, 20), regions, lambda s: leases[int(s.request_id)], lambda s: None
    )
    for sequence in sequences:
        scheduler.add(sequence)
    rows: list[list[torch.Tensor]] = [[] for _ in owners]
    while min(map(len, rows)) < 6:
        result = runner.run(scheduler.schedule())
        for sequence, logits in zip(result.receivers, result.logits, strict=True):
            rows[int(sequence.request_id)].append(logits)
            sequence.tokens.append(int(logits.argmax()))
    for sequence, owner, found in zip(sequences, owners, rows, strict=True):
        tokens = sequence.tokens[: sequence.prompt_length + len(found) - 1]
        expected = reference_logits(smol, basis, owner, tokens)[sequence.prompt_length - 1 :]
        difference = (torch.stack(found).double() - expected).abs().max()
        assert difference < 2e-4 * expected.abs().max()


async def ask(url: str, asked: list[tuple[str, str]]) -> list[list[str]]:
    """The greedy tokens of each (model, question), all asked at the same time."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as openai:

        async def one(model: str, question: str) -> list[str]:
            messages: list[Any] = [{"role": "user", "content": question}]
            answer = await openai.chat.completions.create(
                model=model, messages=messages, temperature=0, max_tokens=COUNT, logprobs=True
            )
            logprobs = answer.choices[0].logprobs
            return [entry.token for entry in (logprobs and logprobs.content) or []]

        return await asyncio.gather(*(one(m, q) for m, q in asked))


def generate(folder: Path, question: str) -> list[str]:
    """Hugging Face's own greedy tokens."""
    tokenizer = load_tokenizer(folder)
    model = load_causal_lm(folder, torch.float32)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=COUNT, max_length=None)
    return [tokenizer.decode([t]) for t in output[0, inputs["input_ids"].shape[1] :]]


def test_answers_are_those_of_the_merged_checkpoints(
    url: str, smol: Path, work: Path, tmp_path: Path
) -> None:
    base = "SmolLM2-135M-Instruct" if smol.name.startswith("SmolLM2") else smol.name
    asked = [(model, question) for question in QUESTIONS for model in (base, *NAMES)]
    answers = dict(zip(asked, asyncio.run(ask(url, asked)), strict=True))
    folders = {base: smol}
    for name in NAMES:
        folders[name] = tmp_path / name
        file = work / f"{name}.safetensors"
        words = ("--basis", work / "basis.safetensors", file, "--dtype", "float32")
        shown = json.loads(lorasb("merge", smol, *words, "-o", folders[name], "--json").stdout)
        assert shown["kept"] > 0.999
    for (model, question), tokens in answers.items():
        assert tokens == generate(folders[model], question)
    assert all(len({tuple(answers[m, q]) for m in (base, *NAMES)}) == 3 for q in QUESTIONS)


def test_a_swap_changes_the_next_answer_alone(url: str, work: Path) -> None:
    question = QUESTIONS[0]
    pirate, as_json = asyncio.run(ask(url, [("pirate", question), ("json", question)]))
    body = (work / "json.safetensors").read_bytes()
    put = httpx.put(f"{url}/v1/adapters/pirate", content=body)
    assert put.status_code == 200
    assert asyncio.run(ask(url, [("pirate", question)])) == [as_json]
    assert httpx.post(f"{url}/v1/adapters/pirate/rollback").status_code == 200
    assert asyncio.run(ask(url, [("pirate", question)])) == [pirate]


def test_a_merged_server_gives_the_adapters_answers(
    url: str, smol: Path, work: Path, tmp_path: Path
) -> None:
    question = QUESTIONS[0]
    flags = ("--basis", work / "basis.safetensors", "--adapters", work / "store")
    flags = (*flags, "--dtype", "float32", "--merged", "pirate")
    with serving(tmp_path / "log", smol, *flags) as merged:
        found = asyncio.run(ask(merged, [("pirate", question)]))
    assert found == asyncio.run(ask(url, [("pirate", question)]))


def test_a_merge_into_bf16_says_what_it_lost(smol: Path, work: Path, tmp_path: Path) -> None:
    words = ("--basis", work / "basis.safetensors", f"{work}/pirate.safetensors=0.05")
    result = lorasb("merge", smol, *words, "-o", tmp_path / "m", "--json")
    assert json.loads(result.stdout)["kept"] < 0.9
    assert "warning: rounding left" in result.stderr.replace("\n", " ")
