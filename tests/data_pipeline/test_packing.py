"""Packs are those of a slow best fit and hold every token once, for documents of all lengths; and what is read was written."""

import time
from itertools import accumulate, combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from configs.errors import UserError
from data_pipeline.packing import Packs, count_best_fit, count_chopped, pack_documents, packs_name, read_packs, write_packs

documents_and_length = st.tuples(st.lists(st.integers(0, 70), max_size=80), st.integers(1, 40))


def starts_of(lengths):
    return np.array([0, *accumulate(lengths)], dtype=np.int64)


def realistic_starts(seed: int, num_documents: int, mean_tokens: float):
    """Lengths as of web pages: log-normal, most far shorter than the mean."""
    lengths = np.random.default_rng(seed).lognormal(np.log(mean_tokens) - 0.72, 1.2, num_documents)
    return starts_of(np.maximum(1, lengths).astype(int).tolist())


def cut_slowly(starts, length: int) -> list[tuple[int, int]]:
    """Pieces (first_token, num_tokens) in the order of the shard."""
    return [(first, min(length, end - first)) for start, end in pairwise(starts.tolist()) for first in range(start, end, length)]


def best_fit_slowly(starts, length: int) -> list[list[tuple[int, int]]]:
    """As it is defined: for each piece a look at every pack."""
    packs: list[list[tuple[int, int]]] = []
    room: list[int] = []
    for piece in sorted(cut_slowly(starts, length), key=lambda piece: (-piece[1], piece[0])):
        fitting = [number for number in range(len(packs)) if room[number] >= piece[1]]
        if fitting:
            number = min(fitting, key=lambda number: room[number])
        else:
            number = len(packs)
            packs.append([])
            room.append(length)
        packs[number].append(piece)
        room[number] -= piece[1]
    return [sorted(pack) for pack in packs]


def num_packs_of_first_fit(starts, length: int) -> int:
    """In the order of the shard, each piece into the first pack that holds it."""
    room: list[int] = []
    for _, num_tokens in cut_slowly(starts, length):
        number = next((number for number, left in enumerate(room) if left >= num_tokens), len(room))
        if number == len(room):
            room.append(length)
        room[number] -= num_tokens
    return len(room)


def as_lists(packs: Packs) -> list[list[tuple[int, int]]]:
    pieces = list(zip(packs.first_token.tolist(), packs.num_tokens.tolist(), strict=True))
    return [pieces[first:end] for first, end in pairwise(packs.pack_starts.tolist())]


@given(documents_and_length)
@example(([], 8))
@example(([0, 0, 0], 8))
@example(([1] * 20, 8))
@example(([8] * 5, 8))
@example(([9, 24, 17, 80], 8))
@example(([3, 0, 1, 12], 1))
@example(([4, 3, 3, 2, 2, 2], 8))
def test_packs_are_those_of_a_slow_best_fit(given_documents):
    lengths, length = given_documents
    packs = pack_documents(starts_of(lengths), length)
    assert as_lists(packs) == best_fit_slowly(starts_of(lengths), length)
    assert packs.length == length and packs.num_packs == len(as_lists(packs))
    assert {column.dtype for column in packs[1:]} == {np.dtype(np.int64)}


@pytest.mark.parametrize("length", [64, 500, 2048])
def test_packs_of_a_shard_are_those_of_a_slow_best_fit(seed: int, length: int):
    starts = realistic_starts(seed, 1500, 200)
    assert as_lists(pack_documents(starts, length)) == best_fit_slowly(starts, length)


@given(documents_and_length)
def test_every_token_is_in_one_piece_and_no_pack_is_beyond_its_room(given_documents):
    lengths, length = given_documents
    packs = pack_documents(starts_of(lengths), length)
    places = [place for pack in as_lists(packs) for first, count in pack for place in range(first, first + count)]
    assert sorted(places) == list(range(sum(lengths)))
    filled = [sum(count for _, count in pack) for pack in as_lists(packs)]
    assert all(1 <= tokens <= length for tokens in filled)
    # What was put into the later one of two packs did not fit into the earlier one.
    assert all(one + other > length for one, other in combinations(filled, 2))


@given(documents_and_length)
def test_documents_are_cut_only_where_they_are_longer_than_a_pack(given_documents):
    lengths, length = given_documents
    starts = starts_of(lengths)
    packs = pack_documents(starts, length)
    counts = count_best_fit(packs, starts)
    assert counts.documents == len(lengths) and counts.num_packs == packs.num_packs
    assert counts.documents_cut == sum(document > length for document in lengths)
    assert counts.padding_tokens == packs.num_packs * length - sum(lengths)
    # A piece ends where its document does, or is full.
    ends = (packs.first_token + packs.num_tokens).tolist()
    assert all(end in starts or count == length for end, count in zip(ends, packs.num_tokens.tolist(), strict=True))


