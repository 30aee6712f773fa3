"""Files behind URLs: listed with what tells a change, copied whole or in part for as long as they are read, tried again."""

import gzip
import json
import random
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from configs.data_section import DataSection, SourceSection
from configs.errors import UserError
from data_pipeline import fetch, json_lines
from data_pipeline.documents import Document, TokenDocument
from data_pipeline.fetch import local_copy, open_file
from data_pipeline.shards import ShardWriter
from data_pipeline.sources import plan_units, read_unit

NOWHERE = Path("/nowhere")


class Unsteady(MemoryFileSystem):
    """A store that fails as often as it is told to, and counts the bytes that it gives."""

    protocol = "memory"
    failures = 0
    served = 0

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.fail()
        content = super().cat_file(path, start, end, **kwargs)
        Unsteady.served += len(content)
        return content

    def get_file(self, rpath, lpath, **kwargs):
        self.fail()
        super().get_file(rpath, lpath, **kwargs)
        Unsteady.served += Path(lpath).stat().st_size

    def fail(self):
        if Unsteady.failures:
            Unsteady.failures -= 1
            raise RuntimeError("the line broke")  # transports have exceptions of their own


@pytest.fixture
def store(monkeypatch):
    """A store in memory, behind `memory://`, that waits for nothing."""
    fsspec.register_implementation("memory", Unsteady, clobber=True)
    monkeypatch.setattr(fetch, "WAIT_SECONDS", (0.0, 0.0, 0.0))
    system = fsspec.filesystem("memory")
    Unsteady.failures = Unsteady.served = 0
    yield system
    system.rm("/", recursive=True)
    fsspec.register_implementation("memory", MemoryFileSystem, clobber=True)


def plan(path: str, work_unit_bytes: int = 16_000_000, **keys):
    source = SourceSection(name="mine", path=path, **keys)
    return plan_units(DataSection(root=str(NOWHERE), sources=(source,), work_unit_bytes=work_unit_bytes))


def read(made, scratch: Path | None = None):
    hashed: list[tuple[str, int]] = []
    items = [
        item for unit in made.units for item in read_unit(unit, 10_000, scratch, lambda file, _, size: hashed.append((file.name, size)))
    ]
    return items, hashed


def lines(number: int) -> bytes:
    return "".join(json.dumps({"text": f"naïve line {line}", "id": line}, ensure_ascii=False) + "\n" for line in range(number)).encode()


def test_files_folders_and_globs(store):
    for name in ("a.txt", "sub/b.jsonl", "sub/deep/c.txt", "sub/d.png", ".hidden/e.txt", "sub/.f.txt"):
        store.pipe(f"/data/{name}", b'{"text": "a"}\n')
    assert [file.name for file in plan("memory://data").files] == ["a.txt", "sub/b.jsonl", "sub/deep/c.txt"]
    assert plan("memory://data/").skipped == {".png": 1}
    assert [file.location for file in plan("memory://data/sub/b.jsonl").files] == ["memory:///data/sub/b.jsonl"]
    assert [file.name for file in plan("memory://data/*/*.jsonl").files] == ["sub/b.jsonl"]
    assert [file.name for file in plan("memory://data/s*").files] == ["sub/b.jsonl", "sub/deep/c.txt"]
    assert [file.name for file in plan("memory://data", pattern="*.txt").files] == ["a.txt"]
    assert [file.name for file in plan("memory://*/*.txt").files] == ["data/a.txt"] and len(read(plan("memory://*/*.txt"))[0]) == 1
    items, hashed = read(plan("memory://data"))
    assert [item.text for item in items] == ['{"text": "a"}\n', "a", '{"text": "a"}\n'] and len(hashed) == 3


def test_parts_of_remote_lines_are_fetched_alone(store, tmp_path, seed, monkeypatch):
    """The parts give what the whole gives; together they fetch little more than the file has."""
    chosen = random.Random(seed)
    monkeypatch.setattr(json_lines, "BLOCK_BYTES", 64)
    for number in range(20):
        content = lines(chosen.randrange(1, 80)) + chosen.choice([b"", b"no end", b"\n\n", b'{"text": "' + b"x" * 900 + b'"}'])
        (tmp_path / "a.jsonl").write_bytes(content)
        store.pipe(f"/{number}/a.jsonl", content)
        size = chosen.randrange(50, 1500)
        local, _ = read(plan(str(tmp_path / "a.jsonl"), size))
        made = plan(f"memory://{number}/a.jsonl", size)
        Unsteady.served = 0
        remote, hashed = read(made, tmp_path)
        assert [(item.position, item.text) for item in remote if isinstance(item, Document)] == [
            (item.position, item.text) for item in local if isinstance(item, Document)
        ]
        assert len(remote) == len(local) and sum(size for _, size in hashed) == len(content)
        assert Unsteady.served <= len(content) + 1100 * len(hashed)
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]  # no copy is left


