"""The torch engine on the pico model: right logits, right tokens, nothing left when idle."""

import asyncio
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bases import random_adapter, random_basis, reference_logits
from driving import drive

from lorasb_runtime.adapters.loaded_adapter import LoadedAdapter
from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.config import CacheConfig, EngineConfig, SchedulerConfig
from lorasb_runtime.engines.base import Chunk, GenerationRequest, Grammar, SamplingParams
from lorasb_runtime.engines.torch import core_rows, kv_batch
from lorasb_runtime.engines.torch.build import load_engine
from lorasb_runtime.engines.torch.engine import TorchEngine
from lorasb_runtime.errors import EngineError, InputError
from lorasb_runtime.models.load import load_causal_lm
from lorasb_runtime.storage.adapter_file import Adapter
from lorasb_runtime.storage.basis_file import Basis

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def loaded(basis: Basis, adapter: Adapter) -> LoadedAdapter:
    return LoadedAdapter(parse_name(adapter.name), adapter.version, adapter.cores)


@pytest.fixture(scope="module")
def basis(pico: Path) -> Basis:
    return random_basis(pico, rank=4, scaling=0.5)


@pytest.fixture(scope="module")
def adapters(basis: Basis) -> list[Adapter]:
    return [random_adapter(basis, i) for i in range(3)]


@pytest.fixture(scope="module")
def engine(pico: Path, basis: Basis) -> Iterator[TorchEngine]:
    config = EngineConfig(
        dtype="float32",
        slots=3,
        cache=CacheConfig(1 << 20, smallest_region=16, prefix_nbytes=1 << 16, prefix_block=4),
        scheduler=SchedulerConfig(max_num_seqs=6, max_batched_tokens=40),
    )
    engine = load_engine(pico, basis, config)
    engine.start()
    yield engine
    engine.close()


async def run(engine: TorchEngine, request: GenerationRequest) -> dict[int, list[Chunk]]:
    chunks: dict[int, list[Chunk]] = {}
    async for chunk in engine.generate(request):
        chunks.setdefault(chunk.index, []).append(chunk)
    return chunks


def tokens_of(chunks: list[Chunk]) -> list[int]:
    assert [c.finish_reason is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]
    return [token for chunk in chunks for token in chunk.tokens]


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def request(
    prompt: list[int],
    adapter: LoadedAdapter | None = None,
    sampling: SamplingParams = GREEDY,
    n: int = 1,
) -> GenerationRequest:
    return GenerationRequest("test", tuple(prompt), sampling, adapter, n)


def wait_idle(engine: TorchEngine) -> None:
    async def once() -> None:
        for _ in range(200):
            stats = engine.stats()
            if not (stats.running or stats.waiting):
                return
            await asyncio.sleep(0.01)

    asyncio.run(once())
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)


