"""The order of the data: every sample of every source once per epoch, pure, and known by a hash that misses nothing it should see."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from configs.schema import BatchSection, MixtureSection, StageSection, TrainingSection
from pretrain.data.order import DataOrder, Places, Skipped, SourceSize

SOURCES = (
    SourceSize("web", (50,), ("w" * 64,)),
    SourceSize("code", (20,), ("c" * 64,)),
    SourceSize("books", (3, 0, 4, 0), ("b" * 64,) * 4),  # as of data that arrived in parts
    SourceSize("math", (11,), ("m" * 64,)),
)
STEP = 32  # tokens of one: 4 samples of 8
STAGES: tuple[dict[str, Any], ...] = (
    {"weights": {"web": 3.0, "code": 1.0}},
    {"from_tokens": 64 * STEP, "weights": {"web": 1.0, "code": 2.0, "books": 0.5}},
    {"from_tokens": 100 * STEP, "weights": {"web": 5.0, "math": 1.0}, "sequence_length": 4},
    {"from_tokens": 150 * STEP, "epochs": {"code": 3.0, "books": 1.0, "math": 0.5}},
)


def training(**changes: Any) -> TrainingSection:
    return TrainingSection(**{"sequence_length": 8, "global_batch_samples": 4, "micro_batch_samples": 1, "total_tokens": 10**6} | changes)


def order_of(
    stages: Sequence[dict[str, Any]] = STAGES,
    sources: Sequence[SourceSize] = SOURCES,
    seed: int = 5,
    skipped: Skipped = (),
    **changes: Any,
) -> DataOrder:
    return DataOrder(sources, MixtureSection(stages=tuple(StageSection(**stage) for stage in stages)), training(**changes), seed, skipped)


def rows_of(order: DataOrder, places: Places) -> list[tuple[str, int, int]]:
    return [(order.sources[source].name, epoch, sample) for source, epoch, sample in np.stack(places, axis=1).tolist()]


def everything(order: DataOrder, num_samples: int) -> list[tuple[str, int, int]]:
    return rows_of(order, order.places(np.arange(num_samples)))


# --- samples ----------------------------------------------------------------------------------------------


def test_every_sample_of_every_source_comes_once_per_epoch_over_all_stages(seed: int) -> None:
    """Stages change weights, add a source, drop it and take it up again; nobody's epoch is torn."""
    order = order_of(seed=seed)
    seen: dict[str, list[tuple[int, int]]] = {}
    for name, epoch, sample in everything(order, 3000):
        seen.setdefault(name, []).append((epoch, sample))
    assert all(len(seen[source.name]) >= 3 * source.num_samples for source in SOURCES), "each should be seen for several epochs"
    for source in SOURCES:
        pairs = seen[source.name]
        assert [epoch for epoch, _ in pairs] == [number // source.num_samples for number in range(len(pairs))]
        for start in range(0, len(pairs), source.num_samples):
            samples = [sample for _, sample in pairs[start : start + source.num_samples]]
            assert len(set(samples)) == len(samples)
            assert sorted(samples) == list(range(source.num_samples)) or start + source.num_samples > len(pairs)
    web = [[sample for epoch, sample in seen["web"] if epoch == number] for number in range(2)]
    assert web[0] != web[1] and web[0] != sorted(web[0])


def test_parts_that_are_shuffled_on_their_own_come_one_after_the_other(seed: int) -> None:
    source = SourceSize("web", (300, 0, 1, 500, 0), ("w",) * 5)
    order = order_of([{}], [source], seed)
    samples = [sample for *_, sample in everything(order, 3 * 801)]
    for epoch in range(3):
        within = samples[epoch * 801 : (epoch + 1) * 801]
        for start, end in ((0, 300), (300, 301), (301, 801)):
            assert sorted(within[start:end]) == list(range(start, end))
        assert within[:300] != list(range(300))


@pytest.mark.parametrize("size", [1, 3, 50, 70_000])
def test_pure_from_any_start_in_any_portions(seed: int, size: int) -> None:
    chosen = random.Random(seed)
    sources = [SourceSize("a", (size,), ("",)), SourceSize("b", (2 * size + 1,), ("",))]
    stages = [{}, {"from_tokens": 50 * STEP, "weights": {"a": 1.0, "b": 3.0}}]
    whole = np.stack(order_of(stages, sources, seed).places(np.arange(2000)))
    order = order_of(stages, sources, seed)
    for _ in range(40):
        first = chosen.randint(0, 2000)
        end = chosen.randint(first, min(2000, first + 500))
        np.testing.assert_array_equal(np.stack(order.places(np.arange(first, end))), whole[:, first:end])
    far = 10**12  # the millionth epoch costs as much as the first
    found = order.places(np.arange(far, far + 9))
    np.testing.assert_array_equal(np.stack(order.places(np.arange(far + 4, far + 9))), np.stack(found)[:, 4:])
    assert found.epoch_n.min() > 10**6


def test_sources_of_a_million_million_samples(seed: int) -> None:
    """Cursors, places and the way back at the largest sizes there are, in the middle and across the end of an epoch."""
    sizes = {"a": 10**12, "b": 10**12 // 3, "c": 5}
    sources = [SourceSize(name, (size,), ("",)) for name, size in sizes.items()]
    order = order_of([{}], sources, seed)
    for first in (0, 10**12 + seed, sum(sizes.values()) - 500):
        names = everything(order, 0) + rows_of(order, order.places(np.arange(first, first + 1000)))
        assert len(set(names)) == 1000
        for number in range(0, 1000, 37):
            assert order.find(names[number][0], names[number][2], names[number][1]) == first + number
    assert order.epochs(3 * sum(sizes.values())) == {"a": 3.0, "b": 3.0, "c": 3.0}


def test_places_of_numbers_that_are_not_consecutive(seed: int) -> None:
    order = order_of(seed=seed)
    whole = np.stack(order.places(np.arange(3000)))
    chosen = np.random.default_rng(seed)
    for size in (0, 1, 2, 10, 300, 2999):
        numbers = np.sort(chosen.choice(3000, size, replace=False))
        found = order.places(numbers)
        assert all(column.dtype == np.int64 for column in found)
        np.testing.assert_array_equal(np.stack(found), whole[:, numbers])


def test_find_is_the_inverse_of_places(seed: int) -> None:
    order = order_of(seed=seed)
    rows = everything(order, 2000)
    for number, (name, epoch, sample) in enumerate(rows):
        assert order.find(name, sample, epoch) == number
    assert "web" not in {name for name, *_ in rows[600:]}
    behind = order.epochs(2000)["web"]
    assert order.find("web", 7, int(behind) + 2) is None, "no stage comes to it"


def test_epochs_count_what_was_seen(seed: int) -> None:
    order = order_of(seed=seed)
    rows = everything(order, 2000)
    for end in (0, 1, 255, 400, 602, 2000):
        expected = {source.name: sum(name == source.name for name, *_ in rows[:end]) / source.num_samples for source in SOURCES}
        assert order.epochs(end) == expected


def test_a_source_without_a_whole_sample_rests() -> None:
    order = order_of([{}], [*SOURCES[:2], SourceSize("tiny", (0,), ("t",))])
    assert order.epochs(140) == {"web": 2.0, "code": 2.0, "tiny": 0.0}
    assert {name for name, *_ in everything(order, 140)} == {"web", "code"}


def test_another_seed_another_epoch_and_another_source_are_shuffled_otherwise() -> None:
    sources = [SourceSize("a", (1000,), ("",)), SourceSize("b", (1000,), ("",))]
    one, other = (np.array([row[2] for row in everything(order_of([{}], sources, seed), 4000)]) for seed in (1, 2))
    orders = [one[:2000:2], one[1:2000:2], one[2000::2], one[2001::2], other[:2000:2]]
    for number, left in enumerate(orders):
        for right in orders[:number]:
            assert (left == right).sum() < 30  # one on average


def test_no_release_changes_the_order_of_a_running_training() -> None:
    """If this fails, runs that were started before would read other data after a resume. Do not change the numbers."""
    places = order_of(seed=1234).places(np.array([0, 1, 2, 255, 256, 257, 399, 400, 599, 600, 10**9]))
    assert np.stack(places).tolist() == [
        [0, 0, 1, 0, 1, 0, 2, 0, 0, 1, 1],
        [0, 0, 0, 3, 3, 3, 2, 4, 7, 7, 41095873],
        [28, 20, 0, 2, 18, 16, 6, 43, 16, 9, 11],
    ]


# --- skipped on purpose -----------------------------------------------------------------------------------


def test_skipped_ranges_are_left_out_and_nothing_else(seed: int) -> None:
    chosen = random.Random(seed)
    cuts = sorted(chosen.sample(range(1, 2000), 8))
    for skipped in ((), ((0, 3),), ((5, 6),), tuple(zip(cuts[::2], cuts[1::2], strict=True))):
        order = order_of(seed=seed).skipping(skipped)
        assert order.skipped == skipped
        left_out = {number for first, end in skipped for number in range(first, end)}
        expected = [number for number in range(3000) if number not in left_out]
        found = order.numbers(0, len(expected))
        assert found.dtype == np.int64
        assert found.tolist() == expected
        for _ in range(20):
            seen = chosen.randrange(len(expected))
            assert order.numbers(seen, 50).tolist()[: len(expected) - seen] == expected[seen : seen + 50]
        assert [order.seen_before(number) for number in expected] == list(range(len(expected)))
        assert {order.seen_before(number) for number in left_out} <= {None}
        np.testing.assert_array_equal(np.stack(order.places(found)), np.stack(order_of(seed=seed).places(found)))


# --- identity ---------------------------------------------------------------------------------------------

SEEN = 100 * 4 + 1  # one sample into the third stage


def edit(number: int, **changes: Any) -> list[dict[str, Any]]:
    return [stage | changes if index == number else stage for index, stage in enumerate(STAGES)]


FUTURE: dict[str, list[dict[str, Any]]] = {
    "other weights": edit(3, epochs={"web": 1.0}),
    "weights instead of epochs": [*STAGES[:3], {"from_tokens": 150 * STEP, "weights": {"math": 1.0}}],
    "later": edit(3, from_tokens=151 * STEP),
    "as early as can be": edit(3, from_tokens=101 * STEP),
    "shorter sequences": edit(3, sequence_length=2),
    "removed": list(STAGES[:3]),
    "one more before it": [*STAGES[:3], {"from_tokens": 120 * STEP}, STAGES[3]],
    "one more behind it": [*STAGES, {"from_tokens": 10**5}],
}
SAME: dict[str, list[dict[str, Any]]] = {
    "the scale of weights": edit(0, weights={"web": 75.0, "code": 25.0}),
    "the order in which weights are written": edit(0, weights={"code": 1.0, "web": 3.0}),
    "a beginning inside the same step": edit(1, from_tokens=64 * STEP - 31),
}
PASSED: dict[str, list[dict[str, Any]]] = {
    "weights of the first stage": edit(0, weights={"web": 3.0, "code": 1.001}),
    "weights of the second stage": edit(1, weights={"web": 1.0, "code": 2.0, "books": 0.25}),
    "weights of the stage it is in": edit(2, weights={"web": 1.0, "math": 1.0}),
    "a source more": edit(1, weights={"web": 1.0, "code": 2.0, "books": 0.5, "math": 1.0}),
    "a source fewer": edit(1, weights={"web": 1.0, "code": 2.0}),
    "weights left out": [{}, *STAGES[1:]],
    "a passed beginning": edit(1, from_tokens=65 * STEP),
    "the beginning of the stage it is in": edit(2, from_tokens=99 * STEP),
    "the stage it is in begins later": edit(2, from_tokens=101 * STEP),
    "sequences of a passed stage": edit(0, sequence_length=4),
    "sequences of the stage it is in": edit(2, sequence_length=8),
    "the stage it is in is removed": [*STAGES[:2], STAGES[3]],
    "a passed stage is removed": [STAGES[0], *STAGES[2:]],
    "a stage more in the past": [STAGES[0], {"from_tokens": 32 * STEP, "weights": {"web": 1.0}}, *STAGES[1:]],
}


@pytest.mark.parametrize("name", FUTURE)
def test_stages_to_come_may_be_edited(name: str) -> None:
    order = order_of()
    edited = order_of(FUTURE[name])
    assert edited.identity(SEEN) == order.identity(SEEN)
    assert everything(edited, 101 * 4) == everything(order, 101 * 4)
    assert edited.identity(10**6) != order.identity(10**6), "once it has begun, it counts"


@pytest.mark.parametrize("name", SAME)
def test_what_changes_no_sample_may_be_edited_at_any_time(name: str) -> None:
    assert order_of(SAME[name]).identity(10**6) == order_of().identity(10**6)
    assert everything(order_of(SAME[name]), 1000) == everything(order_of(), 1000)


@pytest.mark.parametrize("name", PASSED)
def test_what_has_been_passed_may_not_be_edited(name: str) -> None:
    identity, edited = order_of().identity(SEEN), order_of(PASSED[name]).identity(SEEN)
    assert identity["mixture"] != edited["mixture"]
    sources = {key: value for key, value in identity.items() if key != "mixture"}
    cursors = order_of().mixture.cursors(SEEN)
    assert sources == {f"source {source.name}": source.identity(cursors[source.name]) for source in SOURCES if cursors[source.name]}


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 6},
        {"sequence_length": 16},
        {"global_batch_samples": 8},
        {"packing": "best_fit"},
        {"skipped": ((4, 8),)},
        {"sources": SOURCES[::-1]},
    ],
    ids=str,
)
def test_what_else_decides_a_sample_is_part_of_the_identity(changes: dict[str, Any]) -> None:
    assert order_of(**changes).identity(SEEN)["mixture"] != order_of().identity(SEEN)["mixture"]


