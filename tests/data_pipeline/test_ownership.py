"""Who holds a dataset's folder, and what is cleared up behind a build that was killed."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from configs.errors import UserError
from data_pipeline.ownership import OWNER, is_owned_by, own_folder, scratch_folder


def test_one_at_a_time_by_a_token(tmp_path):
    with own_folder(tmp_path) as token:
        assert is_owned_by(tmp_path, token) and not is_owned_by(tmp_path, "other")
        with pytest.raises(UserError, match=rf"another build is at work there \(process {os.getpid()} on "), own_folder(tmp_path):
            pass
        with scratch_folder(tmp_path, token) as scratch:
            assert scratch.stat().st_mode & 0o777 == 0o700 and is_owned_by(tmp_path, token)
        assert not scratch.exists()
    assert not is_owned_by(tmp_path, token) and not (tmp_path / OWNER).exists()


def test_what_a_killed_build_left_is_ended_and_removed(tmp_path):
    scratch = Path(tempfile.mkdtemp(prefix="pretrain-", dir=tmp_path))
    foreign = Path(tempfile.mkdtemp(prefix="other-", dir=tmp_path))
    orphans = [
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={**os.environ, "TOKEN": f"{folder}/token"})
        for folder in (scratch, foreign)
    ]
    try:
        dead = {"host": socket.gethostname(), "pid": 2**22 + 1, "token": "dead", "scratch": str(scratch), "left": [str(foreign)]}
        (tmp_path / OWNER).write_text(json.dumps(dead))
        with own_folder(tmp_path) as token:
            orphans[0].wait(timeout=5)  # it was ended and reaped before this line: no status is left to ask for
            assert orphans[1].poll() is None
            assert not scratch.exists() and foreign.exists()
            scratch.mkdir()  # something of it was still starting
            with scratch_folder(tmp_path, token):
                pass
        assert not scratch.exists()
    finally:
        for orphan in orphans:
            orphan.kill()
            orphan.wait()
