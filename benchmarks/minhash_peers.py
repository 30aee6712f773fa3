"""The other libraries that make MinHash signatures, each in a process of its own, of a Python that has it.

In: texts. Out: their signatures, and the seconds that these and their bands took. Nothing of ours is imported, as that
Python need not have it.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from minhash_pairs import SHINGLE_WORDS, string_shingles

Array = np.ndarray[Any, Any]
Sign = Callable[[Sequence[str]], tuple[Array, Array]]

PERMUTATIONS, BANDS = 128, 16
PACKAGE_OF = {"rensa on strings": "rensa", "datasketch": "datasketch", "datatrove": "datatrove"}
PEERS = tuple(PACKAGE_OF)


class Peer:
    """A library in a process of its own."""

    def __init__(self, name: str, python: str) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python, __file__, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        answer = json.loads(self._read() or '{"why": "its Python does not start"}')
        self.why: str | None = answer.get("why")
        self.label = f"{name} {answer.get('version', '')}".strip()

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def sign(self, texts: Sequence[str], folder: Path) -> tuple[float, Array]:
        """Seconds, and the signatures."""
        source, target = folder / "texts.json", folder / "signed.npy"
        source.write_text(json.dumps(texts), encoding="utf-8")
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([str(source), str(target)]) + "\n")
        self.process.stdin.flush()
        return float(json.loads(self._read())), np.load(target)

    def close(self) -> None:
        """End the process by ending its input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(name: str) -> None:
    """A peer's process: first line its version, then for each line (a file of texts, a file to write) the seconds taken."""
    try:
        sign = prepare_peer(name)
        sign(["some words to start with, of no interest to anybody"])  # models and tables are loaded once
        print(json.dumps({"version": version(PACKAGE_OF[name])}), flush=True)
    except Exception as error:  # whatever a library says when it cannot start is the reason in the table
        print(json.dumps({"why": f"{type(error).__name__}: {error}"[:200]}), flush=True)
        return
    for line in sys.stdin:
        source, target = json.loads(line)
        texts = json.loads(Path(source).read_text(encoding="utf-8"))
        started = time.perf_counter()
        signed, _ = sign(texts)
        seconds = time.perf_counter() - started
        np.save(target, (signed & np.uint64(0xFFFFFFFF)).astype(np.uint32))  # ours are of 32 bits, and the same stage judges all
        print(json.dumps(seconds), flush=True)


def prepare_peer(name: str) -> Sign:
    """A peer's function of texts to signatures [texts, permutations] and bands. Raises ImportError."""
    if name == "rensa on strings":
        from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

        def sign_rensa(texts: Sequence[str]) -> tuple[Array, Array]:
            matrix = RMinHash.digest_matrix_from_token_sets([string_shingles(text) for text in texts], PERMUTATIONS, 1)
            signed = np.array(matrix.to_rows(), dtype=np.uint32)
            return signed, pack_bands(signed)

        return sign_rensa
    if name == "datasketch":
        from datasketch import MinHash  # pyright: ignore[reportMissingImports]

        def sign_datasketch(texts: Sequence[str]) -> tuple[Array, Array]:
            sets = [[shingle.encode() for shingle in string_shingles(text)] for text in texts]
            signed = np.stack([sketch.hashvalues for sketch in MinHash.bulk(sets, num_perm=PERMUTATIONS)])
            return signed, pack_bands(signed)

        return sign_datasketch
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature  # pyright: ignore[reportMissingImports]

    step = MinhashDedupSignature(
        tempfile.mkdtemp(), MinhashConfig(n_grams=SHINGLE_WORDS, num_buckets=BANDS, hashes_per_bucket=PERMUTATIONS // BANDS)
    )

    def sign_datatrove(texts: Sequence[str]) -> tuple[Array, Array]:
        signed = np.array([step.get_signature(step.get_shingles(text)) for text in texts], dtype=np.uint64)
        signed = signed.reshape(len(texts), PERMUTATIONS)
        return signed, pack_bands(signed)

    return sign_datatrove


def pack_bands(signed: Array) -> Array:
    """The bands as their numbers side by side, the cheapest key there is."""
    return signed.reshape(len(signed), BANDS, -1).view(f"V{signed.itemsize * PERMUTATIONS // BANDS}")[:, :, 0]


if __name__ == "__main__":
    serve(sys.argv[1])
