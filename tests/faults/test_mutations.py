"""A few guards taken out, other ones each time; that each is still where the list says; and that a test which sees nothing is told.

`python -m tests.faults.mutations` takes out all of them.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.guards import MUTATIONS, Mutation
from tests.faults.mutations import copy_sources, mutated

ROOT = Path(__file__).parent.parent.parent
FEW = "0.04"
LARGEST_COPY_BYTES = 100e6


def take_out(code: str, *arguments: str) -> tuple[int, list[dict[str, object]], str]:
    """Exit status, rows, and what was said otherwise, of the campaign in a process of its own: it forks."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", f"import sys\nfrom tests.faults import mutations\n{code}", "--json", *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=500, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_sample(seed: int) -> None:
    status, rows, said = take_out("sys.exit(mutations.main(sys.argv[1:]))", "--sample", FEW, "--seed", str(seed))
    number = round(len(MUTATIONS) * float(FEW))
    assert (status, rows[-1:]) == (0, [{"kind": "guards taken out", "tried": number, "passed": number, "seed": seed}]), said
    assert all(row["noticed"] for row in rows[:-1])


@pytest.mark.parametrize("one", MUTATIONS, ids=[one.guard for one in MUTATIONS])
def test_each_guard_is_where_the_list_says_and_so_is_its_test(one: Mutation) -> None:
    """Without it the source is still a program, and another one."""
    source = (ROOT / one.file).read_text()
    assert ast.dump(ast.parse(mutated(one, source))) != ast.dump(ast.parse(source))
    file, _, test = one.test.partition("::")
    functions = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)}
    assert not test or test in functions


def test_there_are_many_and_each_has_a_name() -> None:
    assert len({one.guard for one in MUTATIONS}) == len({(one.file, one.old, one.new) for one in MUTATIONS}) == len(MUTATIONS) > 25


@pytest.mark.parametrize("old", ["no such text stands there", "sync_path"])
def test_a_text_that_is_not_there_once_is_an_error(old: str) -> None:
    one = MUTATIONS[0]._replace(old=old)
    with pytest.raises(ValueError, match=r"configs/durable.py has the text of the guard .* times, wanted once"):
        mutated(one, (ROOT / one.file).read_text())


def test_a_guard_that_no_test_misses_is_told() -> None:
    """A change of words, which no test can see; and one whose tests do not pass with it."""
    unseen = "mutations.Mutation('words', 'configs/sealed.py', 'at least one bit has changed', 'a bit has', 'tests/configs/test_sealed.py')"
    status, rows, said = take_out(f"sys.exit(mutations.main(sys.argv[1:], [{unseen}]))", "--seed", "1")
    assert status == 1
    assert [row.get("noticed", row.get("passed")) for row in rows] == [False, 0]
    assert "pytest ended with 0" in said
    status, rows, said = take_out(f"sys.exit(mutations.main(sys.argv[1:], [{unseen}._replace(test='tests/configs/no_test.py')]))")
    assert (status, rows) == (1, [])
    assert "with all guards in place the tests do not pass" in said


def test_a_copy_is_small_and_holds_no_bytecode(tmp_path: Path) -> None:
    copy = copy_sources(tmp_path / "tree")
    assert not list(copy.rglob("*.pyc"))
    assert sum(path.stat().st_size for path in copy.rglob("*") if path.is_file()) < LARGEST_COPY_BYTES
