"""The folder of a launch: whole or not there, closed to others, and of the code as it was."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import UserError
from launch import snapshot
from launch.plan import as_json
from launch.snapshot import PACKAGES, as_copy, describe_code, in_place, own_files, write_launch
from tests.launch.plans import CODE, a_plan, a_run, moved

SECRET = "canary-of-a-secret"
SHELL = {"WANDB_API_KEY": SECRET, "OTHER": "canary-that-is-not-passed"}


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=True).stdout.strip()


@pytest.fixture(name="checkout")
def _checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    for package in PACKAGES:
        (folder / package / "__pycache__").mkdir(parents=True)
        (folder / package / "__init__.py").write_text(f'"""{package}"""\n')
        (folder / package / "__pycache__" / "x.pyc").write_text("x")
    (folder / "configs" / "a.yaml").write_text("a: 1\n")
    (folder / ".gitignore").write_text("__pycache__/\n")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    return folder


def test_the_code_is_known_by_its_commit_and_what_differs_from_it(checkout: Path, tmp_path: Path) -> None:
    config, there = a_run(tmp_path), tmp_path / "elsewhere"
    clean = describe_code(checkout, config, there)
    assert (clean.source, clean.commit, clean.changes_sha256) == (str(checkout), git(checkout, "rev-parse", "HEAD"), None)
    (checkout / "README.md").write_text("what nodes do not run")
    assert describe_code(checkout, config, there) == clean
    (checkout / "pretrain" / "__init__.py").write_text("changed = 1\n")
    changed = describe_code(checkout, config, there).changes_sha256
    (checkout / "pretrain" / "new.py").write_text("new = 1\n")
    new = describe_code(checkout, config, there).changes_sha256
    (checkout / "pretrain" / "new.py").write_text("new = 2\n")
    assert len({None, changed, new, describe_code(checkout, config, there).changes_sha256}) == 4


def test_a_folder_that_is_no_checkout(tmp_path: Path) -> None:
    assert describe_code(tmp_path, a_run(tmp_path), tmp_path / "elsewhere") == replace(CODE, source=str(tmp_path), commit=None)


def test_the_copy_is_of_then(checkout: Path, tmp_path: Path) -> None:
    plan = moved(a_plan(tmp_path), tmp_path)
    plan = replace(plan, code=as_copy(describe_code(checkout, a_run(tmp_path), tmp_path), plan.folder))
    write_launch(plan, own_files(plan, SHELL))
    (checkout / "pretrain" / "__init__.py").write_text("changed = 1\n")
    copied = Path(plan.code.source)
    assert copied == Path(plan.folder) / "code"
    assert {str(path.relative_to(copied)) for path in copied.rglob("*") if path.is_file()} == {
        *(f"{package}/__init__.py" for package in PACKAGES),
        "configs/a.yaml",
    }
    assert (copied / "pretrain" / "__init__.py").read_text() == '"""pretrain"""\n'


def test_modules_of_the_users_own_come_along(checkout: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    (here / "my_package").mkdir(parents=True)
    (here / "my_package" / "rules.py").write_text("")
    (here / "my_loss.py").write_text("")
    (here / "not_named.py").write_text("")
    config = a_run(
        tmp_path, "objective.loss=my_loss:summed", "optimizer.kind=torch.optim:SGD", 'data.clean=[{rule: "my_package.rules:keep"}]'
    )
    code = describe_code(checkout, config, here)
    assert code.modules == (str(here / "my_loss.py"), str(here / "my_package"))
    plan = moved(a_plan(tmp_path), tmp_path)
    plan = replace(plan, code=as_copy(code, plan.folder))
    write_launch(plan, {})
    assert {path.name for path in Path(plan.code.source).iterdir()} == {*PACKAGES, "my_loss.py", "my_package"}
    with pytest.raises(UserError, match="my_loss.py is named in the run file and does not lie in"):
        in_place(code)
    assert in_place(describe_code(checkout, a_run(tmp_path), here)).copied_from is None


def test_only_the_environment_holds_secrets_and_nobody_else_reads_anything(tmp_path: Path) -> None:
    plan = moved(a_plan(tmp_path, shell=SHELL), tmp_path)
    before = os.umask(0)
    try:
        write_launch(plan, own_files(plan, SHELL))
    finally:
        os.umask(before)
    folder = Path(plan.folder)
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(
        ("cluster.yaml", "environment", "node.sh", "plan.json", "run.yaml"), 0o600
    )
    for path in (folder, folder.parent, folder.parent.parent):
        assert path.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in folder.iterdir() if "canary" in path.read_text()] == ["environment"]
    assert SHELL["OTHER"] not in (folder / "environment").read_text()
    assert json.loads((folder / "plan.json").read_text()) == json.loads(json.dumps(as_json(plan)))


def test_pods_get_neither_a_script_nor_secrets(tmp_path: Path) -> None:
    assert set(own_files(a_plan(tmp_path, "kubernetes", shell=SHELL), SHELL)) == {"run.yaml", "plan.json"}


def test_a_folder_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = moved(a_plan(tmp_path), tmp_path)

    def break_off(path: Path, content: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(snapshot, "_write_private", break_off)
        write_launch(plan, own_files(plan, {}))
    assert list(Path(plan.folder).parent.iterdir()) == []
    write_launch(plan, own_files(plan, {}))
    with pytest.raises(UserError, match="is there already"):
        write_launch(plan, own_files(plan, {}))