@given(documents_and_length)
def test_chopped_documents_are_those_with_tokens_in_two_samples(given_documents):
    lengths, length = given_documents
    starts = starts_of(lengths)
    samples = [{token // length for token in range(first, end)} for first, end in pairwise(starts.tolist())]
    counts = count_chopped(starts, length)
    assert counts == (len(set().union(*samples)), len(lengths), sum(len(touched) > 1 for touched in samples), 0)


def test_an_example_by_hand():
    """T = 8: 20 tokens are 8 + 8 + 4; 7 stays alone; the 4 is topped up by 3, and the last 1 fits best beside 7."""
    starts = starts_of([20, 3, 7, 1])
    packs = pack_documents(starts, 8)
    assert as_lists(packs) == [[(0, 8)], [(8, 8)], [(23, 7), (30, 1)], [(16, 4), (20, 3)]]
    assert count_best_fit(packs, starts) == (4, 4, 1, 1)
    assert count_chopped(starts, 8) == (4, 4, 2, 0)  # the 20 tokens, and the 7: tokens 23 to 29


@pytest.mark.parametrize("length", [256, 2048])
def test_there_is_less_padding_than_by_first_fit(seed: int, length: int):
    """Not a law (there are shards made for the contrary), but so by far for documents as they come."""
    starts = realistic_starts(seed, 2000, 400)
    counts = count_best_fit(pack_documents(starts, length), starts)
    assert counts.num_packs <= num_packs_of_first_fit(starts, length)
    assert counts.documents_cut < count_chopped(starts, length).documents_cut


def test_a_length_below_1_is_refused():
    with pytest.raises(ValueError, match="packs of 0 tokens; wanted at least 1"):
        pack_documents(starts_of([3]), 0)


@pytest.mark.parametrize("length", [2048, 131072])
def test_a_shard_is_packed_in_a_moment(seed: int, length: int):
    """0.03 to 0.08 s of a processor; thirty times that is a defect on the slowest."""
    starts = realistic_starts(seed, 60_000, 500)
    began = time.process_time()
    packs = pack_documents(starts, length)
    assert time.process_time() - began < 2.5
    assert count_best_fit(packs, starts).padding_tokens < 0.01 * starts[-1]


@given(documents_and_length)
def test_what_is_written_is_read(tmp_path_factory, given_documents):
    lengths, length = given_documents
    packs = pack_documents(starts_of(lengths), length)
    path = Path(packs_name(tmp_path_factory.mktemp("packs") / "shard-00000", length))
    assert path.name == f"shard-00000.packed-{length}.npy"
    write_packs(path, packs)
    found = read_packs(path)
    assert found.length == length and as_lists(found) == as_lists(packs)
    assert {column.dtype for column in found[1:]} == {np.dtype(np.int64)} and not found.first_token.flags.writeable


def test_the_file_is_one_that_numpy_would_write(tmp_path):
    path = tmp_path / "packs.npy"
    packs = pack_documents(starts_of([20, 3, 7, 1]), 8)
    write_packs(path, packs)
    values = [8, 4, 0, 1, 2, 4, 6, 0, 8, 23, 30, 16, 20, 8, 8, 7, 1, 4, 3]
    assert np.load(path).tolist() == values
    np.save(tmp_path / "other.npy", np.array(values, dtype="<i8"))
    assert path.read_bytes() == (tmp_path / "other.npy").read_bytes()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"packs.npy: no such file; .* beside a packed shard"):
        read_packs(tmp_path / "packs.npy")


def test_a_file_that_is_cut_or_longer_or_has_another_header_is_refused(tmp_path):
    path = tmp_path / "packs.npy"
    write_packs(path, pack_documents(starts_of([20, 3, 7, 1]), 8))
    whole = path.read_bytes()
    cut = [whole[:size] for size in range(len(whole))]
    flipped = [whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :] for place in range(128) for bit in range(8)]
    for content in [*cut, *flipped, whole + b"\0", whole + bytes(8), whole + bytes(16)]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"packs.npy: found \d+ bytes with another beginning .* `pretrain data verify`"):
            read_packs(path)


@pytest.mark.parametrize(
    ("place", "value"),
    [(0, 0), (0, -8), (1, -1), (1, -4), (1, 3), (1, 5), (1, 6), (1, 18), (1, 2**62), (1, -(2**63)), (2, 1), (6, 5), (6, -6)],
)
def test_numbers_that_contradict_the_size_are_refused(tmp_path, place: int, value: int):
    values = np.array([8, 4, 0, 1, 2, 4, 6, 0, 8, 23, 30, 16, 20, 8, 8, 7, 1, 4, 3])
    values[place] = value
    np.save(tmp_path / "packs.npy", values)
    with pytest.raises(UserError, match="packs.npy: its 19 numbers cannot be"):
        read_packs(tmp_path / "packs.npy")


def test_another_array_is_refused(tmp_path):
    for array in (np.arange(19.0), np.arange(19).reshape(1, 19), np.arange(19, dtype=np.uint64), np.arange(2), np.array(5)):
        np.save(tmp_path / "packs.npy", array)
        with pytest.raises(UserError, match="packs.npy"):
            read_packs(tmp_path / "packs.npy")