def test_without_a_ramp_the_identity_is_that_of_older_checkpoints() -> None:
    """What a version that knew no ramp has hashed, written out."""
    order = order_of()
    stages = [stage.facts([one.name for one in SOURCES]) for stage in order.mixture.stages if stage.first_sample < SEEN]
    facts = [5, 8, 4, "chop", [], *stages]
    assert order.identity(SEEN)["mixture"] == hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def test_a_ramp_is_held_as_far_as_it_has_begun() -> None:
    """Of one source, as stages begin elsewhere with another ramp. The first size is seen from sample 0 to 16, the second up to 32."""

    def identity(seen: int, *ramp: tuple[int, int]) -> str:
        sections = tuple(BatchSection(until_tokens=until_tokens, global_batch_samples=size) for until_tokens, size in ramp)
        return order_of([{}], batch_ramp=sections).identity(seen)["mixture"]

    ramp = (16 * 8, 1), (32 * 8, 2)
    others = [((16 * 8, 2), (32 * 8, 3)), ((16 * 8, 1), (32 * 8, 3)), ((16 * 8, 1), (34 * 8, 2)), ((16 * 8, 1),), ()]
    for seen, same in ((0, others[:-1]), (1, others[1:-1]), (16, others[1:-1]), (17, others[2:3]), (32, others[2:3]), (33, [])):
        for other in others:
            assert (identity(seen, *ramp) == identity(seen, *other)) == (other in same), (seen, other)
    assert identity(17, *ramp) == identity(17, (15 * 8 + 1, 1), (31 * 8, 2)), "rounded up to the same steps"


