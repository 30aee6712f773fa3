"""One rank's files: any program that knows safetensors reads them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from pretrain.checkpoint.image import DTYPES, Image


def drawn(dtype: torch.dtype, count: int) -> torch.Tensor:
    integers = torch.randint(0, 100, (count,))
    return (integers > 50) if dtype == torch.bool else integers.to(dtype)


def test_the_library_reads_what_was_written(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    tensors = {f"weight|{name}|{count}": drawn(dtype, count) for name, dtype in DTYPES.items() for count in (1, 7, 64)}
    records = Image(3, tensors, {"parameters": {}}).write(tmp_path)
    read = load_file(tmp_path / "rank_00003.safetensors")
    assert read.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype
        assert torch.equal(read[key], tensor), key
    content, about = (tmp_path / "rank_00003.safetensors").read_bytes(), json.loads((tmp_path / "rank_00003.json").read_text())
    length = int.from_bytes(content[:8], "little")
    assert about == {"parameters": {}, "header_bytes": 8 + length, "tensors": json.loads(content[8 : 8 + length])}
    assert {name: record["bytes"] for name, record in records.items()} == {path.name: path.stat().st_size for path in tmp_path.iterdir()}


def test_a_rank_without_a_slice_writes_an_empty_file(tmp_path: Path) -> None:
    Image(0, {}, {}).write(tmp_path)
    assert load_file(tmp_path / "rank_00000.safetensors") == {}


def test_each_changed_tensor_is_named(seed: int) -> None:
    torch.manual_seed(seed)
    tensors = {f"weight|{name}|0": torch.randn(20) for name in "abc"}
    image = Image(0, tensors, {})
    memory = torch.zeros(len(image), dtype=torch.uint8)
    image.copy_into(memory)
    assert image.differences(memory) == []
    tensors["weight|b|0"][7] += 1
    assert image.differences(memory) == ["weight|b|0"]
