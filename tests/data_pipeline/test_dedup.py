"""Duplicates: what is dropped is what a slow and obvious search drops, however the documents are cut into units and tasks."""

import pickle
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from configs.data_section import DeduplicationSection, NearDuplicatesSection
from data_pipeline import dedup, signature_files
from data_pipeline.dedup import (
    EXACT_DUPLICATE,
    NEAR_DUPLICATE,
    Duplicates,
    are_marked,
    count_matches,
    exact_partition,
    find_duplicates,
    load_duplicates,
    mark_documents,
    near_partition,
    needed_matches,
)
from data_pipeline.minhash import NO_SHINGLES, band_hashes, signatures
from data_pipeline.signature_files import Survey, write_survey
from tests.data_pipeline.surveys import NEAR, Documents, make_documents, write_units

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass
class Limits:
    """The modules' constants that a test makes small."""

    DOCUMENTS_PER_TASK: int = 4_000_000
    MOST_SURVEYS: int = 64
    SURVEYS_PER_MERGE: int = 4096
    BLOCK_BYTES: int = 1 << 25
    ALL_PAIRS: int = 64
    MOST_CENTRES: int = 64


def run_anyhow(rng: random.Random) -> Any:
    """Runs tasks in another order, some of them twice, and after a journey."""

    def run(function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
        for task in rng.sample(list(tasks), len(tasks)):
            carried = pickle.loads(pickle.dumps((function, task)))
            if rng.random() < 0.3:
                carried[0](carried[1])
            yield task, carried[0](carried[1])

    return run


def numbers_by_reason(found: Duplicates, bounds: Sequence[int]) -> dict[int, list[int]]:
    result: dict[int, list[int]] = {EXACT_DUPLICATE: [], NEAR_DUPLICATE: []}
    for first, unit in zip(bounds, found.units, strict=False):
        assert unit.ordinals.dtype == np.uint32 and unit.reasons.dtype == np.uint8
        assert (np.diff(unit.ordinals.astype(np.int64)) > 0).all()
        for ordinal, reason in zip(unit.ordinals.tolist(), unit.reasons.tolist(), strict=True):
            result[reason].append(first + ordinal)
    return result


def search_slowly(documents: Documents, settings: DeduplicationSection, limits: Limits) -> tuple[dict[int, list[int]], list[int]]:
    """The definition of the module's docstring, in plain Python; and which document stays in place of each, as a near duplicate."""
    count = len(documents.hashes)
    seen: set[tuple[int, ...]] = set()
    exact: list[int] = []
    for number, content in enumerate(map(tuple, documents.hashes.tolist())):
        if settings.exact and content in seen:
            exact.append(number)
        seen.add(content)
    lowest = list(range(count))

    def connect(first: int, second: int) -> None:
        old, new = sorted((lowest[first], lowest[second]), reverse=True)
        lowest[:] = [new if label == old else label for label in lowest]

    if settings.near and count:
        rows = documents.signatures.tolist()

        def alike(first: int, second: int) -> bool:
            equal = sum(one == other for one, other in zip(rows[first], rows[second], strict=True))
            return equal / settings.near.num_permutations >= settings.near.similarity  # pyright: ignore[reportOptionalMemberAccess]

        for band in band_hashes(documents.signatures, settings.near.num_bands).T.tolist():
            buckets: dict[int, list[int]] = defaultdict(list)
            for number, key in enumerate(band):
                if number not in exact and rows[number] != [NO_SHINGLES] * len(rows[number]):
                    buckets[key].append(number)
            for bucket in buckets.values():
                centres = list(bucket) if len(bucket) <= limits.ALL_PAIRS else []
                for number in bucket:
                    if len(bucket) <= limits.ALL_PAIRS:
                        for other in bucket:
                            if alike(number, other):
                                connect(number, other)
                    elif joined := [centre for centre in centres if alike(centre, number)]:
                        connect(joined[0], number)
                    elif len(centres) < limits.MOST_CENTRES:
                        centres.append(number)
    return {EXACT_DUPLICATE: exact, NEAR_DUPLICATE: [number for number in range(count) if lowest[number] != number]}, lowest


def find(root: Path, documents: Documents, bounds: Sequence[int], settings: DeduplicationSection, rng: random.Random) -> Duplicates:
    folders = write_units(root, documents, bounds, settings.near)
    return find_duplicates(folders, settings, root / "work", run_anyhow(rng), lambda _step, _done, _total: None)


@hypothesis_settings(max_examples=40)
@given(
    st.integers(0, 2**32),
    st.integers(0, 40),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
    st.builds(
        Limits,
        DOCUMENTS_PER_TASK=st.sampled_from([1, 3, 10, 1000]),
        MOST_SURVEYS=st.sampled_from([0, 2, 64]),
        SURVEYS_PER_MERGE=st.sampled_from([1, 2, 100]),
        BLOCK_BYTES=st.sampled_from([1, 100, 1 << 20]),
        ALL_PAIRS=st.sampled_from([1, 2, 4, 64]),
        MOST_CENTRES=st.sampled_from([1, 2, 64]),
    ),
)
def test_it_finds_what_a_slow_search_finds(seed: int, count: int, kinds: int, exact: bool, near: bool, limits: Limits):
    rng = random.Random(seed)
    documents = make_documents(rng, count, kinds)
    bounds = [0, *sorted(rng.choices(range(count + 1), k=rng.randrange(6))), count]
    settings = DeduplicationSection(exact=exact, near=NEAR if near else None)
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        for name, value in vars(limits).items():
            patch.setattr(signature_files if name == "BLOCK_BYTES" else dedup, name, value)
        found = find(Path(root), documents, bounds, settings, rng)
        by_reason = numbers_by_reason(found, bounds)
        wanted, lowest = search_slowly(documents, settings, limits)
        assert by_reason == wanted
        assert found.counts.num_documents == count
        assert found.counts.num_exact_duplicates == len(by_reason[EXACT_DUPLICATE])
        assert found.counts.num_near_duplicates == len(by_reason[NEAR_DUPLICATE])
        for index, unit in enumerate(found.units):
            again = load_duplicates(Path(root) / "work", index)
            assert (again.ordinals.tolist(), again.reasons.tolist()) == (unit.ordinals.tolist(), unit.reasons.tolist())
            assert again.survivors.tolist() == [lowest[bounds[index] + ordinal] for ordinal in unit.ordinals.tolist()]
        left = {path.name for path in (Path(root) / "work").iterdir()}
        assert left - {dedup.LOSERS} == {dedup.ORDINALS, dedup.REASON_CODES, dedup.SURVIVORS, dedup.UNIT_BOUNDS}


def test_neither_units_nor_tasks_matter(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch):
    rng = random.Random(seed)
    documents = make_documents(rng, 3000, 400)
    settings = DeduplicationSection(near=NEAR)
    results = []
    for index, (units, per_task, most_surveys) in enumerate([(1, 10**6, 64), (2, 500, 64), (70, 1500, 64), (20, 1000, 64), (30, 700, 2)]):
        monkeypatch.setattr(dedup, "DOCUMENTS_PER_TASK", per_task)
        monkeypatch.setattr(dedup, "MOST_SURVEYS", most_surveys)
        bounds = [0, *sorted(rng.choices(range(3001), k=units - 1)), 3000]
        found = find(tmp_path / str(index), documents, bounds, settings, rng)
        results.append((numbers_by_reason(found, bounds), found.counts))
    assert results[0][0][EXACT_DUPLICATE] and results[0][0][NEAR_DUPLICATE]
    assert all(result == results[0] for result in results)


def test_parts_together_are_the_whole(tmp_path: Path, seed: int):
    documents = make_documents(random.Random(seed), 400, 30)
    folders = write_units(tmp_path, documents, [0, 100, 100, 250, 400], NEAR)
    whole = exact_partition(folders, 0, 1)
    parts = [exact_partition(folders, part, 7) for part in range(7)]
    assert sorted(np.concatenate([part.documents for part in parts]).tolist()) == whole.documents.tolist()
    assert sum(part.num_clusters for part in parts) == whole.num_clusters
    assert max(part.biggest_cluster for part in parts) == whole.biggest_cluster
    bits = np.zeros(50, dtype=np.uint8)
    mark_documents(bits, whole.documents)
    edges = near_partition(folders, 2, 0, 1, bits, NEAR)
    pieces = [near_partition(folders, 2, part, 3, bits, NEAR) for part in range(3)]
    assert sorted(map(tuple, np.concatenate([piece.pairs for piece in pieces]).tolist())) == sorted(map(tuple, edges.pairs.tolist()))
    assert sum(piece.num_compared for piece in pieces) == edges.num_compared > 0
    assert not np.isin(edges.pairs, whole.documents).any()


def test_real_texts_through_a_survey(tmp_path: Path, seed: int):
    rng = random.Random(seed)
    words = [f"word{number}" for number in range(5000)]
    base = [" ".join(rng.choices(words, k=300)) for _ in range(20)]
    near = [" ".join([*text.split()[:150], "changed", *text.split()[151:]]) for text in base[:5]]
    short = ["yes", "Yes!", "no", "...", "!!!"]
    texts = [*base, *near, *short, base[7], base[7], "yes"]
    settings = DeduplicationSection(near=NearDuplicatesSection())
    folders = []
    for index, (first, end) in enumerate([(0, 22), (22, 22), (22, len(texts))]):
        survey = Survey(settings)
        for place in range(first, end, 4):
            survey.add(texts[place : min(place + 4, end)])
        folders.append(tmp_path / str(index))
        folders[-1].mkdir()
        survey.write(folders[-1])
    steps: list[str] = []
    found = find_duplicates(
        folders, settings, tmp_path / "work", run_anyhow(rng), lambda step, done, total: steps.append(f"{step} {done}/{total}")
    )
    assert numbers_by_reason(found, [0, 22, 22]) == {EXACT_DUPLICATE: [30, 31, 32], NEAR_DUPLICATE: [20, 21, 22, 23, 24, 26]}
    assert steps[0] == "exact duplicates 1/1" and steps[-1] == "near duplicates 16/16" and len(steps) == 17
    counts = found.counts
    assert (counts.num_exact_clusters, counts.biggest_exact_cluster) == (2, 3)
    assert (counts.num_near_clusters, counts.biggest_near_cluster) == (6, 2)
    assert counts.num_compared > counts.num_refused >= 0


def test_no_units_and_empty_units(tmp_path: Path, seed: int):
    settings = DeduplicationSection(near=NEAR)
    nothing = Documents(np.zeros((0, 2), dtype=np.uint64), np.zeros((0, 8), dtype=np.uint32))
    for index, bounds in enumerate([[0], [0, 0], [0, 0, 0]]):
        found = find(tmp_path / str(index), nothing, bounds, settings, random.Random(seed))
        assert [len(unit.ordinals) for unit in found.units] == [0] * (len(bounds) - 1)
        assert found.counts.num_documents == found.counts.num_near_clusters == 0


def test_a_large_bucket_costs_a_bounded_number_of_comparisons(tmp_path: Path, seed: int):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 1 << 32, (20_000, 8), dtype=np.uint32)
    rows[:, :2] = 7  # one bucket of documents that are not alike
    rows[5000::100] = rows[0]
    rows[7001] = rows[7000 - 1]  # alike, but no centre is like them
    write_survey(tmp_path, rng.integers(0, 1 << 64, (20_000, 2), dtype=np.uint64), [rows], NEAR)
    edges = near_partition([tmp_path], 0, 0, 1, None, NEAR)
    assert edges.pairs.tolist() == [[0, number] for number in range(5000, 20_000, 100)]
    assert edges.num_compared <= dedup.MOST_CENTRES * 20_000
    assert edges.num_refused == edges.num_compared - 150