def test_a_stage_counts_from_its_first_sample_on() -> None:
    """At the very end of the stage before, the next may still be another."""
    for edited in (edit(2, weights={"math": 1.0}), edit(2, from_tokens=110 * STEP), [*STAGES[:2], STAGES[3]]):
        assert order_of(edited).identity(400) == order_of().identity(400)
        assert order_of(edited).identity(401) != order_of().identity(401)
    for edited in (edit(0, weights={"math": 1.0}), edit(0, epochs={"web": 1.0, "code": 1.0}, weights=None)):
        assert order_of(edited).identity(0) == order_of().identity(0)
        assert order_of(edited).identity(1) != order_of().identity(1)


def test_what_was_skipped_has_been_passed_too() -> None:
    """After a jump into the third stage, that stage is held although nothing of it was seen."""
    jumped = order_of(skipped=((300, 500),))
    assert jumped.numbers(299, 2).tolist() == [299, 500]
    edited = order_of(edit(2, weights={"math": 1.0}), skipped=((300, 500),))
    assert edited.identity(299) == jumped.identity(299)
    assert edited.identity(300) != jumped.identity(300)


@pytest.mark.parametrize("name", ["web", "code", "books", "math"])
def test_the_content_of_a_source_counts_once_it_is_used(name: str) -> None:
    changed = [replace(one, identities=("x",) * len(one.segments)) if one.name == name else one for one in SOURCES]
    for seen in (0, 1, 2, 3, 256, 257, 300, 400, 401, 450, 10**6):
        before, after = order_of().identity(seen), order_of(sources=changed).identity(seen)
        differing = {key for key in before | after if before.get(key) != after.get(key)}
        assert differing == ({f"source {name}"} if order_of().mixture.cursors(seen)[name] else set())


