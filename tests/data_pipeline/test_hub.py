"""Data sets of the hub, without a network."""

import json
import os

import pytest

from configs.data_section import SourceSection
from configs.errors import UserError
from data_pipeline.documents import Document, Rejected
from data_pipeline.sources import read_unit
from tests.data_pipeline.planning import items_of, put, refused


def test_hub_data_sets_without_a_network(tmp_path):
    """The library's own json format: files are its shards, each a part."""
    for number in range(3):
        rows = [{"body": f"{number} {row}", "id": row, "date": None} for row in range(number + 1)] + [{"body": None, "id": 9, "date": 1}]
        put(tmp_path, **{f"{number}_DOT_jsonl": "\n".join(map(json.dumps, rows)).encode()})
    source = SourceSection(
        name="mine", path="json", format="hub", text_field="body", id_field="id", metadata_fields=("date",),
        settings={"data_files": str(tmp_path / "*.jsonl")},
    )  # fmt: skip
    items, plan, hashed = items_of(source)
    assert [item.text for item in items if isinstance(item, Document)] == ["0 0", "1 0", "1 1", "2 0", "2 1", "2 2"]
    assert [item.reason for item in items if isinstance(item, Rejected)] == ["not_text"] * 3
    assert [item.position for item in items[:3]] == [0, 1, 2**32] and items[0].name == "0"
    assert [file.part for unit in plan.units for file in unit.files] == [(0, 3), (1, 3), (2, 3)] and hashed == []
    assert [(file.root, file.name, file.kind) for file in plan.files] == [("json", "train", "hub")]
    os.utime(tmp_path / "0.jsonl", (1, 1))
    with pytest.raises(UserError, match="was changed"):
        list(read_unit(plan.units[0], 1000))
    assert "no field 'text'" in refused(tmp_path, source.model_copy(update={"text_field": "text"}))
    missing = SourceSection(name="mine", path="no/such-data", format="hub")
    assert "the hub data set 'no/such-data'" in refused(tmp_path, missing)
