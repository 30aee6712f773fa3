"""What a run will see of each source, and cut of it, is counted right; a run that sees a source too often is refused before it starts."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from configs.durable import sha256_of_file
from configs.errors import UserError
from configs.loader import dump_config
from configs.schema import BatchSection, RunConfig
from data_pipeline.manifest import write_manifest
from data_pipeline.packing import count_best_fit, count_chopped, pack_documents, packs_name, write_packs
from data_pipeline.records import FileRecord, PackingRecord, ShardRecord
from pretrain import cli
from pretrain.checkpoint.verify import FORMAT
from pretrain.data.corpus import open_corpus
from pretrain.data.order import DataOrder
from pretrain.mixture_view import check_repeats, describe_mixture
from pretrain.run.folder import RunFolder
from pretrain.state import TrainState
from tests.tiny import write_shard, write_tiny_dataset

T, GLOBAL = 8, 4
STEP = T * GLOBAL
SHARDS = {"web": [301, 100], "code": [165], "books": [1, 90], "tiny": [7]}
SAMPLES = {"web": 50, "code": 20, "books": 11, "tiny": 0}
STAGES = (
    {"weights": {"web": 3.0, "code": 1.0}},
    {"from_tokens": 30 * STEP, "weights": {"web": 1.0, "books": 1.0}, "sequence_length": 2},
    {"from_tokens": 45 * STEP - 5},
)
Make = Callable[..., RunConfig]


@pytest.fixture(scope="module", name="dataset")
def _dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture") / "dataset"
    manifest = write_tiny_dataset(folder, num_documents=30)
    shards = [pack(folder, name, number, [length]) for name, lengths in SHARDS.items() for number, length in enumerate(lengths)]
    write_manifest(folder, manifest.model_copy(update={"splits": {**manifest.splits, "train": tuple(shards)}}))
    return folder


def pack(folder: Path, source: str, number: int, lengths: list[int]) -> ShardRecord:
    """A shard of documents of these lengths, and its packs."""
    record = write_shard(folder, f"more/{source}-{number}", source, [np.ones(length, dtype=np.int64) for length in lengths])
    starts = np.cumsum([0, *lengths])
    packs, path = pack_documents(starts, T), Path(packs_name(folder / record.name, T))
    write_packs(path, packs)
    counts = count_best_fit(packs, starts)
    packing = PackingRecord(
        num_packs=counts.num_packs,
        documents_cut=counts.documents_cut,
        padding_tokens=counts.padding_tokens,
        documents_cut_when_chopped=count_chopped(starts, T).documents_cut,
    )
    file = FileRecord(bytes=path.stat().st_size, sha256=sha256_of_file(path))
    return record.model_copy(update={"files": {**record.files, packs_name(record.name, T): file}, "packings": {str(T): packing}})


@pytest.fixture(name="make")
def _make(dataset: Path, tmp_path: Path) -> Make:
    def make(num_steps: int, stages: tuple[dict[str, Any], ...] = STAGES, max_epochs: float | None = None) -> RunConfig:
        return RunConfig.model_validate(
            {
                "run": {"root": str(tmp_path / "runs"), "name": "mine"},
                "data": {"root": str(dataset), "tokenizer": {"path": "unused"}},
                "mixture": {"stages": stages, "max_epochs": max_epochs},
                "model": {"vocabulary_size": 300},
                "training": {
                    "sequence_length": T,
                    "global_batch_samples": GLOBAL,
                    "micro_batch_samples": 1,
                    "total_tokens": num_steps * STEP,
                },
                "schedule": {"decay_tokens": 0},
            }
        )

    return make


def run_verb(config: RunConfig, place: Path, *arguments: object) -> Result:
    """`pretrain ...` with the run file of a configuration behind the verb's name; an error of ours is raised."""
    (place / "mine.yaml").write_text(dump_config(config))
    verb, options = [one for one in arguments if not str(one).startswith("--")], [one for one in arguments if str(one).startswith("--")]
    done = CliRunner().invoke(cli.app, [*map(str, verb), str(place / "mine.yaml"), *map(str, options)], prog_name="pretrain")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def count_one_by_one(config: RunConfig, numbers: np.ndarray) -> Counter[str]:
    """Samples of each source, from the order itself."""
    order = DataOrder(open_corpus(config).sources, config.mixture, config.training, config.run.seed)
    return Counter(order.sources[index].name for index in order.places(numbers).source_n.tolist())