def test_of_a_source_in_parts_only_those_that_were_begun_count() -> None:
    source = SourceSize("web", (3, 0, 4, 5), ("a", "b", "c", "d"), arrives=True)
    for cursor, begun in ((0, 0), (1, 1), (3, 1), (4, 3), (7, 3), (8, 4), (100, 4)):
        for number in range(4):
            for changes in (
                {"identities": tuple("x" if place == number else one for place, one in enumerate(source.identities))},
                {"segments": tuple(9 if place == number else one for place, one in enumerate(source.segments))},
            ):
                counts = number < begun or ("segments" in changes and number < begun)
                assert (replace(source, **changes).identity(cursor) != source.identity(cursor)) == counts, (cursor, number, changes)
    assert replace(source, arrives=False).identity(5) != source.identity(5)


def test_sources_that_are_not_used_may_come_go_and_change_place() -> None:
    more = SourceSize("aaa", (999,), ("a",))
    for sources in ((more, *SOURCES), (*SOURCES, more), (SOURCES[0], more, *SOURCES[1:])):
        assert order_of(sources=sources).identity(10**6) == order_of().identity(10**6)
        assert everything(order_of(sources=sources), 1000) == everything(order_of(), 1000)
    without_math = order_of(STAGES[:2], [SOURCES[3], *SOURCES[:3]])
    assert without_math.identity(400) == order_of().identity(400)
    assert everything(without_math, 400) == everything(order_of(), 400)


