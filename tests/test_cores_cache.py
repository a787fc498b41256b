"""The cache of cores: bounded in bytes and number, and each version made once."""

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasb_runtime.adapters.cores_cache import CoresCache


def of_size(numbers: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.zeros(numbers)


@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 8))),
    st.integers(0, 100),
    st.integers(0, 5),
)
def test_it_never_holds_more_than_it_may(
    asked: list[tuple[str, int]], nbytes: int, count: int
) -> None:
    cache = CoresCache(nbytes, count)
    for key, size in asked:
        cache.get(key, of_size(size))
        assert cache.nbytes <= nbytes and len(cache) <= count


def test_the_least_recently_used_goes_first() -> None:
    cache = CoresCache(1000, 2)
    first = cache.get("a", of_size(1))
    cache.get("b", of_size(1))
    assert cache.get("a", of_size(1)) is first
    cache.get("c", of_size(1))
    assert cache.get("a", of_size(1)) is first
    made = []
    cache.get("b", lambda: made.append(1) or torch.zeros(1))
    assert made


def test_callers_at_the_same_time_wait_for_one_making() -> None:
    cache = CoresCache(1000, 10)
    begun, go = threading.Event(), threading.Event()
    made, found = [], []

    def make() -> torch.Tensor:
        made.append(1)
        begun.set()
        assert go.wait(10)
        return torch.zeros(1)

    threads = [
        threading.Thread(target=lambda: found.append(cache.get("a", make))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    go.set()
    for thread in threads:
        thread.join(10)
    assert len(made) == 1 and len(found) == 8
    assert all(cores is found[0] for cores in found)


def test_a_failure_is_its_callers_own_and_not_kept() -> None:
    cache = CoresCache(1000, 10)

    def fail() -> torch.Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.get("a", fail)
    assert len(cache) == 0
    assert cache.get("a", of_size(3)).shape == (3,)
