"""One rank's files of a checkpoint as they will lie on the disk: a safetensors file and a JSON beside it.

In: named tensors, and what is to be said of them. Out: their bytes, into memory or into a folder. The format of the tensors is
safetensors' own (a length, a header in JSON, the bodies one after the other), so that any program that knows it can look inside; the
library writes only from whole dictionaries in memory and cannot say where a range lies. What lies where stands in the JSON, too: who looks
for a slice need not read the first block of every rank's tensors.
"""

import json
import struct
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.blocks import FileRecord, in_blocks, write_blocks

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""safetensors' names."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def tensors_file(rank: int) -> str:
    """Name of a rank's tensors."""
    return f"rank_{rank:05d}.safetensors"


def description_file(rank: int) -> str:
    """Name of what is said of them."""
    return f"rank_{rank:05d}.json"


class Image:
    """The bytes of one rank's two files. Nothing is copied before `copy_into` or `write`."""

    def __init__(self, rank: int, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        """tensors: flat and contiguous, by key; about: JSON."""
        self._rank = rank
        self._tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # each begins where its size divides
        header, position = {}, 0
        for key, tensor in self._tensors.items():
            size = tensor.numel() * tensor.element_size()
            header[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, position + size]}
            position += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = struct.pack("<Q", len(text)) + text
        self._about = json.dumps(about | {"header_bytes": len(self._header), "tensors": header}, indent=1).encode()
        self._num_bytes = len(self._header) + position

    def __len__(self) -> int:
        """Bytes of both files."""
        return self._num_bytes + len(self._about)

    @torch.no_grad()
    def copy_into(self, memory: torch.Tensor | None) -> list[tuple[str, int, int]]:
        """Copy both files into memory (uint8, at least as long), from its beginning; when it returns, they are there.

        Returns (name, first byte, bytes) of each.
        """
        assert memory is not None

        def put(first: int, content: bytes) -> int:
            memory[first : first + len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            return first + len(content)

        position = put(0, self._header)
        for tensor in self._tensors.values():
            end = position + tensor.numel() * tensor.element_size()
            if tensor.is_cuda:
                memory[position:end].view(tensor.dtype).copy_(tensor.detach(), non_blocking=True)
            else:
                memory[position:end].numpy()[:] = tensor.detach().view(torch.uint8).numpy()  # memcpy, faster than torch's own loop
            position = end
        put(position, self._about)
        if any(tensor.is_cuda for tensor in self._tensors.values()):
            torch.cuda.synchronize()
        return [(tensors_file(self._rank), 0, position), (description_file(self._rank), position, len(self._about))]

    @torch.no_grad()
    def differences(self, memory: torch.Tensor) -> list[str]:
        """Keys of tensors whose bytes are not those in memory, where an image of the same form was copied before."""
        position, different = len(self._header), list[str]()
        for key, tensor in self._tensors.items():
            end = position + tensor.numel() * tensor.element_size()
            if not torch.equal(memory[position:end], tensor.detach().cpu().view(torch.uint8)):
                different.append(key)
            position = end
        return different

    def write(self, folder: Path) -> dict[str, FileRecord]:
        """Write both files, synced, in this process. Returns name -> record. Raises OSError."""
        memory = torch.empty(len(self), dtype=torch.uint8)
        view = memory.numpy().data
        return {name: write_blocks(folder / name, in_blocks(view[first : first + size])) for name, first, size in self.copy_into(memory)}