def test_bits(seed: int):
    rng = np.random.default_rng(seed)
    documents = np.unique(rng.integers(0, 1000, 300))
    bits = np.zeros(125, dtype=np.uint8)
    mark_documents(bits, documents)
    assert np.flatnonzero(are_marked(bits, np.arange(1000))).tolist() == documents.tolist()


@pytest.mark.parametrize(
    ("similarity", "permutations", "needed"), [(0.8, 128, 103), (1.0, 128, 128), (0.5, 8, 4), (0.07, 100, 7), (0.001, 8, 1)]
)
def test_needed_matches(similarity: float, permutations: int, needed: int):
    assert needed_matches(NearDuplicatesSection(similarity=similarity, num_permutations=permutations, num_bands=1)) == needed


def test_matches_are_counted(seed: int):
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 2, (2, 50, 300), dtype=np.uint32)
    assert count_matches(first, second).tolist() == (first == second).sum(axis=1).tolist()
    assert count_matches(first[:, None], second[None, :3]).shape == (50, 3)


def test_the_lowest_number_stays_also_across_units(tmp_path: Path):
    texts = ["same words " * 20, "else"]
    settings = DeduplicationSection(near=NearDuplicatesSection())
    assert settings.near is not None
    folders = [tmp_path / name for name in ("b", "a")]  # the order that is given counts, not that of the names
    for folder, order in zip(folders, ([0, 1], [1, 0]), strict=True):
        folder.mkdir()
        rows = signatures([texts[index] for index in order], settings.near)
        hashes = np.array([[index, index] for index in order], dtype=np.uint64)
        write_survey(folder, hashes, [rows], settings.near)
    found = find_duplicates(folders, settings, tmp_path / "work", run_anyhow(random.Random(1)), lambda *_: None)
    assert [unit.ordinals.tolist() for unit in found.units] == [[], [0, 1]]
