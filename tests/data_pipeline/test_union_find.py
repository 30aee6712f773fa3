"""Clusters are those of a slow search, in whatever batches and shapes the pairs come."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.union_find import connected_components, find_roots, shorten, unite


@given(st.integers(1, 60), st.integers(0, 80), st.integers(0, 2**32), st.integers(1, 4))
def test_components_are_those_of_a_search(count: int, num_edges: int, seed: int, batches: int):
    rng = np.random.default_rng(seed)
    edges = rng.integers(0, count, (num_edges, 2))
    lowest = list(range(count))
    for first, second in edges.tolist():
        old, new = sorted((lowest[first], lowest[second]), reverse=True)
        lowest = [new if label == old else label for label in lowest]
    assert connected_components(edges, count).tolist() == lowest
    parents = np.arange(count, dtype=np.uint32)
    for batch in np.array_split(edges, batches):
        unite(parents, batch)
    assert find_roots(parents, np.arange(count)).tolist() == lowest


@pytest.mark.parametrize("shape", ["path", "shuffled path", "star", "upside-down star"])
def test_components_of_long_shapes_are_fast(seed: int, shape: str):
    rng = np.random.default_rng(seed)
    names = rng.permutation(200_000) if shape == "shuffled path" else np.arange(200_000)
    first = {"star": np.zeros(199_999, dtype=np.int64), "upside-down star": np.full(199_999, 199_999)}.get(shape, names[:-1])
    second = names[:-1] if shape == "upside-down star" else names[1:]
    assert not connected_components(np.stack([first, second], axis=1), 200_000).any()


@given(st.integers(1, 60), st.integers(0, 80), st.integers(0, 2**32))
def test_fewer_pairs_connect_the_same(count: int, num_pairs: int, seed: int):
    rng = np.random.default_rng(seed)
    numbers = np.sort(rng.choice(10**12, count, replace=False))
    edges = rng.integers(0, count, (num_pairs, 2))
    fewer = shorten(numbers[edges])
    labels = connected_components(edges, count)
    assert connected_components(np.searchsorted(numbers, fewer), count).tolist() == labels.tolist()
    assert len(fewer) == count - len(np.unique(labels)) and (fewer[:, 0] < fewer[:, 1]).all()
