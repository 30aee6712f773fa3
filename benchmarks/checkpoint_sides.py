"""One rank of benchmarks/checkpoint.py: saves and loads of one engine, ours and the peers', taking turns.

Run by benchmarks/checkpoint.py: python benchmarks/checkpoint_sides.py RUN_FILE FOLDER ROUNDS STEPS, with the variables of a rank in the
environment. Out: rank 0 prints a line of JSON: what each side answered in each round, the slowest rank's times, in seconds.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
import torch.distributed.checkpoint as peer

from configs.loader import load_config
from pretrain.checkpoint.arena import Arena
from pretrain.checkpoint.blocks import BLOCK_BYTES
from pretrain.checkpoint.commit import Saves
from pretrain.checkpoint.fragments import image_of, owned_bytes, prepare_weights, read_fragments, refresh_weights
from pretrain.checkpoint.image import description_file, tensors_file
from pretrain.checkpoint.index import FragmentIndex
from pretrain.checkpoint.places import Place
from pretrain.checkpoint.random_state import describe_random_state
from pretrain.checkpoint.verify import list_commits, read_commit
from pretrain.engine.parallel import initialize_layout
from pretrain.engine.setup import construct_model, initialize_engine
from pretrain.state import TrainState
from pretrain.train import start_writing

Seconds = dict[str, float]


class Bench:
    """An engine that has taken a step, and what is done with it."""

    def __init__(self, run_file: Path, folder: Path, steps: int) -> None:
        self._layout = initialize_layout()
        config = load_config(run_file, [])
        self._engine = initialize_engine(config, self._layout, construct_model(config, self._layout))
        self._folder, self._steps, self._number = folder, steps, 0
        shape = (config.training.micro_batch_samples, config.training.sequence_length)
        self._tokens_BT = torch.randint(0, config.model.vocabulary_size, shape, generator=torch.Generator().manual_seed(1))
        self._train(1)
        self._arena = Arena(owned_bytes(self._engine))
        self._place = Place(folder / "checkpoints")
        self._saves = Saves([self._place], 1, lambda: True)
        self._image = image_of(self._engine, self._layout.rank, self._layout.world_size, {"random": describe_random_state()})
        self._content = torch.empty(len(self._image), dtype=torch.uint8)
        self._image.copy_into(self._content)
        self._group = distributed.new_group(backend="gloo")  # DCP's own: its thread speaks while we do

    def num_bytes(self) -> int:
        """Of a save, over all ranks."""
        return sum(self._layout.gather(len(self._image)))

    def _train(self, steps: int) -> None:
        for _ in range(steps):
            loss = self._engine(self._tokens_BT, self._tokens_BT)
            self._engine.backward(loss / self._tokens_BT.numel(), scale_wrt_gas=False)
            self._engine.step()

    def _begin(self) -> None:
        self._number += 1
        about: dict[str, Any] = {"state": TrainState(self._number), "identity": {}, "code": {}, "loss": 1.0}
        self._saves.begin(self._place, lambda folder: start_writing(self._engine, self._arena, self._layout, folder), **about)

    def _settle(self) -> None:
        if problem := self._saves.settle():
            raise SystemExit(problem)

    @contextmanager
    def _file(self) -> Iterator[Path]:
        """A name to write to; what was written is removed, outside of the time that is taken."""
        path = self._folder / f"plain-{self._layout.rank}"
        yield path
        path.unlink()

    # --- sides: each returns its times ---

    def asynchronous(self) -> Seconds:
        """As the loop saves: the stall, the time until this rank's files are on the disk, and until the commit."""
        began = time.perf_counter()
        self._begin()
        stalled = time.perf_counter()
        while not self._saves.is_written:
            time.sleep(0.001)
        written = time.perf_counter()
        self._settle()
        return {"stall": stalled - began, "written": written - began, "total": time.perf_counter() - began}

    def synchronous(self) -> Seconds:
        """`checkpoint.asynchronous: false`: copy, write, commit, and nothing else meanwhile."""
        began = time.perf_counter()
        self._begin()
        self._settle()
        return {"total": time.perf_counter() - began}

    def write_plainly(self) -> Seconds:
        """The same bytes by a loop, synced: what the disk takes."""
        view = self._content.numpy().data
        with self._file() as path:
            began = time.perf_counter()
            with path.open("wb", buffering=0) as file:
                for first in range(0, len(view), BLOCK_BYTES):
                    file.write(view[first : first + BLOCK_BYTES])
                os.fsync(file.fileno())
            seconds = time.perf_counter() - began
        return {"total": seconds}

    def torch_save(self) -> Seconds:
        """torch.save of the same tensors, synced: training waits for all of it."""
        with self._file() as path:
            began = time.perf_counter()
            with path.open("wb") as file:
                torch.save(self._image._tensors, file)
                file.flush()
                os.fsync(file.fileno())
            seconds = time.perf_counter() - began
        return {"total": seconds}

    def dcp(self) -> Seconds:
        """torch.distributed.checkpoint's async_save of the same tensors, as torchtitan calls it."""
        folder = self._folder / "dcp"
        began = time.perf_counter()
        future: Any = peer.async_save(dict(self._image._tensors), checkpoint_id=folder, process_group=self._group)
        stalled = time.perf_counter()
        future.result()
        ended = time.perf_counter()
        distributed.barrier()
        if self._layout.rank == 0:
            shutil.rmtree(folder)
        return {"stall": stalled - began, "total": ended - began}

    def load(self) -> Seconds:
        """Verify and fill the engine from the newest commit, which no memory holds."""
        folder = self._newest()
        began = time.perf_counter()
        prepare_weights(self._engine)
        with FragmentIndex(read_commit(folder)) as index:
            read_fragments(self._engine, index)
        seconds = time.perf_counter() - began
        refresh_weights(self._engine)
        return {"total": seconds}

    def read_plainly(self) -> Seconds:
        """This rank's files of it by a loop: what the disk gives."""
        folder, target = self._newest(), bytearray(BLOCK_BYTES)
        began = time.perf_counter()
        for name in (tensors_file(self._layout.rank), description_file(self._layout.rank)):
            with (folder / name).open("rb", buffering=0) as file:
                while file.readinto(target):
                    pass
        return {"total": time.perf_counter() - began}

    def steps(self) -> Seconds:
        """Some steps, and as many behind the beginning of a save."""
        began = time.perf_counter()
        self._train(self._steps)
        saved = time.perf_counter()
        self._begin()
        self._train(self._steps)
        ended = time.perf_counter()
        self._settle()
        return {"undisturbed": saved - began, "behind a save": ended - saved}

    def _newest(self) -> Path:
        """The newest commit, dropped from the page cache; the older ones are removed."""
        newest, *older = list_commits(self._place.checkpoints)
        distributed.barrier()
        if self._layout.rank == 0:
            for folder in older:
                shutil.rmtree(folder)
        for path in newest.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        distributed.barrier()
        return newest

    def take_turns(self, rounds: int) -> dict[str, list[Seconds]]:
        """Every side in every round; a first round, in which memory is touched and processes start, is not counted."""
        order = (
            self.asynchronous,
            self.write_plainly,
            self.synchronous,
            self.torch_save,
            self.dcp,
            self.load,
            self.read_plainly,
            self.steps,
        )
        sides: dict[str, Callable[[], Seconds]] = {side.__name__: side for side in order}
        found: dict[str, list[Seconds]] = {name: [] for name in sides}
        for number in range(rounds + 1):
            for name, side in sides.items():
                distributed.barrier()
                answers = self._layout.gather(side())
                if number:
                    found[name].append({key: max(answer[key] for answer in answers) for key in answers[0]})
        self._arena.close()
        return found


if __name__ == "__main__":
    bench = Bench(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[4]))
    answer = {"bytes": bench.num_bytes(), "sides": bench.take_turns(int(sys.argv[3]))}
    if os.environ["RANK"] == "0":
        print(json.dumps(answer), flush=True)
    distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of libraries sometimes abort at the interpreter's own end
