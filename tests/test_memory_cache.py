"""The cache of cores: bounded in bytes and number."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasb_runtime.adapters.memory_cache import MemoryCache
from lorasb_runtime.adapters.names import parse_name


@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 8))),
    st.integers(0, 100),
    st.integers(1, 5),
)
def test_it_keeps_to_its_limits_but_for_the_last_one(
    asked: list[tuple[str, int]], nbytes: int, count: int
) -> None:
    cache = MemoryCache(nbytes, count)
    for key, size in asked:
        kept = cache.get(key)
        put = cache.put(key, torch.zeros(size))
        assert kept is None or put is kept
        assert cache.get(key) is put
        assert len(cache) <= count
        assert cache.nbytes <= nbytes or len(cache) == 1


def test_the_least_recently_used_goes_first() -> None:
    cache = MemoryCache(1000, 2)
    first = cache.put("a", torch.zeros(1))
    cache.put("b", torch.zeros(1))
    assert cache.get("a") is first
    cache.put("c", torch.zeros(1))
    assert cache.get("a") is first
    assert cache.get("b") is None
    assert cache.nbytes == 8


def test_a_pinned_version_stays_until_another_takes_its_place() -> None:
    cache = MemoryCache(1000, 2)
    pinned = cache.put("a", torch.zeros(1))
    cache.pin(parse_name("gold"), "a")
    for key in "bcd":
        cache.put(key, torch.zeros(1))
    assert cache.get("a") is pinned and cache.get("d") is not None and len(cache) == 2
    cache.pin(parse_name("gold"), "d")
    cache.put("e", torch.zeros(1))
    assert cache.get("a") is None and cache.get("d") is not None


def test_what_is_dropped_goes_at_once_unless_it_is_pinned() -> None:
    cache = MemoryCache(1000)
    cache.put("a", torch.zeros(1))
    pinned = cache.put("b", torch.zeros(2))
    cache.pin(parse_name("gold"), "b")
    for version in ("a", "b", "missing", None):
        cache.drop(version)
    assert cache.get("a") is None and cache.get("b") is pinned
    assert cache.nbytes == pinned.nbytes
