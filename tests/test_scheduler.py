"""The scheduler and the KV regions, with integers alone."""

import random

from lorasb_runtime.config import SchedulerConfig
from lorasb_runtime.engines.base import SamplingParams
from lorasb_runtime.engines.torch.kv_regions import KVRegions, Region
from lorasb_runtime.engines.torch.scheduler import Scheduler, Step
from lorasb_runtime.engines.torch.sequence import Sequence


def sequence(name: str, prompt: int, limit: int = 1000) -> Sequence:
    return Sequence(name, 0, list(range(prompt)), prompt, limit, SamplingParams(), 0)


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
    budget: int = 4096, leases: Leases | None = None, **limits: int
) -> tuple[Scheduler, KVRegions]:
    config = SchedulerConfig(**{"max_num_seqs": 8, "max_batched_tokens": 64, **limits})
    regions = KVRegions(budget, 16, min(256, budget), config.max_num_seqs)
    leases = leases or Leases()
    return Scheduler(config, regions, leases.lease, leases.release), regions


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
        sched, regions = scheduler(budget=rng.choice([256, 700, 3000]), leases=leases)
        left = [sequence(str(i), rng.randint(1, 200), 256) for i in range(20)]
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
