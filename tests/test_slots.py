"""Slots: leases, reuse, eviction of the least recently used."""

import pytest
import torch

from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.adapters.slots import SlotTable
from lorasb_runtime.errors import InputError


def table(slots: int) -> SlotTable:
    return SlotTable(slots, 4, torch.float32, torch.device("cpu"))


def cores(value: float) -> torch.Tensor:
    return torch.full((4,), value)


def test_slot_zero_is_the_base_and_never_given_out() -> None:
    t = table(4)
    taken = {t.lease(f"v{i}", cores(i + 1)) for i in range(3)}
    assert taken == {1, 2, 3}
    assert not t.cores[0].any()


def test_one_version_has_one_slot_however_many_leases() -> None:
    t = table(3)
    first, second = t.lease("v", cores(1)), t.lease("v", cores(1))
    assert first == second and t.used == 1 and t.leased == 1
    assert first
    t.release(first)
    assert t.leased == 1
    t.release(first)
    assert t.leased == 0 and t.used == 1


def test_the_least_recently_used_idle_version_goes_first() -> None:
    t = table(3)
    a, b = t.lease("a", cores(1)), t.lease("b", cores(2))
    assert a and b
    t.release(b)
    t.release(a)
    assert t.lease("c", cores(3)) == b
    assert t.cores[b].tolist() == [3, 3, 3, 3]
    assert t.cores[a].tolist() == [1, 1, 1, 1]


def test_leased_versions_are_never_evicted() -> None:
    t = table(3)
    a, b = t.lease("a", cores(1)), t.lease("b", cores(2))
    assert t.lease("c", cores(3)) is None
    assert a and b
    t.release(b)
    assert t.lease("c", cores(3)) == b


def test_cores_are_scaled_and_rounded_once_on_their_way_in() -> None:
    t = SlotTable(2, 4, torch.bfloat16, torch.device("cpu"), scaling=1.1)
    slot = t.lease("v", torch.full((4,), 1 + 1.5 * 2.0**-8, dtype=torch.float64))
    assert slot
    exact = (1 + 1.5 * 2.0**-8) * 1.1
    assert abs(t.cores[slot, 0].item() - exact) <= 2.0**-8  # half of bfloat16's step at 1.1
    same = SlotTable(2, 4, torch.bfloat16, torch.device("cpu"), scaling=1.0)
    slot = same.lease("v", cores(3).bfloat16())
    assert slot and same.cores[slot].tolist() == [3, 3, 3, 3]


def test_a_table_without_room_for_an_adapter_is_refused() -> None:
    with pytest.raises(InputError, match="found 1, expected at least 2"):
        table(1)


def test_a_pinned_adapter_keeps_its_last_version_resident() -> None:
    name = parse_name("gold")
    t = SlotTable(4, 4, torch.float32, torch.device("cpu"), pins=frozenset([name]))
    first = t.lease("gold-1", cores(1), name)
    assert first
    t.release(first)
    for i in range(9):  # others come and go
        slot = t.lease(f"v{i}", cores(2))
        assert slot is not None and slot != first
        t.release(slot)
    assert t.lease("gold-1", cores(1), name) == first and t.fills[first] == 1
    second = t.lease("gold-2", cores(3), name)
    assert second is not None and second != first
    t.release(first)  # the old version's last lease: it may go now, the new one may not
    t.release(second)
    assert {t.lease("x", cores(4)), t.lease("y", cores(5))} == {1, 2, 3} - {second}
    assert t.lease("z", cores(6)) is None
    assert t.cores[second].tolist() == [3, 3, 3, 3]


def test_pins_leave_room_for_others() -> None:
    pins = frozenset(parse_name(f"p{i}") for i in range(3))
    with pytest.raises(InputError, match="found 4 for 3 pinned adapters, expected at least 5"):
        SlotTable(4, 4, torch.float32, torch.device("cpu"), pins=pins)
    SlotTable(5, 4, torch.float32, torch.device("cpu"), pins=pins)
