"""The benchmark's mixed corpus, small: what was planted is what a build reports, document by document."""

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import mixed_corpus
from benchmarks.mixed.check import Comparison
from benchmarks.mixed.documents import DATASET, FOLDER, RUN_FILE, SOURCES
from benchmarks.mixed.make import make_corpus
from configs.loader import load_config
from configs.schema import RunConfig
from data_pipeline.build import build_dataset
from data_pipeline.cleaning import bind_rules
from data_pipeline.execution import open_here

ROOT = Path(__file__).parent.parent
# Many small work units and shards; a small corpus has as many kinds of bad lines as a large one.
SMALL = {
    "work_unit_bytes": "100_000",
    "shard_tokens": "20_000",
    "quarantine_limit": "0.5",
    "held_out_fraction": "0.1",
    "tokenizer": "{vocabulary_size: 1000, training_bytes: 500_000}",
}
Corpus = tuple[Path, Path]


@pytest.fixture(scope="module", name="corpus")
def _corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus of 3 MB of the standard library's text, and the dataset that was built of it: (planted.json, dataset)."""
    folder = tmp_path_factory.mktemp("mixed") / "corpus"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # where the rules of one's own are looked for
        run_file = make_corpus(folder, 3, [sysconfig.get_path("stdlib")], with_packages=False)
        data = load_config(run_file, [f"data.{key}={value}" for key, value in SMALL.items()]).data
        assert build_dataset(data, lambda progress: None, open_here).outcome == "built"
    return folder / "planted.json", Path(data.folder())


def test_the_report_is_exact(corpus: Corpus, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    planted, dataset = corpus
    assert mixed_corpus.main(["check", str(dataset), "--planted", str(planted)]) == 0
    shown = capsys.readouterr().out
    assert " 0 differ" in shown
    reasons = {line.split(":")[1].split()[0] for line in shown.splitlines() if " quarantined: " in line or " dropped: " in line}
    assert reasons >= {
        *("bad_json", "bad_utf8", "bad_encoding", "missing_field", "not_text", "not_an_object", "lone_surrogate", "empty", "too_large"),
        *("damaged_file", "exact_duplicate", "near_duplicate", "planted", "contaminated", "too_short", "blocked_domain", "blocked_url"),
    }


def change_count(plan: dict[str, Any]) -> None:
    plan["sources"]["kernel"]["quarantined"]["bad_json"] += 1


def change_addresses(plan: dict[str, Any]) -> None:
    plan["addresses"][next(iter(plan["addresses"]))] += 1


def change_pair(plan: dict[str, Any]) -> None:
    plan["near"][0]["later"] = plan["near"][0]["first"]


def forget_a_reason(plan: dict[str, Any]) -> None:
    del plan["sources"]["web"]["dropped"]["blocked_url"]


@pytest.mark.parametrize("change", [change_count, change_addresses, change_pair, forget_a_reason])
def test_a_difference_is_found(corpus: Corpus, change: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    planted, dataset = corpus
    before = {line for line in Comparison(dataset, planted).lines(5) if not line.is_equal}
    plan = json.loads(planted.read_bytes())
    change(plan)
    changed = planted.with_name(f"{change.__name__}.json")
    changed.write_text(json.dumps(plan))
    after = {line for line in Comparison(dataset, changed).lines(5) if not line.is_equal}
    assert after > before


def test_the_run_file_is_an_example_that_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a data section and nothing else, and takes overrides; its sources are those that are made."""
    monkeypatch.chdir(ROOT)
    config = load_config(ROOT / RUN_FILE, ["data.workers=1", "data.deduplicate.near=null"])
    assert config.model_dump(exclude={"data", "run"}) == RunConfig().model_dump(exclude={"data", "run"})
    assert (config.data.workers, config.data.deduplicate and config.data.deduplicate.near) == (1, None)
    assert config.data.folder() == DATASET
    assert [source.name for source in config.data.sources] == [source.name for source in SOURCES]
    for section, source in zip(config.data.sources, SOURCES, strict=True):
        assert section.path.startswith(f"{FOLDER}/{source.name}")
        assert (section.id_field, section.text_field) == ("record_id" if source.kind == "wet" else source.id_field, source.text_field)
    assert len(bind_rules(config.data.clean, "web")) == len(config.data.clean) > len(bind_rules(config.data.clean, "kernel")) > 5


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is there already"):
        make_corpus(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []
