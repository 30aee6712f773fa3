"""Surveys: merged ones are those of one unit, byte for byte, and what does not fit is refused."""

import random
from pathlib import Path

import numpy as np
import pytest

from configs.data_section import DeduplicationSection
from data_pipeline.dedup import exact_partition
from data_pipeline.signature_files import Survey, content_hash, merge_surveys, write_survey
from tests.data_pipeline.surveys import NEAR, make_documents, write_units


def test_a_merged_survey_is_that_of_one_unit(tmp_path: Path, seed: int):
    documents = make_documents(random.Random(seed), 100, 10)
    parts = write_units(tmp_path / "parts", documents, [0, 0, 30, 31, 100, 100], NEAR)
    (whole,) = write_units(tmp_path / "whole", documents, [0, 100], NEAR)
    merged = tmp_path / "merged"
    merged.mkdir()
    merge_surveys(parts, merged)
    files = sorted(path.name for path in whole.iterdir())
    assert files == sorted(path.name for path in merged.iterdir()) == ["bands.npy", "exact.npy", "signatures.npy"]
    for name in files:
        assert (merged / name).read_bytes() == (whole / name).read_bytes()
        np.save(tmp_path / name, np.load(whole / name))
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_exact_only_needs_no_signatures(tmp_path: Path):
    survey = Survey(DeduplicationSection())
    survey.add(["one", "two", "one", ""])
    survey.add([])
    survey.add(["two", "\ud800", ""])
    survey.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["exact.npy"]
    assert exact_partition([tmp_path], 0, 1).documents.tolist() == [2, 4, 6]


def test_a_survey_of_other_rows_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="1 signatures for 2 documents"):
        write_survey(tmp_path, np.zeros((2, 2), dtype=np.uint64), [np.zeros((1, 8), dtype=np.uint32)], NEAR)


def test_a_content_hash_is_of_the_exact_text():
    hashes = {content_hash(text) for text in ("a", "A", "a ", "", "\ud800", "\udfff", "é", "e\u0301")}
    assert len(hashes) == 8 and all(len(found) == 16 for found in hashes)
