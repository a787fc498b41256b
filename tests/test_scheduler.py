"""The scheduler and the KV regions, with integers alone."""

import random

from lorasb_runtime.config import SchedulerConfig
from lorasb_runtime.engines.base import SamplingParams
from lorasb_runtime.engines.torch.kv_regions import KVRegions, Region
from lorasb_runtime.engines.torch.prefix_cache import BlockCopy, PrefixCache
from lorasb_runtime.engines.torch.scheduler import Scheduler, Step
from lorasb_runtime.engines.torch.sequence import Sequence


def sequence(name: str, prompt: int, limit: int = 1000, tenant: str = "") -> Sequence:
    tokens = list(range(prompt))
    return Sequence(name, 0, tokens, prompt, limit, SamplingParams(), 0, tenant=tenant)


class Leases:
    """Counts leases; `slots` None means there is always one."""

    def __init__(self, slots: int | None = None) -> None:
        self.slots = slots
        self.held = 0

    def lease(self, _: Sequence) -> int | None:
        if self.slots is not None and self.held >= self.slots:
            return None
        self.held += 1
        return self.held

    def release(self, _: Sequence) -> None:
        self.held -= 1


def scheduler(
    budget: int = 4096,
    leases: Leases | None = None,
    prefixes: PrefixCache | None = None,
    **limits: int,
) -> tuple[Scheduler, KVRegions]:
    config = SchedulerConfig(**{"max_num_seqs": 8, "max_batched_tokens": 64, **limits})
    regions = KVRegions(budget, 16, min(256, budget), config.max_num_seqs)
    leases = leases or Leases()
    return Scheduler(config, regions, leases.lease, leases.release, prefixes), regions


def sample(step: Step) -> None:
    """What the engine does after a step: everyone who is due gets a token."""
    for s in [*step.decodes, *(c.sequence for c in step.prefills if c.last)]:
        s.tokens.append(0)


def test_a_long_prompt_is_split_and_does_not_stop_decoding() -> None:
    sched, _ = scheduler()
    short, long = sequence("short", 5), sequence("long", 150)
    sched.add(short)
    sample(sched.schedule())
    sched.add(long)
    chunks = []
    for _ in range(4):
        step = sched.schedule()
        assert short in step.decodes
        assert step.tokens <= 64
        chunks += [c.count for c in step.prefills]
        sample(step)
    assert chunks == [63, 63, 24]
    assert long.generated == 2


def test_prefill_and_decode_share_a_step_and_new_ones_join_at_once() -> None:
    sched, _ = scheduler()
    a, b = sequence("a", 4), sequence("b", 6)
    sched.add(a)
    sample(sched.schedule())
    sched.add(b)
    step = sched.schedule()
    assert step.decodes == [a]
    assert [(c.sequence, c.start, c.count, c.last) for c in step.prefills] == [(b, 0, 6, True)]


def test_short_prompts_do_not_wait_for_a_long_one_nor_it_for_them() -> None:
    sched, _ = scheduler()
    long = sequence("long", 200)
    sched.add(long)
    sched.schedule()
    for i in range(4):
        sched.add(sequence(str(i), 24))
    counts = {c.sequence.request_id: c.count for c in sched.schedule().prefills}
    assert counts == {"0": 24, "1": 24, "long": 16}


def test_owners_take_turns() -> None:
    sched, _ = scheduler(max_num_seqs=4)
    for i in range(6):
        sched.add(sequence(f"a{i}", 2, tenant="a"))
    for i in range(2):
        sched.add(sequence(f"b{i}", 2, tenant="b"))
    sched.schedule()
    assert [s.request_id for s in sched.running] == ["a0", "b0", "a1", "b1"]


def test_a_prompt_begun_like_a_past_one_is_restored() -> None:
    sched, _ = scheduler(prefixes=PrefixCache(8, 4))
    first = sequence("first", 11)
    sched.add(first)
    assert not sched.schedule().restores
    assert first.region
    save = BlockCopy(first.region, 0, (0, 1))
    second = sequence("second", 15)
    sched.add(second)
    first.tokens.append(0)
    step = sched.schedule()
    assert step.saves == [save]
    assert second.region and step.restores == [BlockCopy(second.region, 0, (0, 1))]
    assert [(c.start, c.count) for c in step.prefills] == [(8, 7)]
    assert (first.cached, second.cached) == (0, 8)


def test_nothing_is_shared_across_tenants_and_the_last_token_is_always_computed() -> None:
    sched, _ = scheduler(prefixes=PrefixCache(8, 4))
    first, other, same = sequence("a", 8), sequence("b", 8, tenant="x"), sequence("c", 8)
    for s in (first, other, same):
        sched.add(s)
        sample(sched.schedule())
        sched.finish(s)
    assert (first.cached, other.cached, same.cached) == (0, 0, 4)


