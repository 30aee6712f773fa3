"""`pretrain demo --torture`: a training that is killed ends with the bits of the one that is not; what differs would be said."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.loader import load_config
from pretrain.cli import app
from pretrain.demo import choose_run
from pretrain.run.folder import RunFolder
from pretrain.torture import End, differences, run_torture, write_run_files
from tests.pretrain.test_demo import TINY_DEMO
from tests.tiny import tiny_texts

GOOD = End("abc", [[step, 8 * step, 2.0 / step, 1e-3, 1.0, 0] for step in (1, 2, 3)], 1)


def test_every_difference_is_said() -> None:
    """Another state, the last bit of a loss, a step that is missing; the number of attempts is none."""
    assert differences(GOOD, replace(GOOD, attempts=6)) == []
    assert differences(GOOD, replace(GOOD, state="abd")) == ["NOT equal: the states"]
    changed = [*GOOD.steps[:2], [3, 24, 2.0 / 3 + 2**-52, 1e-3, 1.0, 0]]
    (told,) = differences(GOOD, replace(GOOD, steps=changed))
    assert told.startswith("NOT equal, first at step 3: {'step': 3, 'tokens_seen': 24, 'loss': 0.6666666666666666,")
    assert differences(GOOD, replace(GOOD, steps=GOOD.steps[:2])) == ["NOT equal: the number of steps"]


def test_the_two_runs_differ_in_their_names_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY_DEMO)
    (tmp_path / "notes").mkdir()
    config = choose_run(tmp_path / "notes", tmp_path / "tiny.yaml")
    calm, killed = (load_config(file) for file in write_run_files(config, kills=4))
    assert (calm.run.name, killed.run.name) == ("torture-calm", "torture-killed")
    assert calm.model_copy(update={"run": killed.run}) == killed
    assert calm.run.deterministic
    assert (calm.training.total_steps, calm.watch.log_every_steps, calm.run.attempts_in_vain) == (100, 1, 5)
    (tmp_path / "runs" / "torture-killed").mkdir()
    assert [file.name for file in write_run_files(config, kills=4)] == ["torture-calm-2.yaml", "torture-killed-2.yaml"]


@pytest.mark.sample
def test_a_killed_training_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], seed: int
) -> None:
    """One kill: the least that shows it. Three starts of two ranks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    for number, text in enumerate(tiny_texts(120, seed=1)):
        (tmp_path / "notes" / f"{number}.txt").write_text(text)
    (tmp_path / "tiny.yaml").write_text(TINY_DEMO)
    assert run_torture(tmp_path / "notes", 1, seed, tmp_path / "tiny.yaml") == 0
    said = capfd.readouterr().err
    assert f"(seed {seed})" in said
    assert re.search(r"kill 1 of 1: rank [01] \(pid \d+\), behind step \d+", said), said
    calm, killed = re.findall(r"(?:calm|killed)  +100 steps in (\d) attempts?, state ([0-9a-f]{64})", said)
    assert (calm[0], killed[0]) == ("1", "2")
    assert calm[1] == killed[1]
    assert "equal: every bit, behind 1 kill" in said
    causes = [row["cause"] for row in RunFolder(tmp_path / "runs" / "torture-killed").attempts()]
    assert "SIGKILL" in causes[0]


def test_kills_without_torture_are_refused() -> None:
    """Not taken for a wish to see the plain demo."""
    for option in ("--kills", "--seed"):
        with pytest.raises(UserError, match="belong to --torture"):
            app(["demo", option, "3"], standalone_mode=False)