# --- what is counted ----------------------------------------------------------------------------------------


def test_samples_tokens_and_epochs_are_those_of_the_order(make: Make) -> None:
    config = make(70)
    found = describe_mixture(config, step=33)
    assert (found["total_steps"], found["total_tokens"]) == (70, 70 * STEP)
    bounds = [0, 30, 45, 70]
    for stage, first, end in zip(found["stages"], bounds, bounds[1:], strict=False):
        assert (stage["first_step"], stage["num_steps"]) == (first + 1, end - first)
        assert (stage["first_token"], stage["num_tokens"]) == (first * STEP, (end - first) * STEP)
        counts = count_one_by_one(config, np.arange(first * GLOBAL, end * GLOBAL))
        until = count_one_by_one(config, np.arange(end * GLOBAL))
        for name, one in stage["sources"].items():
            assert (one["samples"], one["tokens"]) == (counts[name], counts[name] * T)
            assert one["epochs"] == counts[name] / max(1, SAMPLES[name])
            assert one["epochs_by_its_end"] == until[name] / max(1, SAMPLES[name])
        assert sum(one["share"] for one in stage["sources"].values()) == pytest.approx(1)
    assert [stage["sequence_length"] for stage in found["stages"]] == [T, 2, T]
    assert [[name for name, one in stage["sources"].items() if not one["share"]] for stage in found["stages"]] == [
        ["books", "tiny"],
        ["code", "tiny"],
        ["tiny"],
    ]
    whole, now = count_one_by_one(config, np.arange(70 * GLOBAL)), count_one_by_one(config, np.arange(33 * GLOBAL))
    for name, one in found["sources"].items():
        assert (one["samples_per_epoch"], one["tokens_built"]) == (SAMPLES[name], sum(SHARDS[name]))
        assert one["left_over_tokens"] == sum(SHARDS[name]) - T * SAMPLES[name]
        assert (one["samples"], one["by_now"]["samples"]) == (whole[name], now[name])
        assert one["by_now"]["epochs"] == now[name] / max(1, SAMPLES[name])
    assert found["too_small"] == ["tiny"]


def ramped(config: RunConfig, *ramp: tuple[int, int], batch: int) -> RunConfig:
    """The same with smaller steps at its beginning: until how many samples they have how many."""
    sections = tuple(BatchSection(until_tokens=until * T, global_batch_samples=size) for until, size in ramp)
    training = config.training.model_copy(update={"batch_ramp": sections, "global_batch_samples": batch})
    return RunConfig.model_validate(config.model_copy(update={"training": training}).model_dump())


def test_a_ramp_counts_steps_of_their_own_sizes(make: Make, tmp_path: Path) -> None:
    """Steps of 1, 2 and 5 samples; of 280 samples that are asked for, the last step sees two more."""
    config = ramped(make(70), (19, 1), (60, 2), batch=5)
    sizes = [1] * 19 + [2] * 21 + [5] * 44
    assert sum(sizes) == 281
    found = describe_mixture(config, step=45)
    assert (found["total_steps"], found["total_tokens"]) == (len(sizes), sum(sizes) * T)
    # The stages begin with the first step behind 120 and 179 samples.
    bounds = [0, 52, 64, len(sizes)]
    assert [sum(sizes[:bound]) for bound in bounds] == [0, 121, 181, 281]
    for stage, first, end in zip(found["stages"], bounds, bounds[1:], strict=False):
        begin, behind = sum(sizes[:first]), sum(sizes[:end])
        assert (stage["first_step"], stage["num_steps"]) == (first + 1, end - first)
        assert (stage["first_token"], stage["num_tokens"]) == (begin * T, (behind - begin) * T)
        counts = count_one_by_one(config, np.arange(begin, behind))
        assert {name: one["samples"] for name, one in stage["sources"].items()} == {name: counts[name] for name in SAMPLES}
    now = count_one_by_one(config, np.arange(sum(sizes[:45])))
    assert {name: one["by_now"]["samples"] for name, one in found["sources"].items()} == {name: now[name] for name in SAMPLES}
    shown = run_verb(config, tmp_path, "data", "mixture", "--step=52").stdout
    assert f": {len(sizes)} steps of 1 to 5 samples of 8 tokens, 2,248 tokens;" in shown
    assert "stage 2 (now): 12 steps from step 53 on, 480 tokens from token 968 on" in shown
    assert [section["global_batch_samples"] for section in found["batch_ramp"]] == [1, 2]


def test_what_is_skipped_is_not_seen(make: Make) -> None:
    """A run folder's newest commit tells it; stages begin at the same samples, and earlier by the steps that were left out."""
    config = make(70)
    skipped = ((10 * GLOBAL, 12 * GLOBAL), (50 * GLOBAL, 51 * GLOBAL))
    state = TrainState(60, 60 * GLOBAL, 60 * STEP, 0, skipped).to_json()
    content: dict[str, Any] = {
        "format": FORMAT,
        "state": state,
        "identity": {},
        "code": {},
        "layout": {},
        "loss": "0x1p+0",
        "time": 0,
        "files": {},
        "world_size": 1,
        "attempt": 1,
    }
    folder = RunFolder.of(config).checkpoints / "step-00000060"
    folder.mkdir(parents=True)
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "MANIFEST.json").write_text(json.dumps(content | {"manifest_sha256": seal}))
    found = describe_mixture(config, step=11)
    assert [(stage["first_step"], stage["num_steps"]) for stage in found["stages"]] == [(1, 28), (29, 15), (44, 27)]
    numbers = np.array([number for number in range(73 * GLOBAL) if not any(first <= number < end for first, end in skipped)])
    whole, now = count_one_by_one(config, numbers), count_one_by_one(config, numbers[: 11 * GLOBAL])
    assert {name: one["samples"] for name, one in found["sources"].items()} == {name: whole[name] for name in SAMPLES}
    assert {name: one["by_now"]["samples"] for name, one in found["sources"].items()} == {name: now[name] for name in SAMPLES}


def test_packed_sources_leave_nothing_over_and_are_padded(make: Make, tmp_path: Path) -> None:
    config = make(70)
    config = config.model_copy(update={"training": config.training.model_copy(update={"packing": "best_fit"})})
    found = describe_mixture(config)
    assert {name: one["samples_per_epoch"] for name, one in found["sources"].items()} == {"web": 51, "code": 21, "books": 13, "tiny": 1}
    for one in found["sources"].values():
        assert one["tokens_built"] + one["padding_tokens"] == one["samples_per_epoch"] * T and one["left_over_tokens"] == 0
    assert found["too_small"] == []
    shown = run_verb(config, tmp_path, "data", "mixture").stdout
    assert "packing best_fit" in shown and "tokens built  padding  samples per epoch" in shown and "never seen" not in shown


