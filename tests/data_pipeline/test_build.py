"""The whole way: equal bytes however often it is cut off, exact counts, refusals that leave nothing behind."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from configs.data_section import DeduplicationSection, NearDuplicatesSection, RuleSection, SourceSection, TokenizerSection
from configs.errors import UserError
from data_pipeline import build as conductor
from data_pipeline.build import build_dataset
from data_pipeline.documents import identify_document
from data_pipeline.execution import open_here
from data_pipeline.manifest import load_manifest
from data_pipeline.ownership import own_folder
from data_pipeline.shards import Shard, read_spans
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.verify import verify_dataset

END = "<|endoftext|>"


def stored_texts(folder: Path) -> dict[tuple[str, int], str]:
    """Every document of a dataset by file and position, decoded from its tokens; checks the sidecar on the way."""
    manifest = load_manifest(folder)
    tokenizer = load_tokenizer(folder / "tokenizer.json", manifest.end_of_text)
    texts = {}
    for split in ("train", "held_out"):
        for record in manifest.shards(split):
            shard = Shard(folder / record.name)
            rows = read_spans(folder / record.name).to_pylist()
            assert [row["first_token"] for row in rows] == shard.document_starts[:-1].tolist()
            for number, row in enumerate(rows):
                *ids, end = shard.document(number).tolist()
                assert end == manifest.end_of_text_id and end not in ids and row["num_tokens"] == len(ids) + 1
                text = tokenizer.decode(ids, skip_special_tokens=False)
                assert row["num_bytes"] == len(text.encode())
                assert (row["file"], row["position"]) not in texts, "a document is stored twice"
                texts[row["file"], row["position"]] = text
    return texts


def test_text_comes_back_whole(corpus, data_for, build):
    (corpus / "nasty.txt").write_bytes(f"👨‍👩‍👧 \0 CRLF\r\n{END} e\u0301\ufeff tail ".encode())
    result = build(data_for(corpus))
    assert stored_texts(result.folder) == {
        (path.relative_to(corpus).as_posix(), 0): path.read_bytes().decode() for path in corpus.rglob("*.txt")
    }
    assert result.manifest.total("held_out").num_documents in range(1, 12)
    assert not any(path.name.startswith(".tmp") for path in result.folder.rglob("*"))


def test_counts_are_exact(tmp_path, data_for, build):
    """100 bad lines of 7 kinds among 1000 good ones, in three files and two compressions."""
    print("seed 5")
    chosen = random.Random(5)
    bad = {
        "bad_json": b'{"text": "cut', "bad_utf8": b'{"text": "\xff"}', "missing_field": b'{"body": "b"}', "not_text": b'{"text": 3}',
        "lone_surrogate": b'{"text": "\\ud800"}', "empty": b'{"text": ""}', "not_an_object": b"[1]",
    }  # fmt: skip
    reasons = [chosen.choice(list(bad)) for _ in range(100)]
    lines = [b'{"text": "good %d"}' % number for number in range(1000)] + [bad[reason] for reason in reasons]
    first, rest = lines[0], lines[1:]
    chosen.shuffle(rest)
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"\n".join([first, *rest[:400]]))
    (folder / "b.jsonl").write_bytes(b"\r\n".join(rest[400:700]) + b"\r\n")
    (folder / "c.jsonl").write_bytes(b"\n\n".join(rest[700:]))
    (folder / "damaged.jsonl.gz").write_bytes(b"\x1f\x8b")
    data = data_for(folder, quarantine_limit=0.2, work_unit_bytes=5_000)
    result = build(data)
    wanted = {reason: reasons.count(reason) for reason in sorted(set(reasons))} | {"damaged_file": 1}
    assert result.manifest.documents.model_dump() == {
        "read": 1101,
        "kept": 1000,
        "dropped": {},
        "quarantined": dict(sorted(wanted.items())),
    }
    assert sorted(stored_texts(result.folder).values()) == sorted(f"good {number}" for number in range(1000))
    named = [json.loads(line) for path in result.folder.rglob("quarantine.jsonl") for line in path.read_text().splitlines()]
    assert len(named) == 101
    for item in named:  # each record leads to the very bytes
        if item["reason"] != "damaged_file":
            content = (folder / item["file"]).read_bytes()
            assert content[item["offset"] :].startswith(bytes.fromhex(item["first_bytes"]))


def test_deduplication_loses_no_word_of_what_was_left_out(corpus, data_for, build):
    """What the survey put into quarantine and what rules dropped is still there to read, beside the duplicates."""
    (corpus / "bad.txt").write_bytes(b"\xff")
    (corpus / "short.txt").write_bytes(b"short")
    (corpus / "zz-copy.txt").write_bytes((corpus / "odd" / "text-01.txt").read_bytes())
    (corpus / "zz-near.txt").write_bytes((corpus / "odd" / "text-03.txt").read_bytes() + b" one")
    rules = (RuleSection(rule="length", settings={"min_characters": 10}),)
    twice = DeduplicationSection(near=NearDuplicatesSection())
    result = build(data_for(corpus, clean=rules, deduplicate=twice, quarantine_limit=1.0))
    counts = result.manifest.documents
    assert counts.dropped == {"exact_duplicate": 1, "near_duplicate": 1, "too_short": 1} and counts.quarantined == {"bad_utf8": 1}
    assert (counts.read, counts.kept) == (28, 24) and len(stored_texts(result.folder)) == 24
    named = [json.loads(line) for path in result.folder.rglob("quarantine.jsonl") for line in path.read_text().splitlines()]
    assert [(one["file"], one["reason"]) for one in named] == [("bad.txt", "bad_utf8")]
    for reason, file in (("exact_duplicate", "zz-copy"), ("near_duplicate", "zz-near"), ("too_short", "short")):
        example = json.loads((result.folder / "dropped" / f"{reason}.jsonl").read_text())
        assert (example["file"], example["reason"]) == (f"{file}.txt", reason)
        if reason == "near_duplicate":
            identity = identify_document("mine", "odd/text-03.txt", 0)
            assert example["survivor"] == {"document_id": identity, "source": "mine", "file": "odd/text-03.txt", "position": 0}
        else:
            assert "survivor" not in example
    assert result.report["sources"]["mine"]["dropped"] == counts.dropped
    assert not (result.folder / "survey").exists() and not (result.folder / "duplicates").exists()


def test_too_much_quarantine_stops_and_continues(corpus, data_for, build):
    for number in range(3):
        (corpus / f"bad-{number}.txt").write_bytes(b"\xff\xfe")
        (corpus / f"empty-{number}.txt").write_bytes(b"")  # counted, but nothing of it is lost
    with pytest.raises(UserError, match=r"3 of 30 documents cannot be used \(3 bad_utf8\).*units/0000\d/quarantine.jsonl") as caught:
        build(data_for(corpus, quarantine_limit=0.099))
    assert "finished units are kept" in str(caught.value)
    result = build(data_for(corpus, quarantine_limit=0.1))
    assert result.num_units_kept == result.num_units > 1
    assert result.manifest.documents.quarantined == {"bad_utf8": 3, "empty": 3}


def test_a_failing_rule_is_named_and_its_mending_goes_on(corpus, data_for, build, tmp_path, monkeypatch):
    """Nothing was finished: the mended run file is not held against what never came to be."""
    (tmp_path / "failing_rule.py").write_text("def judge(document):\n    raise TypeError('boom')\n")
    monkeypatch.syspath_prepend(tmp_path)
    wanted = r"no document passes data.clean: the rule failing_rule:judge failed on the document at position 0 of .*TypeError: boom"
    with pytest.raises(UserError, match=wanted):
        build(data_for(corpus, clean=(RuleSection(rule="failing_rule:judge"),)))
    assert build(data_for(corpus)).outcome == "built"


def test_a_setting_that_no_rule_can_take_is_refused_before_anything_is_there(corpus, data_for, build):
    data = data_for(corpus, clean=(RuleSection(rule="gopher_quality", settings={"min_words": "many"}),))
    with pytest.raises(UserError, match=r"^data.clean\[0\] \(gopher_quality\): setting 'min_words': found \"many\", wanted"):
        build(data)
    assert not Path(data.folder()).exists()


def test_a_failing_reader_of_ones_own_is_named(corpus, data_for, build, tmp_path, monkeypatch):
    (tmp_path / "failing_reader.py").write_text("def read(path):\n    raise ValueError('boom')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"data source 'mine': failing_reader:read failed on .*text-00.txt: ValueError: boom; mend that"):
        build(data_for(corpus, format="failing_reader:read"))


def test_datasets_below_a_source_are_no_input(corpus, data_for, build):
    rules = (RuleSection(rule="length", settings={"max_characters": 10}),)
    with pytest.raises(UserError, match="no usable text"):
        build(data_for(corpus, root="corpus/unfinished", clean=rules, tokenizer=TokenizerSection(path=str(tokenizer_file(corpus.parent)))))
    inside = build(data_for(corpus, root="corpus/inside"))
    outside = build(data_for(corpus))
    assert inside.manifest.documents == outside.manifest.documents and outside.manifest.documents.read == 24
    assert outside.skipped["of a dataset"] > 5


def tokenizer_file(folder: Path) -> Path:
    path = folder / "given-tokenizer.json"
    path.write_text(conductor.train_tokenizer(["a"], 300, END).to_str())
    return path


def test_no_usable_text_is_said(tmp_path, data_for, build):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="no usable text"):
        build(data_for(folder))
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(conductor.train_tokenizer(["a"], 300, END).to_str())
    with pytest.raises(UserError, match="no usable text"):
        build(data_for(folder, root="other", tokenizer=TokenizerSection(path=str(tokenizer)), quarantine_limit=1.0))


@pytest.mark.parametrize("fraction", [0.0, 1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("num_documents", [1, 2, 24])
def test_no_split_is_left_empty_by_chance(corpus, data_for, build, hashes, fraction, num_documents):
    files = sorted(corpus.rglob("*.txt"))
    for path in files[num_documents:]:
        path.unlink()
    result = build(data_for(corpus, held_out_fraction=fraction))
    held_out, train = (result.manifest.total(split).num_documents for split in ("held_out", "train"))
    assert held_out + train == num_documents and train >= 1
    assert (held_out >= 1) == (fraction > 0 and num_documents > 1)
    assert verify_dataset(result.folder) == []
    if fraction == 1e-9:
        again = build(data_for(corpus, root="again", held_out_fraction=fraction, workers=1))
        assert hashes(again.folder) == hashes(result.folder)


def test_second_build_is_quick_and_touches_nothing(corpus, data_for, build, hashes, monkeypatch):
    data = data_for(corpus)
    folder = build(data).folder
    before = hashes(folder)

    def forbidden(*_):
        raise AssertionError("a second build of the same input did work")

    monkeypatch.setattr(conductor, "train_tokenizer", forbidden)
    started = time.perf_counter()
    result = build_dataset(data, lambda _: None, forbidden)
    assert time.perf_counter() - started < 1
    assert result.outcome == "unchanged" and hashes(folder) == before
    # Keys that change nothing, another spelling of the path, and files that were only touched.
    moved = corpus.rename(corpus.with_name("moved"))
    os.utime(moved / "odd" / "text-01.txt", ns=(1, 1))
    same = data_for(moved, workers=1, quarantine_limit=0.5)
    assert build_dataset(same, lambda _: None, forbidden).outcome == "unchanged"
    assert json.loads((folder / "plan.json").read_text())["files"]["mine:odd/text-01.txt"][1] == "1"
    assert {name: digest for name, digest in hashes(folder).items() if name != "plan.json"} == {
        name: digest for name, digest in before.items() if name != "plan.json"
    }


def test_changed_input_is_refused(corpus, data_for, build, hashes):
    data = data_for(corpus)
    folder = build(data).folder
    before = hashes(folder)
    path = corpus / "odd" / "text-01.txt"
    whole, status = path.read_bytes(), path.stat()

    def refusal(data) -> str:
        with pytest.raises(UserError, match=r"was built from something else; choose another data.root, or say --rebuild") as caught:
            build(data)
        return str(caught.value)

    path.write_bytes(b"X" + whole[1:])  # one byte, the size stays
    assert "mine:odd/text-01.txt: has other content" in refusal(data)
    path.write_bytes(whole + b"X")
    assert f"mine:odd/text-01.txt: had {len(whole)} bytes, has {len(whole) + 1}" in refusal(data)
    path.unlink()
    assert "mine:odd/text-01.txt: was there, is gone" in refusal(data)
    path.write_bytes(whole)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    (corpus / "new.txt").write_bytes(b"new")
    assert "mine:new.txt: was not there" in refusal(data)
    (corpus / "new.txt").unlink()
    assert "data.held_out_fraction: was 0.2, is 0.3" in refusal(data_for(corpus, held_out_fraction=0.3))
    assert "data.tokenizer.vocabulary_size: was 400, is 401" in refusal(
        data_for(corpus, tokenizer=TokenizerSection(vocabulary_size=401, training_bytes=50_000))
    )
    two = (SourceSection(name="first", path=str(corpus / "odd")), SourceSection(name="mine", path=str(corpus / "even")))
    assert "data.sources: first was added" in refusal(data_for(corpus, sources=two))
    assert build(data).outcome == "unchanged" and hashes(folder) == before


def test_given_tokenizer_is_copied_and_compared(corpus, data_for, build, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(conductor.train_tokenizer(["a b c"], 300, END).to_str() + "\n")
    data = data_for(corpus, tokenizer=TokenizerSection(path=str(path)))
    result = build(data)
    assert (result.folder / "tokenizer.json").read_bytes() == path.read_bytes()
    assert build(data).outcome == "unchanged"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match="is not the tokenizer that was used"):
        build(data)
    with pytest.raises(UserError, match="no such tokenizer"):
        build(data_for(corpus, root="other", tokenizer=TokenizerSection(path=str(tmp_path / "none.json"))))


def test_damaged_datasets_are_not_called_finished(corpus, data_for, build, hashes):
    data = data_for(corpus)
    folder = build(data).folder
    before = hashes(folder)
    (folder / "units" / "00001" / "train-00000.bin").unlink()
    with pytest.raises(UserError, match=r"00001/train-00000.bin: missing or cut off; .* --rebuild"):
        build(data)
    flipped = bytearray((folder / "units" / "00002" / "train-00000.bin").read_bytes())
    flipped[5] ^= 1
    (folder / "units" / "00002" / "train-00000.bin").write_bytes(flipped)
    result = build(data, rebuild=True)
    assert (result.outcome, result.num_units_kept) == ("built", result.num_units - 2)
    assert hashes(folder) == before


def test_units_of_other_input_are_made_again(corpus, data_for, build, hashes):
    """The build was cut off before its manifest, then a file, the configuration, the tokenizer changed."""
    stale = build(data_for(corpus, root="stale")).folder
    (stale / "manifest.json").unlink()
    (stale / "units" / ".tmp-00001-abcd").mkdir()
    (stale / "units" / ".tmp-00001-abcd" / "train.bin").write_bytes(b"cut")
    (stale / "units" / "00099").mkdir()
    path = corpus / "odd" / "text-23.txt"  # the last one: only the last unit is of other files
    path.write_bytes(b"y" * path.stat().st_size)
    given = stale.parent / "given.json"
    given.write_bytes((stale / "tokenizer.json").read_bytes())
    tokenizer = TokenizerSection(path=str(given))
    data = data_for(corpus, root="stale", tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"say --rebuild") as caught:
        build(data)
    assert "mine:odd/text-23.txt: was changed, or touched" in str(caught.value)
    result = build(data, rebuild=True)
    assert result.num_units_kept == result.num_units - 1
    fresh = build(data_for(corpus, root="fresh", tokenizer=tokenizer))
    assert {n: h for n, h in hashes(stale).items() if n != "tokenizer.origin.json"} == hashes(fresh.folder)


def test_input_that_changes_under_the_build_is_refused(corpus, data_for, build):
    def change(function, tasks):
        (corpus / "odd" / "text-23.txt").write_bytes(b"changed")
        yield from ((task, function(task)) for task in tasks)

    data = data_for(corpus)
    with pytest.raises(UserError, match=r"text-23.txt was changed while the build read it"):
        build_dataset(data, lambda _: None, lambda workers, scratch: contextlib.nullcontext(change))
    assert not (Path(data.folder()) / "manifest.json").exists()
    assert stored_texts(build(data, rebuild=True).folder)["odd/text-23.txt", 0] == "changed"


def test_what_a_kill_behind_the_manifest_left_goes(corpus, data_for, build, hashes):
    data = data_for(corpus)
    folder = build(data).folder
    before = hashes(folder)
    scratch = corpus.parent / "pretrain-left"
    scratch.mkdir()
    for name in ("survey/00000/texts.arrow", "duplicates/units.npy", "units/.tmp-00001-ab/train-00000.bin"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"left")
    (folder / ".manifest.json.0123456789ab.tmp").write_bytes(b"left")
    dead = {"host": socket.gethostname(), "pid": 2**22 + 1, "token": "dead", "scratch": str(scratch)}
    (folder / ".owner.json").write_text(json.dumps(dead))
    assert build(data).outcome == "unchanged"
    assert hashes(folder) == before and not scratch.exists() and not (folder / ".owner.json").exists()


def test_concurrent_build_is_refused_and_the_first_unharmed(corpus, data_for, build):
    data = data_for(corpus)
    Path(data.folder()).mkdir()
    with own_folder(Path(data.folder())):
        with pytest.raises(UserError, match=rf"another build is at work there \(process {os.getpid()} on "):
            build(data)
        assert not (Path(data.folder()) / "tokenizer.json").exists()
    assert build(data).outcome == "built"


def test_workers_do_not_change_a_byte(corpus, data_for, build, hashes, two_workers):
    """Here, with one worker, with two."""
    reference = hashes(build(data_for(corpus, root="here")).folder)
    for workers in (1, 2):
        result = build_dataset(data_for(corpus, root=f"ray-{workers}", workers=workers), lambda _: None)
        assert hashes(result.folder) == reference


@pytest.mark.parametrize("fraction", [0.2, 1e-9])  # of the second, a document is moved and its unit made again
def test_progress_reaches_its_ends(corpus, data_for, fraction):
    seen: list = []
    result = build_dataset(data_for(corpus, held_out_fraction=fraction), seen.append, open_here)
    assert [(stage["stage"], stage["num_units"]) for stage in result.report["stages"]] == [("tokens", result.num_units)]
    assert result.report["stages"][0]["num_documents"] - 24 in (range(1) if fraction == 0.2 else range(1, 24))
    assert list(dict.fromkeys(progress.stage for progress in seen)) == ["plan", "tokenizer", "tokens", "manifest"]
    for stage in ("plan", "tokenizer", "tokens", "manifest"):
        ends = [progress for progress in seen if progress.stage == stage]
        assert ends[-1].done == ends[-1].total and [p.done for p in ends] == sorted(p.done for p in ends)
        assert len({p.total for p in ends}) == 1


PROGRAM = """
import json, resource, sys
from configs.errors import UserError
from configs.data_section import DataSection
from data_pipeline.build import build_dataset
from data_pipeline.execution import open_here, open_ray
data = DataSection.model_validate_json(open(sys.argv[1]).read(), strict=True)
if sys.argv[3] != "none":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    result = build_dataset(data, lambda progress: print(progress, flush=True), {"here": open_here, "ray": open_ray}[sys.argv[2]])
    print(json.dumps({"outcome": result.outcome, "kept": result.num_units_kept}))