@pytest.mark.parametrize("short", [0, 8, 64])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("pico", torch.float32), ("pico", torch.bfloat16), ("pico_gpt2", torch.float32)],
)
def test_each_row_of_a_mixed_batch_has_the_logits_of_its_own_weights(
    kind: str,
    dtype: torch.dtype,
    short: int,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefill in chunks, then decode, four models in one batch, against float64 on the side.

    The kernels take no chunk, or some, or each.
    """
    monkeypatch.setattr(core_rows, "SHORT_RUN", short)
    monkeypatch.setattr(kv_batch, "MOST_KERNEL_PAIRS", short * short)
    pico = request.getfixturevalue(kind)
    basis = random_basis(pico, rank=4, scaling=0.5)
    adapters = [random_adapter(basis, i) for i in range(3)]
    rng = random.Random(3)
    owners: list[Adapter | None] = [None, *adapters, None, adapters[0]]
    prompts = [[rng.randrange(3, 250) for _ in range(rng.randint(1, 50))] for _ in owners]
    allowed = 2e-5 if dtype == torch.float32 else 0.08
    driven = drive(pico, basis, prompts, owners, steps=8, dtype=dtype)
    for sequence, owner in zip(driven, owners, strict=True):
        expected = reference_logits(pico, basis, owner, sequence.tokens)
        assert sequence.error(expected) < allowed


def test_neither_order_nor_company_changes_a_row(
    engine: TorchEngine, basis: Basis, adapters: list[Adapter]
) -> None:
    """Five models over three slots' room for two, in shuffled batches, against each one alone."""
    choices = [None, *(loaded(basis, a) for a in adapters)]
    rng = random.Random(5)
    requests = [
        request([rng.randrange(3, 250) for _ in range(rng.randint(1, 200))], rng.choice(choices))
        for _ in range(12)
    ]
    alone = [tokens_of(asyncio.run(run(engine, r))[0]) for r in requests]
    for _ in range(3):
        order = list(range(len(requests)))
        rng.shuffle(order)

        async def together(order: list[int]) -> list[dict[int, list[Chunk]]]:
            return await asyncio.gather(*(run(engine, requests[i]) for i in order))

        results = asyncio.run(together(order))
        for i, chunks in zip(order, results, strict=True):
            assert tokens_of(chunks[0]) == alone[i]
    assert len({tuple(tokens) for tokens in alone}) > 6


@pytest.mark.parametrize("attention", ["kernel", "torch"])
def test_numbers_that_are_none_stay_in_their_sequence(
    attention: str, engine: TorchEngine, basis: Basis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that overflows leaves NaN in the KV cache, which the next owner must not see."""
    if attention == "torch":
        monkeypatch.setattr(kv_batch, "attention_kernel", lambda *_: None)
    requests = [request(list(range(40, 40 + n)), sampling=GREEDY) for n in (3, 9, 14, 70)]
    alone = [tokens_of(asyncio.run(run(engine, r))[0]) for r in requests]
    version = f"overflow-{attention}"
    broken = LoadedAdapter(parse_name("broken"), version, torch.full((basis.size,), 3e38))

    async def together(adapter: LoadedAdapter | None) -> list[list[int]]:
        asked = [request(list(r.prompt), adapter) for r in requests]
        results = await asyncio.gather(*(run(engine, r) for r in asked))
        return [tokens_of(chunks[0]) for chunks in results]

    assert asyncio.run(together(broken)) != alone
    assert asyncio.run(together(None)) == alone


def test_slot_zero_is_the_untouched_model(pico: Path, engine: TorchEngine) -> None:
    prompt = list(range(40, 60))
    found = tokens_of(asyncio.run(run(engine, request(prompt)))[0])
    expected = list(prompt)
    model = load_causal_lm(pico, torch.float32, attention="eager")
    with torch.inference_mode():
        for _ in found:
            logits = model(input_ids=torch.tensor([expected]), use_cache=False).logits
            expected.append(int(logits[0, -1].argmax()))
    assert expected[len(prompt) :] == found


def test_seeded_sampling_repeats_and_completions_differ(engine: TorchEngine) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=10, seed=11, ignore_eos=True)
    first = asyncio.run(run(engine, request([5, 6, 7], None, params, n=3)))
    second = asyncio.run(run(engine, request([5, 6, 7], None, params, n=3)))
    assert sorted(first) == [0, 1, 2]
    texts = [tokens_of(first[i]) for i in range(3)]
    assert texts == [tokens_of(second[i]) for i in range(3)]
    assert len({tuple(t) for t in texts}) == 3


def test_stop_strings_end_and_never_leak(engine: TorchEngine) -> None:
    whole = text_of(asyncio.run(run(engine, request([50, 51, 52])))[0])
    assert len(whole) > 4
    stop = whole[3:5]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=(stop, "~~~"))
    chunks = asyncio.run(run(engine, request([50, 51, 52], None, params)))[0]
    assert text_of(chunks) == whole[: whole.index(stop)]
    assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", stop)


def test_stop_tokens_and_min_tokens(engine: TorchEngine) -> None:
    free = tokens_of(asyncio.run(run(engine, request([50, 51, 52])))[0])
    token = free[4]
    first = free.index(token)
    params = SamplingParams(
        temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=(token,)
    )
    chunks = asyncio.run(run(engine, request([50, 51, 52], None, params)))[0]
    assert tokens_of(chunks) == free[: first + 1]
    assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", token)
    later = SamplingParams(
        temperature=0.0, max_tokens=12, min_tokens=8, ignore_eos=True, stop_token_ids=(token,)
    )
    assert len(tokens_of(asyncio.run(run(engine, request([50, 51, 52], None, later)))[0])) >= 8


def test_logprobs_are_those_of_the_model(engine: TorchEngine, pico: Path, basis: Basis) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=3)
    chunks = asyncio.run(run(engine, request([9, 10, 11], None, params)))[0]
    tokens = tokens_of(chunks)
    expected = reference_logits(pico, basis, None, [9, 10, 11, *tokens]).log_softmax(-1)[2:6]
    for row, chunk in zip(expected, chunks, strict=True):
        (entry,) = chunk.logprobs
        assert entry.logprob == pytest.approx(row[entry.token].item(), abs=1e-4)
        assert [t for t, _ in entry.top] == row.topk(3).indices.tolist()


def test_prompt_logprobs_are_those_of_the_model(
    engine: TorchEngine, pico: Path, basis: Basis, adapters: list[Adapter]
) -> None:
    """A prompt longer than a step, whose beginning the prefix cache holds already."""
    prompt = [(7 * i) % 200 + 3 for i in range(90)]
    adapter = loaded(basis, adapters[1])
    asyncio.run(run(engine, request(prompt, adapter)))
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, prompt_logprobs=2)
    chunks = asyncio.run(run(engine, request(prompt, adapter, params, n=2)))
    found = chunks[0][0].prompt_logprobs
    expected = reference_logits(pico, basis, adapters[1], prompt).log_softmax(-1)
    assert [entry.token for entry in found] == prompt[1:]
    for row, entry in zip(expected, found, strict=False):
        assert entry.logprob == pytest.approx(row[entry.token].item(), abs=1e-3)
        assert [t for t, _ in entry.top] == row.topk(2).indices.tolist()
    assert not chunks[1][0].prompt_logprobs and not chunks[0][1].prompt_logprobs


def test_a_shared_beginning_is_computed_once_under_one_adapter_and_tenant(
    engine: TorchEngine, basis: Basis, adapters: list[Adapter]
) -> None:
    rng = random.Random(11)
    system = [rng.randrange(3, 250) for _ in range(40)]
    prompts = [system + [rng.randrange(3, 250) for _ in range(5)] for _ in range(3)]
    first, second = loaded(basis, adapters[0]), loaded(basis, adapters[2])

    def ask(prompt: list[int], adapter: LoadedAdapter, tenant: str = "") -> tuple[int, list[int]]:
        asked = GenerationRequest("t", tuple(prompt), GREEDY, adapter, 1, tenant)
        chunks = asyncio.run(run(engine, asked))[0]
        return chunks[0].cached_tokens, tokens_of(chunks)

    fresh = ask(prompts[0], first, "someone else")
    assert fresh[0] == 0
    assert ask(prompts[0], first) == fresh
    assert ask(prompts[1], first)[0] == 40
    assert ask(prompts[0], first) == (44, fresh[1])
    assert ask(prompts[0], second)[0] == 0
    assert ask(prompts[2], first, "someone else")[0] == 40


def test_what_a_failed_step_did_not_save_is_not_reused(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [(11 * i) % 240 + 3 for i in range(60)]

    def broken(step: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "run", broken)
        with pytest.raises(EngineError):
            asyncio.run(run(engine, request(prompt)))
    chunks = asyncio.run(run(engine, request(prompt)))[0]
    assert chunks[0].cached_tokens == 0


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar("regex", "[ab]{3}x"), r"[ab]{3}x"),
        (Grammar("choice", '["yes", "no"]'), r"yes|no"),
        (Grammar("json_schema", '{"type": "boolean"}'), r"true|false"),
        (Grammar("lark", 'start: "<" /[0-9]{2}/ ">"'), r"<[0-9]{2}>"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_output_conforms_to_the_grammar(
    temperature: float, grammar: Grammar, pattern: str, engine: TorchEngine
) -> None:
    params = SamplingParams(
        temperature=temperature, max_tokens=30, grammar=grammar, min_tokens=9, ignore_eos=True
    )
    chunks = asyncio.run(run(engine, request([40, 41], None, params, n=3)))
    for index in range(3):
        assert re.fullmatch(pattern, text_of(chunks[index]))
        assert chunks[index][-1].finish_reason == "stop"


@pytest.mark.parametrize(
    "grammar", [Grammar("regex", "(a"), Grammar("json_schema", "{"), Grammar("lark", "start: nope")]
)
def test_a_grammar_that_is_none_is_refused(grammar: Grammar, engine: TorchEngine) -> None:
    params = SamplingParams(grammar=grammar)
    with pytest.raises(InputError, match=f"{grammar.kind}: found one that cannot be used"):
        asyncio.run(run(engine, request([40, 41], None, params)))


def test_a_request_that_goes_away_leaves_nothing(
    engine: TorchEngine, basis: Basis, adapters: list[Adapter]
) -> None:
    async def leave_early() -> None:
        params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
        stream = engine.generate(request([1, 2, 3], loaded(basis, adapters[0]), params, n=2))
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave_early())
    wait_idle(engine)
    assert engine.stats().kv_tokens_used == 0


def test_what_cannot_run_is_refused(engine: TorchEngine) -> None:
    for bad, match in (
        (request([]), "found no tokens"),
        (request([1] * 256), "found 256 tokens, expected fewer than the context of 256"),
        (request([1], None, SamplingParams(stop_token_ids=(9999,))), "found 9999"),
    ):
        with pytest.raises(InputError, match=match):
            asyncio.run(run(engine, bad))


def test_length_ends_at_the_context(engine: TorchEngine) -> None:
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    chunks = asyncio.run(run(engine, request([7] * 250, None, params)))[0]
    assert len(tokens_of(chunks)) == 6
    assert chunks[-1].finish_reason == "length"


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens_of(asyncio.run(run(engine, request([1, 2, 3])))[0])

    def broken(step: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "run", broken)
        with pytest.raises(EngineError):
            asyncio.run(run(engine, request([1, 2, 3])))
    assert tokens_of(asyncio.run(run(engine, request([1, 2, 3])))[0]) == expected
    wait_idle(engine)
    assert engine.stats().kv_tokens_used == 0


def test_a_stopped_engine_says_so(pico: Path) -> None:
    engine = load_engine(pico, None, EngineConfig(dtype="float32"))
    with pytest.raises(EngineError, match="not running"):
        asyncio.run(run(engine, request([1])))
    engine.start()

    async def stop_while_running() -> None:
        params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
        stream = engine.generate(request([1, 2], None, params))
        await anext(stream)
        await asyncio.to_thread(engine.close)
        async for _ in stream:
            pass

    with pytest.raises(EngineError, match="stopped"):
        asyncio.run(stop_while_running())
