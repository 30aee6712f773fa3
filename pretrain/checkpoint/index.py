"""Where each range of each parameter lies in a commit, and its elements, verified.

In: a commit. Out: any range of any weight, moment or buffer, whatever stage and number of ranks wrote it. The bytes that are given out are
the ones that were hashed. Nothing is unpickled; no DeepSpeed.
"""

import hashlib
import json
from collections import defaultdict
from math import prod
from typing import Any, NamedTuple

import torch

from pretrain.checkpoint.blocks import DamageError, VerifiedFiles
from pretrain.checkpoint.image import DTYPES, description_file, tensors_file
from pretrain.checkpoint.verify import Commit

WEIGHT, BUFFER = "weight", "buffer"


class _Place(NamedTuple):
    """A run of elements in a file."""

    first: int
    """Counted in the flattened tensor."""
    num_elements: int
    file: str
    position: int
    """Of its first byte in the file."""
    dtype: torch.dtype


class FragmentIndex:
    """Reads no tensor until asked. Use as a context manager, or `close` it."""

    def __init__(self, commit: Commit) -> None:
        """Raises DamageError, naming the file, where something is damaged, has a gap or an overlap."""
        self.folder = commit.files_folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of every parameter."""
        self.scalars: dict[str, dict[str, float]] = {}
        """Of every parameter that is trained: what the optimizer keeps beside its moments (the step)."""
        self.buffers: dict[str, tuple[int, ...]] = {}
        self._files = VerifiedFiles(commit.files_folder, commit.files)
        self._places: dict[tuple[str, str], list[_Place]] = defaultdict(list)
        for rank in range(commit.world_size):
            self._read_rank(rank)
        self._check_coverage()

    def description(self, rank: int) -> dict[str, Any]:
        """What a rank said beside its tensors. Raises DamageError."""
        name = description_file(rank)
        content = self._files.read(name)
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DamageError(f"{self.folder / name}: {error}") from None
        if not isinstance(found, dict):
            raise DamageError(f"{self.folder / name}: not a mapping")
        return found

    def _read_rank(self, rank: int) -> None:
        about, name = self.description(rank), tensors_file(rank)
        try:
            if rank == 0:
                self.loss_scale: dict[str, float] = about["loss_scale"]
                self.groups: list[dict[str, Any]] = about["groups"]
            for parameter, known in about["parameters"].items():
                self.shapes[parameter] = tuple(map(int, known["shape"]))
                self.scalars.setdefault(parameter, {}).update(known["scalars"])
            self.buffers |= {buffer: tuple(map(int, shape)) for buffer, shape in about["buffers"].items()}
            size = self._files.records[name]["bytes"]
            start = int(about["header_bytes"])
            for key, entry in about["tensors"].items():
                kind, tensor, first = key.split("|")
                low, high = (start + int(offset) for offset in entry["data_offsets"])
                dtype, count = DTYPES[entry["dtype"]], prod(entry["shape"])
                if not 0 <= start <= low <= high <= size or high - low != count * dtype.itemsize:
                    raise ValueError(f"{key} has {count} elements and bytes {low} to {high} of {size}")
                self._places[kind, tensor].append(_Place(int(first), count, name, low, dtype))
        except DamageError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamageError(f"{self.folder / name}: is not as a rank writes it ({type(error).__name__}: {error})") from None

    def _check_coverage(self) -> None:
        """Every element of every tensor exactly once."""
        for parameter in self.shapes:
            if (WEIGHT, parameter) not in self._places:
                raise DamageError(f"{self.folder}: the weight of {parameter} is missing")
        for (kind, name), places in self._places.items():
            shape = self.buffers.get(name) if kind == BUFFER else self.shapes.get(name)
            if shape is None:
                raise DamageError(f"{self.folder}: {kind} of {name}, which no rank described")
            places.sort()
            position = 0
            for place in places:
                if place.first != position:
                    what = "a gap" if place.first > position else "an overlap"
                    raise DamageError(f"{self.folder / place.file}: {kind} of {name} has {what} at element {position}")
                position += place.num_elements
            if position != prod(shape):
                raise DamageError(f"{self.folder}: {kind} of {name} ends at element {position}, its shape is {shape}")

    def kinds(self, parameter: str) -> set[str]:
        """What is stored of a parameter: `weight` and the names of its optimizer's moments."""
        return {kind for kind, name in self._places if name == parameter and kind != BUFFER}

    def read(self, kind: str, name: str, start: int, count: int) -> torch.Tensor:
        """Elements [start, start + count) of a flattened tensor, shape [count], in the dtype it was written in.

        Raises KeyError if it is not stored, DamageError where it is not what was committed.
        """
        result = torch.empty(count, dtype=self._places_of(kind, name)[0].dtype)
        self._read_into(kind, name, start, result)
        return result

    def fill(self, target: torch.Tensor, kind: str, name: str, start: int) -> None:
        """Elements [start, start + count) of a flattened tensor into `target`, shape [count], of any dtype, on any device.

        Raises as `read` does; `target` may then be partly filled.
        """
        if target.device.type == "cpu" and target.is_contiguous() and target.dtype == self._places_of(kind, name)[0].dtype:
            self._read_into(kind, name, start, target.detach())
        else:
            target.copy_(self.read(kind, name, start, target.numel()))

    def _places_of(self, kind: str, name: str) -> list[_Place]:
        places = self._places.get((kind, name))
        if places is None:
            raise KeyError((kind, name))
        return places

    def _read_into(self, kind: str, name: str, start: int, target: torch.Tensor) -> None:
        count, size = target.numel(), target.element_size()
        content = target.view(torch.uint8).numpy().data if count else memoryview(b"")
        for place in self._places_of(kind, name):
            low, high = max(place.first, start), min(place.first + place.num_elements, start + count)
            if low < high:
                part = content[(low - start) * size : (high - start) * size]
                self._files.read_into(place.file, place.position + (low - place.first) * size, part)

    def read_whole(self, kind: str, name: str) -> torch.Tensor:
        """A weight, a moment or a buffer in its shape. Raises as `read` does."""
        shape = self.buffers[name] if kind == BUFFER else self.shapes[name]
        return self.read(kind, name, 0, prod(shape)).view(shape)

    def weights(self) -> dict[str, torch.Tensor]:
        """Every parameter and buffer whole: what a single-device model loads."""
        found = {name: self.read_whole(WEIGHT, name) for name in self.shapes}
        return found | {name: self.read_whole(BUFFER, name) for name in self.buffers}

    def close(self) -> None:
        """Forget what was read ahead."""
        self._files.close()

    def __enter__(self) -> "FragmentIndex":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def state_hash(commit: Commit) -> str:
    """SHA-256 over everything that training goes on from: weights, moments, buffers, steps, the optimizer's settings, the scale of the
    loss, the counters of the run. By name: the same for every stage and world size."""
    digest = hashlib.sha256()
    with FragmentIndex(commit) as index:
        digest.update(json.dumps([commit.state.to_json(), index.groups, index.loss_scale], sort_keys=True).encode())
        for name in sorted(index.shapes):
            digest.update(f"{name}{index.shapes[name]}{sorted(index.scalars[name].items())}".encode())
            for kind in sorted(index.kinds(name)):
                digest.update(kind.encode() + index.read_whole(kind, name).view(-1).view(torch.uint8).numpy().tobytes())
        for name in sorted(index.buffers):
            digest.update(name.encode() + index.read_whole(BUFFER, name).view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