@pytest.mark.parametrize("packing", ["chop", "best_fit"])
def test_documents_cut_and_padding_are_those_of_the_samples(make: Make, tmp_path: Path, seed: int, packing: str) -> None:
    """Counted one by one: which documents have tokens in which samples, of sources whose shards end in the midst of a sample."""
    chosen = np.random.default_rng(seed)
    sizes = {"web": [20, 1, 30], "code": [9], "books": [3, 3, 3, 3]}
    lengths = {name: [(chosen.integers(1, 3 * T, count)).tolist() for count in counts] for name, counts in sizes.items()}
    folder = tmp_path / "dataset"
    manifest = write_tiny_dataset(folder, num_documents=30)
    shards = [pack(folder, name, number, one) for name, of_source in lengths.items() for number, one in enumerate(of_source)]
    write_manifest(folder, manifest.model_copy(update={"splits": {**manifest.splits, "train": tuple(shards)}}))
    config = make(70, ({},))
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"root": str(folder)}),
            "training": config.training.model_copy(update={"packing": packing}),
        }
    )
    found, corpus = describe_mixture(config), open_corpus(config)
    sums: Counter[str] = Counter()
    first_file = 0
    for number, (name, of_source) in enumerate(lengths.items()):
        document_of_token = [np.repeat(np.arange(len(one)), one) for one in of_source]
        samples_of_document: dict[tuple[int, int], set[int]] = {}
        if packing == "chop":
            in_order = [(file, document) for file, tokens in enumerate(document_of_token) for document in tokens.tolist()]
            for token, document in enumerate(in_order):
                samples_of_document.setdefault(document, set()).add(token // T)
        else:
            assert corpus.packs is not None
            for sample in range(len(corpus.packs[number])):
                for file, first, num_tokens in corpus.packs[number].pieces(sample):
                    for document in document_of_token[file - first_file][first : first + num_tokens].tolist():
                        samples_of_document.setdefault((file - first_file, document), set()).add(sample)
        one = found["sources"][name]["one_epoch"]
        num_samples = corpus.sources[number].num_samples
        padding = num_samples * T - sum(map(sum, of_source)) if packing == "best_fit" else 0
        wanted = {
            "num_samples": num_samples,
            "num_documents": sum(sizes[name]),
            "documents_cut": sum(len(samples) > 1 for samples in samples_of_document.values()),
            "padding_tokens": padding,
        }
        assert one == wanted | {
            "share_of_documents_cut": wanted["documents_cut"] / sum(sizes[name]),
            "share_of_padding": padding / (num_samples * T),
        }
        sums.update(wanted)
        first_file += len(of_source)
    whole = found["one_epoch"]
    assert {key: whole[key] for key in sums} == dict(sums)
    assert whole["share_of_documents_cut"] == sums["documents_cut"] / sums["num_documents"]
    assert whole["share_of_padding"] == sums["padding_tokens"] / (T * sums["num_samples"])
    lines = run_verb(config, tmp_path, "data", "mixture").stdout.splitlines()
    table = lines[lines.index(f"one epoch, packing {packing}") + 1 :]
    assert table[0].split() == ["source", "documents", "cut", "%", "cut", "%", "padding"]
    for row, (name, one) in zip(
        table[1:], [*((name, found["sources"][name]["one_epoch"]) for name in lengths), ("all", whole)], strict=False
    ):
        shares = [f"{100 * one['share_of_documents_cut']:.2f}", f"{100 * one['share_of_padding']:.2f}"]
        assert row.split() == [name, str(one["num_documents"]), str(one["documents_cut"]), *shares]


def test_tables_say_what_json_says(make: Make, tmp_path: Path) -> None:
    found = json.loads(run_verb(make(70), tmp_path, "data", "mixture", "--json", "--step=30").stdout)
    assert found == json.loads(json.dumps(describe_mixture(make(70), 30)))
    shown = run_verb(make(70), tmp_path, "data", "mixture", "--step=30").stdout
    lines = shown.splitlines()
    assert lines[0] == f"{found['dataset']}: 70 steps of 4 samples of 8 tokens, 2,240 tokens; packing chop"
    assert [line for line in lines if line.startswith(("stage", "resting"))] == [
        "stage 1: 30 steps from step 1 on, 960 tokens from token 0 on",
        "resting: books, tiny",
        "stage 2 (now): 15 steps from step 31 on, 480 tokens from token 960 on, in sequences of 2",
        "resting: code, tiny",
        "stage 3: 25 steps from step 46 on, 800 tokens from token 1,440 on",
        "resting: tiny",
    ]
    assert "web            75.00       90     720    1.80               1.80" in lines
    run = lines[lines.index("the run") + 1 :]
    for name, row in zip(found["sources"], run[1:], strict=False):
        one = found["sources"][name]
        counts = [one[key] for key in ("tokens_built", "left_over_tokens", "samples_per_epoch", "samples", "tokens")]
        now = [str(one["by_now"]["samples"]), f"{one['by_now']['epochs']:.2f}"]
        assert row.replace(",", "").split() == [name, *map(str, counts), f"{one['epochs']:.2f}", *now]
    assert "less text than one sample, never seen: tiny" in lines
    assert "(now)" not in run_verb(make(70), tmp_path, "data", "mixture").stdout
    with pytest.raises(UserError, match="has the steps 1 to 70, asked for step 71"):
        run_verb(make(70), tmp_path, "data", "mixture", "--step=71")


# --- repeats ------------------------------------------------------------------------------------------------

ONE = ({"weights": {"web": 3.0, "code": 2.0}},)


def test_more_epochs_than_allowed_are_refused_with_numbers_and_what_to_change(make: Make) -> None:
    """web has 50 samples, code 20, seen 3 to 2: 60 steps are 144 samples of web and 96 of code."""
    with pytest.raises(UserError) as refused:
        check_repeats(make(60, ONE, 2.5))
    said = str(refused.value)
    assert said.startswith(
        "mixture.max_epochs is 2.5, and this run would see web 2.88 times (144 samples of 50), code 4.80 times (96 samples"
    )
    assert "add text to it, or raise mixture.max_epochs" in said
    largest = int(said.partition("training.total_tokens to ")[2].split()[0])
    assert largest == 31 * STEP  # 124 samples, 49.6 of them of code
    assert check_repeats(make(31, ONE, 2.5)) == []
    with pytest.raises(UserError, match=r"code 2.55 times \(51 samples of 20\)"):
        check_repeats(make(32, ONE, 2.5))
    assert check_repeats(make(60, ONE, 4.8)) == []


def test_fewer_tokens_are_whole_steps_of_the_ramp_and_leave_it_whole(make: Make) -> None:
    """code may be seen 50 times, as in 125 samples: 20 steps of 2 and 17 of 5. Where steps of 5 begin behind that, nothing is advised."""
    with pytest.raises(UserError, match=f"Lower training.total_tokens to {125 * T} at most"):
        check_repeats(ramped(make(60, ONE, 2.5), (40, 2), batch=5))
    config = ramped(make(60, ONE, 2.5), (40, 2), batch=5)
    allowed = config.training.model_copy(update={"total_tokens": 125 * T})
    assert check_repeats(config.model_copy(update={"training": allowed})) == []
    with pytest.raises(UserError, match=r"samples of 20\)\. Give web, code less weight"):
        check_repeats(ramped(make(60, ONE, 2.5), (150, 2), batch=5))


def test_fewer_tokens_are_not_advised_where_the_last_stage_would_not_begin(make: Make) -> None:
    stages = (*ONE, {"from_tokens": 50 * STEP, "weights": {"web": 1.0}})
    with pytest.raises(UserError, match=r"code 4.00 times \(80 samples of 20\)\. Give code less weight"):
        check_repeats(make(60, stages, 3.5))


@pytest.mark.parametrize(("num_steps", "warned"), [(50, False), (51, True)])
def test_beyond_four_epochs_a_run_is_warned_of(make: Make, num_steps: int, warned: bool) -> None:
    """50 steps are 80 samples of code: 4 epochs."""
    said = check_repeats(make(num_steps, ONE))
    assert describe_mixture(make(num_steps, ONE))["problems"] == said
    assert bool(said) == warned
    if warned:
        (warning,) = said
        assert "this run sees code 4.10 times (82 samples of 20)" in warning and "Muennighoff et al. 2023" in warning


def test_a_limit_of_ones_own_silences_the_warning(make: Make) -> None:
    assert check_repeats(make(60, ONE, 10.0)) == []


def test_training_is_refused_before_anything_is_made(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mixture.max_epochs is 2"):
        run_verb(make(60, ONE, 2.0), tmp_path, "train")
    assert not (tmp_path / "runs").exists()
    shown = run_verb(make(60, ONE, 2.0), tmp_path, "data", "mixture")
    assert "WARNING: mixture.max_epochs is 2, and this run would see web 2.88 times" in shown.stdout


@pytest.mark.parametrize("finished", [False, True])
def test_training_warns_and_goes_on_and_a_finished_run_is_left_alone(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    monkeypatch.setattr("pretrain.run.supervisor.supervise", lambda *arguments: 0)
    monkeypatch.setattr("pretrain.checkpoint.verify.is_committed", lambda *arguments: finished)
    config = make(60, ONE, 2.0 if finished else None)
    config = config.model_copy(update={"data": config.data.model_copy(update={"verify_before_training": False})})
    done = run_verb(config, tmp_path, "train")
    assert done.exit_code == 0
    assert ("WARNING: this run sees code 4.80 times (96 samples of 20)." in done.stderr) == (not finished)
