"""A cache with a bound in bytes."""

from data.bounded_cache import BoundedCache


def test_the_least_recently_used_go_first_and_memory_has_a_bound():
    cache = BoundedCache[bytes](1000, 10, len)
    for name in ("a", "b", "c"):
        cache.put(name, bytes(300))
    assert cache.get("a") == bytes(300)  # now b was used least recently
    cache.put("d", bytes(300))
    assert cache.get("b") is None and cache.get("a") and cache.get("c") and cache.get("d")
    for number in range(100):
        cache.put(f"{number}", bytes(200))
        assert cache.num_bytes <= 1000
    cache.put("99", bytes(200))  # twice is once
    assert cache.num_bytes == 4 * (200 + 8)


def test_what_is_full_stays_as_it_is_where_keys_come_in_turn():
    cache = BoundedCache[bytes](1000, 0, len, drops=False)
    for epoch in range(2):
        for number in range(10):
            assert (cache.get(number) is not None) == (epoch == 1 and number < 3)
            cache.put(number, bytes(300))
    assert cache.num_bytes == 3 * (300 + 8)


def test_what_is_long_is_not_kept():
    cache = BoundedCache[bytes](1000, 10, len)
    cache.put("a" * 11, b"x")
    cache.put("large", bytes(2000))
    assert cache.get("a" * 11) is None and cache.get("large") is None and cache.num_bytes == 0