except UserError as error:
    print(error)
    sys.exit(2)
"""


def start(data, tmp_path: Path, where: str, largest_file: str = "none") -> subprocess.Popen:
    section = tmp_path / "data.json"
    section.write_text(data.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(section), where, largest_file],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_full_disk_leaves_nothing_partial_and_continues(corpus, data_for, build, hashes, tmp_path):
    """No file may grow beyond a bound: a stand-in for a full disk, at bounds that hit different files."""
    print("seed 3")
    reference_folder = build(data_for(corpus, root="reference")).folder
    reference = hashes(reference_folder)
    data = data_for(corpus)
    root = Path(data.folder())
    largest = max((reference_folder / name).stat().st_size for name in reference)
    for bound in sorted(random.Random(3).sample(range(1, largest), 5)):
        process = start(data, tmp_path, "here", str(bound))
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 2, output
        assert "no room left to write" in output and "start the same command again" in output
        assert not (root / "manifest.json").exists()
        assert all(digest == reference[name] for name, digest in hashes(root).items()), bound
    process = start(data, tmp_path, "here")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert hashes(root) == reference


def test_killed_build_continues_to_the_same_bytes(corpus, data_for, build, hashes, tmp_path):
    """Killed twice in the middle of the units and started again at once; half a minute later no worker of it is running."""
    for path in list(corpus.rglob("*.txt")):
        path.write_bytes(path.read_bytes() * 40)
    reference = build(data_for(corpus, root="reference", work_unit_bytes=150_000))
    data = data_for(corpus, work_unit_bytes=150_000)
    root = Path(data.folder())
    finished = 0
    orphans: list[psutil.Process] = []
    for _ in range(2):
        process = start(data, tmp_path, "ray")
        deadline = time.monotonic() + 60
        while (found := count_units(root)) <= finished and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        orphans += psutil.Process(process.pid).children(recursive=True)
        scratch = json.loads((root / ".owner.json").read_text())["scratch"]
        os.kill(process.pid, signal.SIGKILL)  # the driver alone: its workers must notice by themselves
        output, _ = process.communicate(timeout=30)
        killed = time.monotonic()
        assert process.returncode == -signal.SIGKILL, output
        assert finished < found < reference.num_units and not (root / "manifest.json").exists()
        assert Path(scratch).stat().st_mode & 0o777 == 0o700 and (Path(scratch) / "token").stat().st_mode & 0o777 == 0o600
        # What is idle at this moment may have a unit to write in the next one.
        psutil.wait_procs([orphan for orphan in orphans if "ray::" in name_of(orphan)], timeout=30)
        finished = count_units(root)
    process = start(data, tmp_path, "ray")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert json.loads(output.splitlines()[-1]) == {"outcome": "built", "kept": finished}
    assert hashes(root) == hashes(reference.folder)
    assert not Path(scratch).exists(), "the killed build's temporary folder was left"
    # Two idle agents of Ray try for 60 s (fixed in its code) to tell a dead server that they end; they touch nothing of ours.
    agents = [orphan for orphan in orphans if "Agent" in name_of(orphan)]
    _, alive = psutil.wait_procs([orphan for orphan in orphans if orphan not in agents], timeout=max(0.1, killed + 30 - time.monotonic()))
    for agent in agents:
        with contextlib.suppress(psutil.Error):
            agent.kill()
    assert not alive


def count_units(root: Path) -> int:
    return len(list((root / "units").glob("[0-9]*")))


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
