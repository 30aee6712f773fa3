"""For tests of sources: files in a folder, everything that a source gives, and how it is refused."""

from pathlib import Path

import pytest

from configs.data_section import DataSection, SourceSection
from configs.errors import UserError
from data_pipeline.sources import plan_units, read_unit

NOWHERE = Path("/nowhere")


def put(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def items_of(source: SourceSection, work_unit_bytes: int = 16_000_000, scratch: Path | None = None):
    """Everything a source gives, and the hashes told on the way."""
    plan = plan_units(DataSection(root=str(NOWHERE), sources=(source,), work_unit_bytes=work_unit_bytes))
    hashed: list[tuple[str, str, int]] = []
    told = lambda file, digest, num_bytes: hashed.append((file.name, digest, num_bytes))  # noqa: E731
    return [item for unit in plan.units for item in read_unit(unit, 10_000, scratch, told)], plan, hashed


def refused(tmp_path: Path, *sources: SourceSection) -> str:
    with pytest.raises(UserError) as caught:
        plan_units(DataSection(root=str(NOWHERE), sources=sources))
    assert len(str(caught.value)) < 500 + len(str(tmp_path)) * 3
    return str(caught.value)
