"""Clusters of documents that pairs connect, by union-find over arrays.

In: pairs of document numbers. Out: for each document the lowest number of its cluster. The clusters are `parents`, an integer
for each document with `parents[i] <= i`, which leads towards the lowest number of i's cluster: so 4 bytes a document are
enough for 2^32 of them, and pairs may come in any order and in any batches.
"""

import numpy as np

from data_pipeline.signature_files import Array, Numbers


def connected_components(edges: Array, num_documents: int) -> Array:
    """For each document the lowest number that it is connected with: int64 [num_documents] from int64 [edges, 2]."""
    parents = np.arange(num_documents, dtype=np.int64)
    unite(parents, edges)
    find_roots(parents, np.arange(num_documents))
    return parents


def unite(parents: Array, edges: Array) -> None:
    """Connect the two documents of each edge, in place.

    All edges at once, round by round: each edge's ends become the roots above them, and the higher root is hung below the
    lowest one that it meets, until no edge's roots differ (in the manner of Shiloach and Vishkin 1982).
    """
    first, second = edges[:, 0], edges[:, 1]
    while len(first):
        first, second = find_roots(parents, first), find_roots(parents, second)
        differ = first != second
        first, second = np.minimum(first, second)[differ], np.maximum(first, second)[differ]
        np.minimum.at(parents, second, first)


def find_roots(parents: Array, documents: Array) -> Array:
    """The lowest known number of each document's cluster; the documents are then hung directly below it, in place."""
    found = parents[documents]
    while True:
        above = parents[found]
        if np.array_equal(above, found):
            parents[documents] = found
            return found
        parents[documents] = above  # so the next round's steps are twice as long
        found = parents[above]


def shorten(pairs: Numbers) -> Numbers:
    """Fewer pairs that connect the same documents: each with the lowest of its cluster, int64 [pairs, 2]."""
    documents, places = np.unique(pairs, return_inverse=True)
    lowest = connected_components(places.reshape(-1, 2), len(documents))
    others = np.flatnonzero(lowest != np.arange(len(documents)))
    return np.stack([documents[lowest[others]], documents[others]], axis=1)
