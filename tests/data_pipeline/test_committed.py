"""Folders that are whole or absent, known by their fingerprints, and brought home wherever a killed build left them."""

import pytest

from configs.errors import UserError
from data_pipeline.committed import CommittedRecord, load_folder, make_folder, record_files, settle_folders
from data_pipeline.ownership import own_folder

RECORD = "record.json"


def make(root, token, number, fingerprint, content=b"content"):
    folder = root / "units" / f"{number:05d}"

    def fill(temporary):
        (temporary / "data.bin").write_bytes(content)
        return CommittedRecord(fingerprint=fingerprint, files=record_files(temporary))

    return make_folder(root, token, folder, RECORD, fill, lambda: load_folder(folder, RECORD, CommittedRecord, fingerprint) is not None)


def names(root) -> dict[str, str]:
    return {path.name: (path / "data.bin").read_bytes().decode() for path in sorted((root / "units").iterdir())}


def test_a_folder_is_known_by_its_fingerprint_and_bytes(tmp_path):
    with own_folder(tmp_path) as token:
        record = make(tmp_path, token, 3, "abc")
        folder = tmp_path / "units" / "00003"
        assert load_folder(folder, RECORD, CommittedRecord, "abc") == record
        assert load_folder(folder, RECORD, CommittedRecord, "other") is None
        (folder / "data.bin").write_bytes(b"contenu")
        assert load_folder(folder, RECORD, CommittedRecord, "abc") is None
        assert make(tmp_path, token, 3, "abc") == record  # what is damaged is replaced
        assert load_folder(folder, RECORD, CommittedRecord, "abc") == record


def test_who_lost_the_folder_commits_nothing(tmp_path):
    with own_folder(tmp_path) as token:
        pass
    with own_folder(tmp_path), pytest.raises(UserError, match="another build has taken this folder over"):
        make(tmp_path, token, 0, "abc")
    assert names(tmp_path) == {}


def test_a_failure_leaves_nothing(tmp_path):
    def fill(temporary):
        (temporary / "data.bin").write_bytes(b"x")
        raise OSError(28, "full")

    with own_folder(tmp_path) as token, pytest.raises(OSError, match="full"):
        make_folder(tmp_path, token, tmp_path / "units" / "00000", RECORD, fill, lambda: False)
    assert names(tmp_path) == {}


def test_folders_come_home_by_fingerprint(tmp_path):
    with own_folder(tmp_path) as token:
        for number, name in enumerate("abcd"):
            make(tmp_path, token, number, name, name.encode())
    (tmp_path / "units" / ".tmp-00007-ab").mkdir()
    (tmp_path / "units" / "00002").rename(tmp_path / "units" / "moved-c")  # a kill in the middle of an earlier settling
    settle_folders(tmp_path / "units", RECORD, ["d", "x", "a", "c"])
    assert names(tmp_path) == {"00000": "d", "00002": "a", "00003": "c"}
    settle_folders(tmp_path / "units", RECORD, ["a"])
    assert names(tmp_path) == {"00000": "a"}
    settle_folders(tmp_path / "nowhere", RECORD, ["a"])