def test_one_prompt_sent_many_times_at_once_is_computed_once() -> None:
    sched, _ = scheduler(prefixes=PrefixCache(8, 4))
    several = [sequence(str(i), 9) for i in range(3)]
    for s in several:
        sched.add(s)
    step = sched.schedule()
    assert [c.sequence for c in step.prefills] == several[:1]
    sample(step)
    step = sched.schedule()
    assert [(c.start, c.count) for c in step.prefills] == [(8, 1), (8, 1)]


def test_kept_blocks_are_evicted_from_the_end_of_the_chain_not_used_for_longest() -> None:
    cache = PrefixCache(4, 4)

    def keep(tokens: list[int]) -> int:
        s = Sequence("s", 0, tokens, len(tokens), 99, SamplingParams(), 0, computed=len(tokens))
        s.region = Region(0, 0)
        copy = cache.keep(s)
        return len(copy.ids) if copy else 0

    def kept(tokens: list[int]) -> int:
        s = Sequence("s", 0, [*tokens, 1], len(tokens), 99, SamplingParams(), 0)
        return len(cache.match(cache.wanted(s)))

    old, new = list(range(100, 112)), list(range(200, 208))
    assert keep(old) == 3 and keep(old) == 0
    assert keep(new) == 2 and cache.used == 4
    assert kept(new) == 2 and kept(old) == 2
    assert keep(list(range(300, 340))) == 4  # larger than the cache: its beginning is kept
    assert kept(old) == kept(new) == 0
    cache.clear()
    assert cache.used == 0 and keep(old) == 3


def test_no_more_sequences_run_than_allowed() -> None:
    sched, _ = scheduler(max_num_seqs=3)
    for i in range(5):
        sched.add(sequence(str(i), 4))
    sched.schedule()
    assert len(sched.running) == 3 and len(sched.waiting) == 2


def test_a_sequence_without_a_free_slot_waits_in_its_place() -> None:
    leases = Leases(1)
    sched, _ = scheduler(leases=leases)
    a, b, c = (sequence(n, 4) for n in "abc")
    for s in (a, b, c):
        sched.add(s)
    assert [x.sequence for x in sched.schedule().prefills] == [a]
    assert list(sched.waiting) == [b, c]
    sched.finish(a)
    assert [x.sequence for x in sched.schedule().prefills] == [b]


def test_a_sequence_that_outgrows_its_region_moves_to_a_larger_one() -> None:
    sched, regions = scheduler()
    s = sequence("s", 16)
    sched.add(s)
    sample(sched.schedule())
    step = sched.schedule()
    assert [(m.source, m.target, m.tokens) for m in step.moves] == [
        (Region(0, 0), Region(1, 0), 16)
    ]
    sched.finish(s)
    sched.schedule()
    assert regions.used == 0


def test_a_full_cache_preempts_the_last_comer_and_everyone_still_finishes() -> None:
    leases = Leases()
    sched, regions = scheduler(budget=64, leases=leases)
    all_of_them = [sequence(str(i), 12, limit=40) for i in range(4)]
    for s in all_of_them:
        sched.add(s)
    preempted = 0
    for _ in range(400):
        running = set(map(id, sched.running))
        step = sched.schedule()
        preempted += sum(id(s) in running for s in sched.waiting)
        assert regions.reserved <= 64
        sample(step)
        for s in list(sched.running):
            if len(s.tokens) >= s.limit:
                sched.finish(s)
    assert preempted
    assert all(len(s.tokens) == 40 for s in all_of_them)
    sched.schedule()
    assert regions.used == 0 and leases.held == 0


def test_random_loads_keep_every_region_single_owned_and_end_at_zero() -> None:
    rng = random.Random(7)
    for _ in range(30):
        leases = Leases(rng.choice([None, 2, 5]))
        prefixes = rng.choice([None, PrefixCache(12, 8)])
        budget = rng.choice([256, 700, 3000])
        sched, regions = scheduler(budget=budget, leases=leases, prefixes=prefixes)
        left = [sequence(str(i), rng.randint(1, 200), 256, rng.choice("ab")) for i in range(20)]
        everyone = list(left)
        for _ in range(5000):
            if left and rng.random() < 0.3:
                sched.add(left.pop())
            step = sched.schedule()
            owned = [s.region for s in sched.running]
            assert len(set(owned)) == len(owned) and None not in owned
            assert regions.reserved <= regions.budget
            for s in sched.running:
                assert s.region and s.computed <= regions.capacity(s.region)
            sample(step)
            for s in list(sched.running):
                if len(s.tokens) >= s.limit or rng.random() < 0.01:
                    sched.finish(s)
            if not left and not sched.running and not sched.waiting:
                break
        assert not sched.running and not sched.waiting
        assert all(s.region is None and s.slot is None for s in everyone)
        sched.schedule()
        assert regions.used == 0 and leases.held == 0


def test_an_idle_class_gives_its_room_to_another() -> None:
    regions = KVRegions(budget=256, smallest=16, longest=256, max_rows=8)
    small = [regions.allocate(10) for _ in range(3)]
    assert regions.allocate(200) is None
    for region in small:
        assert region
        regions.free(region)
    assert regions.allocate(200) == Region(4, 0)
    assert regions.allocate(1) is None