def test_parts_of_a_remote_parquet_file(store, tmp_path):
    rows = pa.table(
        {"text": [f"row {row} " + "x" * 1000 for row in range(500)], "id": range(500), "more": [str(row) * 50 for row in range(500)]}
    )
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=50, compression="none", use_dictionary=False)
    store.pipe("/data/a.parquet", (tmp_path / "a.parquet").read_bytes())
    local, _ = read(plan(str(tmp_path / "a.parquet")))
    made = plan("memory://data", 60_000)
    assert len(made.units) == 10
    remote, hashed = read(made)
    assert remote == local and hashed == [("a.parquet", made.files[0].num_bytes)]
    assert Unsteady.served < 2.4 * made.files[0].num_bytes  # the first part fetches all, to hash it


def test_compressed_files_and_shards_are_copied_whole(store, tmp_path):
    store.pipe("/data/a.jsonl.gz", gzip.compress(lines(100)))
    assert len(read(plan("memory://data", 100))[0]) == 100
    with ShardWriter(tmp_path / "a", np.dtype(np.uint16)) as shard:
        shard.add_document(np.arange(5))
    for name in ("a.bin", "a.idx"):
        store.pipe(f"/shards/{name}", (tmp_path / name).read_bytes())
    for path in ("memory://shards", "memory://shards/a", "memory://shards/*"):
        items, hashed = read(plan(path, format="megatron"))
        assert [item.tokens.tolist() for item in items if isinstance(item, TokenDocument)] == [[0, 1, 2, 3, 4]]
        assert hashed == [("a.bin", sum((tmp_path / name).stat().st_size for name in ("a.bin", "a.idx")))]


def test_a_function_is_given_the_copy(store, tmp_path, monkeypatch):
    (tmp_path / "my_lines.py").write_text("def lines(path, field):\n    yield from ({field: line} for line in path.open())\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    store.pipe("/data/a.odd", b"one\ntwo\n")
    items, hashed = read(plan("memory://data", format="my_lines:lines", settings={"field": "text"}))
    assert [item.text for item in items] == ["one\n", "two\n"] and hashed == [("a.odd", 8)]


def test_a_transfer_is_tried_four_times(store):
    store.pipe("/data/a.jsonl", lines(100))
    made = plan("memory://data/a.jsonl", 1000)
    Unsteady.failures = 3
    assert len(read(made)[0]) == 100 and Unsteady.failures == 0
    Unsteady.failures = 4
    with pytest.raises(OSError, match=r"memory:///data/a.jsonl: RuntimeError: the line broke \(tried 4 times\)"):
        read(made)


def test_a_remote_file_that_changes_is_noticed(store):
    store.pipe("/data/a.jsonl", lines(10))
    made = plan("memory://data/a.jsonl")
    store.pipe("/data/a.jsonl", lines(10))  # the same bytes, written again: the store cannot tell
    with pytest.raises(UserError, match=r"memory:///data/a.jsonl was changed"):
        read(made)
    store.rm("/data/a.jsonl")
    with pytest.raises(FileNotFoundError):
        read(made)


def test_refusals(store):
    def refused(path: str, **keys) -> str:
        with pytest.raises(UserError) as caught:
            plan(path, **keys)
        return str(caught.value)

    store.pipe("/data/a.png", b"a")
    store.pipe("/data/b.jsonl", b'{"body": 1}')
    assert "there is no memory://none" in refused("memory://none")
    assert "no usable file: found 1 .png" in refused("memory://data", pattern="*.png")
    assert "no field 'text'; set text_field to one of: body" in refused("memory://data")
    assert "a URL within a URL" in refused("zip://a.txt::memory://data/a.zip")
    assert "cannot be used" in refused("nosuch://data")
    store.pipe("/shards/a.bin", b"a")
    assert "has no .idx" in refused("memory://shards", format="megatron")
    with pytest.raises(UserError, match="is listed twice"):
        plan_units(
            DataSection(
                root=str(NOWHERE), sources=tuple(SourceSection(name=name, path="memory://shards/a.bin", format="text") for name in "ab")
            )
        )


def test_a_missing_transport_is_named(monkeypatch):
    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"'mine': s3://bucket/x cannot be read because a package is missing.*`pip install s3fs`"):
        plan("s3://bucket/x")


def test_a_copy_is_the_file_itself_where_that_is_local(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a")
    (file,) = plan(str(tmp_path)).files
    with local_copy(file) as path, open_file(file) as stream:
        assert path == tmp_path / "a.txt" and stream.read() == b"a"


def test_a_web_server(tmp_path, monkeypatch):
    """Its pages are the listing; one that knows no ranges gives whole files."""
    pytest.importorskip("aiohttp", reason="needs aiohttp, which pretrain[remote] brings")
    monkeypatch.setattr(fetch, "WAIT_SECONDS", (0.0, 0.0, 0.0))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_bytes(lines(100))
    (tmp_path / "data" / "b.txt").write_bytes(b"text")
    asked: Counter[str] = Counter()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, format, *arguments):
            asked[self.command] += 1

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        made = plan(f"{address}/data/", 1000)
        assert [file.name for file in made.files] == ["a.jsonl", "b.txt"] and made.files[0].version
        assert [file.part for unit in made.units for file in unit.files] == [None, None]
        assert len(read(made)[0]) == 101
        assert [file.name for file in plan(f"{address}/data/b.txt").files] == ["b.txt"]
        server.shutdown()
        thread.join()
    with pytest.raises(OSError, match="a.jsonl"):
        read(made)
    with pytest.raises(UserError, match="127.0.0.1"):
        plan(f"{address}/data/b.txt")