def test_equal_identities_mean_equal_samples_and_cursors(seed: int) -> None:
    """Random small configurations and edits of them: who is let through has seen the same and goes on at the same places."""
    chosen = random.Random(seed)

    def draw_stage(begin: int) -> dict[str, Any]:
        share = chosen.choice([{}, {"a": 1.0, "b": 1.0}, {"a": 1.0}, {"b": 2.0, "a": 2.0}])
        stage = {"from_tokens": begin * STEP, "sequence_length": chosen.choice([None, None, 4])}
        return stage | ({chosen.choice(["weights", "epochs"]): share} if share else {})

    def draw() -> dict[str, Any]:
        sources = [
            SourceSize("a", (6,), (chosen.choice("xxy"),)),
            SourceSize("b", (6,), ("x",)),
            SourceSize("c", (chosen.choice([0, 6]),), ("x",)),
        ]
        return {
            "first": draw_stage(0),
            "others": [draw_stage(begin) for begin in sorted(chosen.sample([1, 2, 3], chosen.randint(0, 2)))],
            "sources": chosen.sample(sources[: chosen.choice([2, 2, 3])], 2) if chosen.random() < 0.5 else sources,
            "seed": chosen.choice([1, 1, 2]),
            "skipped": ((5, 7),) if chosen.random() < 0.2 else (),
        }

    def build(drawn: dict[str, Any]) -> DataOrder:
        named = {name for stage in (drawn["first"], *drawn["others"]) for name in stage.get("weights", stage.get("epochs", ()))}
        sources = [*drawn["sources"], *(SourceSize(name, (6,), ("x",)) for name in sorted(named - {one.name for one in drawn["sources"]}))]
        return order_of([drawn["first"], *drawn["others"]], sources, drawn["seed"], drawn["skipped"])

    num_equal = num_different = 0
    for _ in range(1500):
        drawn, again, seen = draw(), draw(), chosen.choice([1, 3, 4, 5, 8, 9, 12])
        one, two = build(drawn), build({key: again[key] if chosen.random() < 0.3 else value for key, value in drawn.items()})
        if one.identity(seen) != two.identity(seen):
            num_different += 1
            continue
        num_equal += 1
        numbers = one.numbers(0, seen + 1)
        np.testing.assert_array_equal(numbers, two.numbers(0, seen + 1))
        assert rows_of(one, one.places(numbers[:seen])) == rows_of(two, two.places(numbers[:seen]))
        cursors, lengths = [], []
        for order in (one, two):
            cursors.append({name: cursor for name, cursor in order.mixture.cursors(int(numbers[seen])).items() if cursor})
            lengths.append([order.mixture.stage_at(number).sequence_length for number in numbers[:seen].tolist()])
        assert cursors[0] == cursors[1]
        assert lengths[0] == lengths[1]
    assert num_equal > 200 and num_different > 200
