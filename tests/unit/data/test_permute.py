"""The computed shuffle: a bijection for every size, and as random as a shuffle."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2kit.data.permute import KeyedPermutation


@given(size=st.integers(1, 3_000), key=st.text(max_size=8))
@settings(max_examples=60, deadline=None)
def test_it_is_a_bijection(size: int, key: str) -> None:
    order = KeyedPermutation(size, key)
    assert sorted(order[i] for i in range(size)) == list(range(size))


def test_it_depends_on_size_and_key_only_and_has_bounds() -> None:
    one = KeyedPermutation(1_000, "a")
    again, other = KeyedPermutation(1_000, "a"), KeyedPermutation(1_000, "b")
    assert [one[i] for i in range(1_000)] == [again[i] for i in range(1_000)]
    assert sum(one[i] == other[i] for i in range(1_000)) < 20
    assert [one[i] for i in (0, 1, 999)] == [419, 348, 258], "runs could not be resumed"
    for outside in (-1, 1_000):
        with pytest.raises(IndexError):
            one[outside]


def test_huge_sizes_cost_nothing_and_do_not_collide() -> None:
    order = KeyedPermutation(10**15, "x")
    seen = {order[i] for i in range(20_000)}
    assert len(seen) == 20_000
    assert max(seen) < 10**15
    # The mean of n uniform draws on [0, 1) has standard deviation 1 / sqrt(12 n).
    assert abs(np.mean(list(seen)) / 10**15 - 0.5) < 5 / np.sqrt(12 * 20_000)


def test_every_item_comes_equally_often_at_every_place() -> None:
    size, keys = 12, 6_000
    counts = np.zeros((size, size))
    for key in range(keys):
        order = KeyedPermutation(size, str(key))
        for place in range(size):
            counts[place, order[place]] += 1
    expected = keys / size
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    # Mean ``freedom``, variance twice that; five standard deviations either way.
    assert abs(chi_squared - freedom) < 5 * np.sqrt(2 * freedom)


def test_all_orders_of_few_items_occur() -> None:
    orders = Counter(
        tuple(KeyedPermutation(4, str(key))[i] for i in range(4)) for key in range(4_800)
    )
    assert len(orders) == 24
    assert 100 < min(orders.values()) <= max(orders.values()) < 320


def test_neighbours_are_torn_apart() -> None:
    order = KeyedPermutation(10_000, "n")
    items = np.array([order[i] for i in range(10_000)])
    assert abs(np.corrcoef(items[:-1], items[1:])[0, 1]) < 0.05
    assert (np.abs(np.diff(items)) == 1).sum() < 20
