"""A seeded sample of the campaign of hostile input, another one each time, and that the campaign can fail.

All of it: `python -m tests.faults.hostile`.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import canaries, hostile, hostile_commits
from tests.faults.campaign import Case, run_sample
from tests.faults.hostile import KINDS

ROOT = Path(__file__).parent.parent.parent
SHARES = {"yaml": 0.5, "run_names": 1.0, "commits": 0.2, "secrets": 0.34}
TIMEOUT_SECONDS = 300


def test_every_kind_is_sampled() -> None:
    assert SHARES.keys() == KINDS.keys()
    assert canaries.NUM_SECRETS == 20


@pytest.mark.parametrize("kind", SHARES)
def test_sample(kind: str, seed: int) -> None:
    """In a process of its own: cases fork, and tell of files that are opened for as long as it lives."""
    run_sample("hostile", kind, seed, SHARES[kind], TIMEOUT_SECONDS)


def test_a_secret_and_an_open_file_are_found_wherever_they_are(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "wandb").mkdir(parents=True, mode=0o700)
    run.chmod(0o750)
    (run / "wandb" / "x.wandb").write_bytes(b"\0\xffcanary\0")
    (run / "wandb" / "x.wandb").chmod(0o604)
    (run / "of-canary").touch(0o600)
    assert canaries._places("canary", run, "a canary", ['["a", "canary"]']) == [
        "what was printed", 'the command line ["a", "canary"]', *(str(p.relative_to(run)) for p in run.rglob("*canary*")), "wandb/x.wandb",
    ]  # fmt: skip
    assert len([problem for problem in canaries._open_to_others(run) if "x.wandb has mode 0604" in problem or "mode 0750" in problem]) == 2


def test_a_pickle_that_is_opened_would_be_noticed(tmp_path: Path) -> None:
    """The payload works: what the campaign says of it means something."""
    canary = tmp_path / "executed"
    code = f"import pickle; pickle.loads({__import__('pickle').dumps(hostile_commits.Payload(canary))!r})"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120, check=True)
    assert canary.exists()


def test_a_commit_that_nobody_changed_is_taken(tmp_path: Path) -> None:
    """In a process of its own: it forks, and the child has bounded memory, too little for what other tests have loaded."""
    code = (
        "import random, sys\n"
        "from pathlib import Path\n"
        "from tests.faults import hostile_commits\n"
        "from tests.faults.campaign import Case\n"
        "hostile_commits.REFUSED = (lambda *_: None,)\n"
        "print(*hostile_commits.check_commit(Case(0, random.Random(0), Path(sys.argv[1]), None)).problems)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip().endswith(": it was taken")


@pytest.mark.parametrize("text", ["run: {seed: 1}", "optimizer: {peak_lr: 1e-3}"])
def test_a_harmless_run_file_is_a_problem(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile, "YAML", (text,))
    assert "was taken as a run file" in hostile.read_yaml(Case(0, random.Random(0), tmp_path, None)).problems[0]


def test_a_name_that_leads_elsewhere_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the schema's rule taken away."""
    import re

    from configs.schema import NAME_PATTERN

    monkeypatch.setattr("configs.schema.NAME_PATTERN", re.compile(".*", re.DOTALL))
    assert NAME_PATTERN.fullmatch("../x") is None
    assert "leads to" in hostile.name_run(Case(hostile.NAMES.index("../x"), random.Random(0), tmp_path, None)).problems[0]
