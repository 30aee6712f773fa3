"""Do the tests bite? Each guard is taken out of a copy of the sources, and its tests must fail there.

    python -m tests.faults.mutations [--sample SHARE] [--seed N] [--json] [--name WORDS ...]

Out: a line (or an object of JSON) for each guard: whether a test noticed that it was gone; then how many were noticed. Exit status 1 if one
was not, or if its tests do not pass with it. The guards are in `guards.py`; one whose text is not found in its source is an error.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from tests.faults.guards import MUTATIONS, Mutation

ROOT = Path(__file__).parent.parent.parent
COPIED = ("configs", "data_pipeline", "pretrain", "launch", "tests", "pyproject.toml")
LIBRARIES = ("torch", "deepspeed", "hypothesis", "safetensors.torch")
LIMIT_SECONDS = 180
PASSED, FAILED = 0, 1
"""Exit statuses of pytest; others say that nothing was tested."""


def main(arguments: Sequence[str] | None = None, mutations: Sequence[Mutation] = MUTATIONS) -> int:
    """Take out the guards that are asked for; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.mutations", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sample", type=float, default=1.0, metavar="SHARE", help="take out this share of the guards (default: all)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31), help="of the sample (default: a new one)")
    parser.add_argument("--json", action="store_true", help="one object for each guard instead of a line")
    parser.add_argument(
        "--name", action="append", default=[], metavar="WORDS", help="guards with these words only; may be given several times"
    )
    asked = parser.parse_args(arguments)
    named = [one for one in mutations if not asked.name or any(words in one.guard for words in asked.name)]
    wanted = max(1, round(len(named) * asked.sample))
    chosen = [named[number] for number in sorted(random.Random(asked.seed).sample(range(len(named)), wanted))]
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in LIBRARIES:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = copy_sources(Path(folder) / "tree")
        if said := run_tests(copy, sorted({one.test for one in chosen}), PASSED):
            raise SystemExit(f"with all guards in place the tests do not pass:\n{said}")
        survived = 0
        for one in chosen:
            said = take_out(copy, one)
            survived += bool(said)
            row = {"guard": one.guard, "file": one.file, "test": one.test, "noticed": not said}
            print(json.dumps(row) if asked.json else f"{'SURVIVED' if said else 'noticed':<8}  {one.guard}  ({one.file})", flush=True)
            if said:
                print(said, file=sys.stderr, flush=True)
    facts = {"kind": "guards taken out", "tried": len(chosen), "passed": len(chosen) - survived, "seed": asked.seed}
    print(json.dumps(facts) if asked.json else ", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    return 1 if survived else 0


def copy_sources(target: Path) -> Path:
    """A copy of all that the tests of a guard need."""
    target.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target / name)
    return target


def mutated(mutation: Mutation, source: str) -> str:
    """The source without the guard. Raises ValueError where its text does not stand there exactly once."""
    if (times := source.count(mutation.old)) != 1:
        raise ValueError(f"{mutation.file} has the text of the guard {mutation.guard!r} {times} times, wanted once: {mutation.old!r}")
    return source.replace(mutation.old, mutation.new)


def take_out(copy: Path, mutation: Mutation) -> str:
    """Run the tests of a guard without it. Returns what is wrong: nothing where they fail."""
    path = copy / mutation.file
    whole = path.read_text()
    path.write_text(mutated(mutation, whole))
    try:
        return run_tests(copy, [mutation.test], FAILED)
    finally:
        path.write_text(whole)


def run_tests(copy: Path, tests: Sequence[str], wanted: int) -> str:
    """Run tests on the sources of a copy. Returns what they said, or nothing where they ended as is wanted.

    Tests that do not end have noticed something, too. They run in a fork of this process, which has imported the large libraries once.
    """
    limit = LIMIT_SECONDS * (1 if wanted == FAILED else 5)
    with tempfile.TemporaryFile() as said:
        process = os.fork()
        if process == 0:
            _test_in(copy, tests, said.fileno())
        status = _wait(process, limit)
        said.seek(0)
        text = said.read().decode(errors="replace")[-4000:]
    if status is None:
        return "" if wanted == FAILED else f"the tests did not end in {limit} seconds:\n{text}"
    return "" if status == wanted else f"pytest ended with {status}:\n{text}"


def _test_in(copy: Path, tests: Sequence[str], said: int) -> NoReturn:
    """Be pytest, with the copy's sources in place of those that this process was started with."""
    status = -1
    try:
        os.setsid()
        for stream in (1, 2):
            os.dup2(said, stream)
        os.chdir(copy)
        os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}  # bytecode of the source before would be taken for its own
        sys.dont_write_bytecode = True
        sys.path[:] = [str(copy), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
        for name in [name for name in sys.modules if name.partition(".")[0] in COPIED]:
            del sys.modules[name]
        status = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests]))
        sys.stdout.flush()
    finally:
        os._exit(status % 256)


def _wait(process: int, seconds: float) -> int | None:
    """Its exit status; None where it had to be killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


if __name__ == "__main__":
    sys.exit(main())
