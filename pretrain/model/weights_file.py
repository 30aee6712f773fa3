"""Weights in safetensors shards: written in bounded memory, read by rows, and known by their hashes.

In: named tensors that come in pieces, or a folder of shards. Out: the other one. No pickle is ever opened.
A folder that `pretrain import` made holds them under our parameters' names, with `imported.json`, written last:
    {"format": 1, "files": {name: {"bytes": ..., "sha256": ...}}}
"""

import functools
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from configs.durable import sha256_of_file, write_file
from configs.errors import UserError

SHARD_BYTES = 2_000_000_000
PIECE_ELEMENTS = 1 << 24
"""Elements of a parameter that are in memory at once, where it can be read by ranges."""
IMPORTED = "imported.json"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""What weights may be stored in, and what safetensors calls it."""


@dataclass(frozen=True)
class NamedTensor:
    """A tensor to be written: its flattened elements, in order, in pieces."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def ranges(num_elements: int) -> Iterator[tuple[int, int]]:
    """(start, count) of the pieces in which so many elements are read."""
    for start in range(0, num_elements, PIECE_ELEMENTS):
        yield start, min(PIECE_ELEMENTS, num_elements - start)


def write_shards(folder: Path, name: str, tensors: Sequence[NamedTensor], shard_bytes: int = SHARD_BYTES) -> dict[str, dict[str, Any]]:
    """Write NAME.safetensors, or NAME-00001-of-0000N.safetensors with NAME.safetensors.index.json, in Hugging Face's form.

    A shard is larger than `shard_bytes` only where it holds a single tensor. In memory is one piece at a time. Returns file name
    -> {bytes, sha256}, the index included. Raises OSError.
    """
    shards: list[list[NamedTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(one.num_bytes for one in shards[-1]) + tensor.num_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        return {f"{name}.safetensors": _write_shard(folder / f"{name}.safetensors", shards[0])}
    names = [f"{name}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    files = {file: _write_shard(folder / file, shard) for file, shard in zip(names, shards, strict=True)}
    index = {
        "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)},
        "weight_map": {tensor.name: file for file, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    path = folder / f"{name}.safetensors.index.json"
    write_file(path, (json.dumps(index, indent=1) + "\n").encode())
    return files | {path.name: described(path)}


def described(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def _write_shard(path: Path, tensors: Sequence[NamedTensor]) -> dict[str, Any]:
    """The safetensors library writes only what is whole in memory; the format is a length, a JSON header, and the bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.num_bytes
        header[tensor.name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:

        def write(part: bytes) -> None:
            nonlocal size
            file.write(part)
            digest.update(part)
            size += len(part)

        write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            for piece in tensor.pieces():
                write(piece.to(tensor.dtype).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        if size != 8 + len(text) + position:
            raise ValueError(f"{path}: {size} bytes were written, its header says {8 + len(text) + position}")
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


class Shards:
    """Tensors in safetensors files. Reads no value until asked, and then only the rows that are asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Raises UserError for a file that is no safetensors file or holds numbers of another kind than weights have."""
        self.places: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        by_name = {name: dtype for dtype, name in DTYPES.items()}
        for path in files:
            try:
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                        rows = file.get_slice(name)
                        self.places[name], self.shapes[name] = (path, name), tuple(rows.get_shape())
                        self.dtypes[name] = by_name.get(rows.get_dtype(), torch.uint8)
            except Exception as error:  # the library raises its own type, and OSError for a file that is not there
                raise UserError(f"{path}: cannot be read as safetensors ({error}).") from None

    def rename(self, old: str, new: str) -> None:
        """Know the tensor `old` as `new`; what is stored stays as it is."""
        self.places[new] = self.places.pop(old)
        self.shapes[new] = self.shapes.pop(old)
        self.dtypes[new] = self.dtypes.pop(old)

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Rows [first, end), in the dtype they are stored in. KeyError for a name that is not there."""
        path, stored = self.places[name]
        with safe_open(path, "pt") as file:
            return file.get_slice(stored)[first:end]

    def read(self, name: str, start: int, count: int) -> torch.Tensor:
        """Elements [start, start + count) of a flattened tensor, in the dtype they are stored in. KeyError likewise."""
        row_size = torch.Size(self.shapes[name][1:]).numel()
        low, high = start // row_size, -(-(start + count) // row_size)
        return self.rows(name, low, high).reshape(-1)[start - low * row_size :][:count]


class ImportedWeights:
    """The weights in a folder that `pretrain import` made, by our names. A file is compared with its hash before it is first read."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError for a folder that is no import, or not whole."""
        self.folder = folder
        try:
            self._files: dict[str, dict[str, Any]] = json.loads((folder / IMPORTED).read_bytes())["files"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"model.initial_weights: {folder} holds no imported weights (no {IMPORTED} that can be read); make them with "
                f"`pretrain import MODEL_DIR {folder}`."
            ) from None
        self._verified: set[str] = set()
        self._shards = Shards([folder / name for name in self._files if name.endswith(".safetensors")])

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A whole parameter, fp32. Raises UserError when it is not there, has another shape, or its file is not what was imported."""
        found = self._shards.shapes.get(name)
        if found != tuple(shape):
            there = f"no {name}" if found is None else f"{name} of shape {found}"
            raise UserError(
                f"model.initial_weights: {self.folder} has {there}, the model wants {name} of shape {tuple(shape)}; "
                f"take the `model:` section of {self.folder / 'model.yaml'} as it is."
            )
        return self.read_range(name, 0, torch.Size(shape).numel()).view(shape)

    def read_range(self, name: str, start: int, count: int) -> torch.Tensor:
        """Elements [start, start + count) of a flattened parameter, fp32. KeyError if it is not there."""
        path, _ = self._shards.places[name]
        if path.name not in self._verified:
            if described(path) != self._files[path.name]:
                raise UserError(f"{path} is not the file that was imported (its SHA-256 differs); import it again.")
            self._verified.add(path.name)
        return self._shards.read(name, start, count).float()


@functools.lru_cache(maxsize=1)
def imported_weights(folder: str) -> ImportedWeights:
    """The weights that `model.initial_weights` names, opened once. Raises UserError."""
    return ImportedWeights(Path(folder))
