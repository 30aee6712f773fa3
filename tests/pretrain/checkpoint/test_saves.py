"""Saves in flight: training goes on, and a commit is there when all ranks have written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_a_save_is_committed_at_a_later_step_when_all_have_written(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    one, two = run_on_ranks("tests.pretrain.checkpoint.saves_on_ranks:in_flight", 2, {"folder": str(tmp_path)})
    assert (one.pop("after commits"), two.pop("after commits")) == ([1, 2, 3, 4], []), "rank 0 alone, once behind each commit"
    assert one.pop("told") == two.pop("told") == [0, 1, 2]
    assert one == two
    assert one["nothing in flight"] == [False, None]
    assert (one["begun"], one["settled"], one["waited"]) == (None, None, False)
    assert one["one has written"] == []
    assert one["both have written"] == ["step-00000010"]
    assert one["an old verdict"] == ["step-00000010"]
    assert (one["a save behind one in flight"], one["the one before was waited for"]) == (None, True)
    assert one["then it is there"] == ["step-00000010", "step-00000020"]
    assert one["third"] is None
    assert one["failed"] == [None, "step 40 could not be saved: rank 1: no space on rank 1."]
    assert one["fifth"] is None
    commits = [f"step-000000{step}" for step in (10, 20, 30, 50)]
    assert one["after a failure"] == one["left"] == commits
    assert one["three in a row"] == (
        "step 80 could not be saved: rank 0: no space; rank 1: no space. 3 saves in a row failed; mend it and run the same command again."
    )
    assert one["verified"] == [[]] * 4
