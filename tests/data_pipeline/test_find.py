"""Which files a source has, and what is refused before anything starts."""

import gzip
import os
import sysconfig
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.data_section import DataSection, SourceSection
from configs.errors import UserError
from data_pipeline.find import find_files
from data_pipeline.sources import plan_units
from tests.data_pipeline.planning import NOWHERE, items_of, put, refused


def names(source: SourceSection, skipped: Counter[str] | None = None) -> list[str]:
    return [file.name for file in find_files(source, NOWHERE, Counter() if skipped is None else skipped)]


def test_files_are_found_sorted_and_the_rest_is_counted(tmp_path):
    put(
        tmp_path, b_DOT_txt=b"b", a__z_DOT_md=b"z", a__Z_DOT_TXT=b"Z", c_DOT_jsonl_DOT_gz=gzip.compress(b'{"text": "c"}'),
        d_DOT_png=b"d", e_DOT_txt_DOT_gz=b"e", LICENSE=b"f", _DOT_hidden=b"g", _DOT_git__h_DOT_txt=b"h",
    )  # fmt: skip
    skipped: Counter[str] = Counter()
    assert names(SourceSection(name="mine", path=str(tmp_path)), skipped) == ["a/Z.TXT", "a/z.md", "b.txt", "c.jsonl.gz"]
    assert skipped == {".png": 1, ".txt.gz": 1, "(none)": 1}
    assert names(SourceSection(name="mine", path=str(tmp_path), pattern="a/*")) == ["a/Z.TXT", "a/z.md"]
    assert len(names(SourceSection(name="mine", path=str(tmp_path), format="text"))) == 7


def test_links_are_counted_not_followed(tmp_path):
    outside = put(tmp_path / "outside", secret_DOT_txt=b"s")
    root = put(tmp_path / "root", a_DOT_txt=b"a", sub__b_DOT_txt=b"b")
    (root / "file.txt").symlink_to(outside / "secret.txt")
    (root / "folder").symlink_to(outside)
    (root / "inside.txt").symlink_to(root / "a.txt")
    (root / "dangling.txt").symlink_to(root / "none")
    for pattern in ("**/*", "*/*", "*"):
        skipped: Counter[str] = Counter()
        found = names(SourceSection(name="mine", path=str(root), pattern=pattern), skipped)
        assert not {"file.txt", "folder/secret.txt", "inside.txt"} & set(found)
        assert skipped["symlink"] >= 1
    (tmp_path / "link").symlink_to(root)  # the root itself may be a link: the user named it
    assert names(SourceSection(name="mine", path=str(tmp_path / "link"))) == ["a.txt", "sub/b.txt"]


def test_stdlib_without_installed_packages():
    found = names(SourceSection(name="stdlib", path="{stdlib}", pattern="**/*.py"))
    assert "abc.py" in found and "asyncio/__init__.py" in found and len(found) > 300
    assert not any("site-packages" in name or "dist-packages" in name for name in found)
    assert names(SourceSection(name="stdlib", path="{stdlib}/json")) == sorted(
        path.name for path in Path(sysconfig.get_path("stdlib"), "json").glob("*.py")
    )


def test_the_dataset_is_no_input(tmp_path):
    put(tmp_path, a_DOT_txt=b"a", built__units__00000__train_DOT_documents_DOT_parquet=b"p")
    plan = plan_units(DataSection(root=str(tmp_path / "built"), sources=(SourceSection(name="mine", path=str(tmp_path)),)))
    assert [file.name for file in plan.files] == ["a.txt"] and plan.skipped == {}


def test_an_output_folder_that_is_a_source_is_said(tmp_path):
    texts = put(tmp_path / "texts", a_DOT_txt=b"a", below__b_DOT_txt=b"b")

    def refusal(path: Path | str, root: Path) -> str:
        with pytest.raises(UserError) as caught:
            plan_units(DataSection(root=str(root), sources=(SourceSection(name="mine", path=str(path)),)))
        return str(caught.value)

    wanted = "wanted an output folder that holds no source: set data.root to another one"
    for path in (texts, f"{texts}/*.txt", f"file://{texts}"):
        message = refusal(path, texts)
        assert f"'mine': its path {path} is the output folder {texts}, of which nothing is read; {wanted}" in message
    for path, root in ((texts, tmp_path), (texts / "below", texts)):
        assert f"its path {path} lies in the output folder {root}, of which nothing is read; {wanted}" in refusal(path, root)
    (texts / "a.txt").unlink()
    message = refusal(texts, texts / "below")
    assert f"{texts} has no file that matches '**/*' outside the output folder {texts / 'below'} (data.root); wanted .txt" in message
    (texts / "a.txt").write_bytes(b"a")
    plan = plan_units(DataSection(root=str(texts / "below"), sources=(SourceSection(name="mine", path=str(texts)),)))
    assert [file.name for file in plan.files] == ["a.txt"]


def test_refusals_name_what_to_change(tmp_path):
    def source(path: Path, **keys) -> SourceSection:
        return SourceSection(name="mine", path=str(path), **keys)

    assert "data.sources is empty" in refused(tmp_path)
    assert f"no {tmp_path / 'none'}" in refused(tmp_path, source(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "no file that matches '**/*'" in refused(tmp_path, source(tmp_path / "empty"))
    pictures = put(tmp_path / "pictures", a_DOT_png=b"a", b_DOT_png=b"b", c_DOT_gif=b"c")
    assert "found 2 .png, 1 .gif, wanted .txt" in refused(tmp_path, source(pictures))
    assert "set its format" in refused(tmp_path, source(pictures / "a.png"))
    assert "format: datasets" in refused(tmp_path, source(put(tmp_path / "hub", data_DOT_arrow=b"")))
    links = tmp_path / "links"
    links.mkdir()
    (links / "a.txt").symlink_to(pictures / "a.png")
    assert "links are not followed" in refused(tmp_path, source(links))
    assert "are empty" in refused(tmp_path, source(put(tmp_path / "zero", a_DOT_txt=b"", b_DOT_txt=b"")))
    assert "cannot be used" in refused(tmp_path, source(pictures, pattern="/etc/*"))
    assert "wants the folder" in refused(tmp_path, source(pictures / "a.png", format="datasets"))
    assert "state.json" in refused(tmp_path, source(put(tmp_path / "no_state", state_DOT_json=b"{}"), format="datasets"))
    escaping = put(tmp_path / "escaping", state_DOT_json=b'{"_data_files": [{"filename": "../pictures/a.png"}]}')
    assert "not a file below" in refused(tmp_path, source(escaping, format="datasets"))
    os.mkdir(os.fsencode(tmp_path) + b"/odd")  # noqa: PTH102
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd/\xff.txt")).write_bytes(b"a")
    assert "is not UTF-8" in refused(tmp_path, source(tmp_path / "odd"))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_missing_text_field_is_told_at_once(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"body": ["a"], "url": ["b"]}), path)
    else:
        content = b'\n{"body": "a", "url": "b"}\n{"text": "c"}\n'
        path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    message = refused(tmp_path, SourceSection(name="mine", path=str(tmp_path)))
    assert "no field 'text'" in message and "body, url" in message and path.name in message


def test_the_same_file_twice_is_named(tmp_path):
    put(tmp_path, sub__a_DOT_txt=b"a")
    message = refused(
        tmp_path, SourceSection(name="one", path=str(tmp_path)), SourceSection(name="two", path=str(tmp_path / "sub" / "a.txt"))
    )
    assert str(tmp_path / "sub" / "a.txt") in message and "'one'" in message and "'two'" in message


def test_globs_and_file_urls(tmp_path):
    put(tmp_path, a__x_DOT_txt=b"x", a__y_DOT_md=b"y", b__z_DOT_txt=b"z", b__c__w_DOT_txt=b"w", b___DOT_h_DOT_txt=b"h", top_DOT_txt=b"t")
    assert names(SourceSection(name="mine", path=f"{tmp_path}/*/*.txt")) == ["a/x.txt", "b/z.txt"]
    assert names(SourceSection(name="mine", path=f"{tmp_path}/**/*.txt")) == ["a/x.txt", "b/c/w.txt", "b/z.txt", "top.txt"]
    assert names(SourceSection(name="mine", path=f"{tmp_path}/[b]*")) == ["b/c/w.txt", "b/z.txt"]
    assert names(SourceSection(name="mine", path=f"file://{tmp_path}/a")) == ["x.txt", "y.md"]
    assert "is listed twice" in refused(
        tmp_path, SourceSection(name="one", path=f"{tmp_path}/*/x.txt"), SourceSection(name="two", path=f"file://{tmp_path}/a/x.txt")
    )
    assert "no file that matches '*.nix'" in refused(tmp_path, SourceSection(name="one", path=f"{tmp_path}/*.nix"))
    assert "there is no folder" in refused(tmp_path, SourceSection(name="one", path=f"{tmp_path}/none/*.txt"))
    (tmp_path / "[odd].txt").write_bytes(b"o")  # what is there is meant, before any glob
    assert names(SourceSection(name="mine", path=f"{tmp_path}/[odd].txt")) == ["[odd].txt"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("key", ["id_field", "metadata_fields"])
def test_missing_fields_are_told_at_once(tmp_path, kind, key):
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["a"], "url": ["b"]}), tmp_path / "rows.parquet")
    else:
        put(tmp_path, a_DOT_jsonl=b"not json\n", rows_DOT_jsonl=b'{"text": "c", "url": "b"}\n')
    message = refused(tmp_path, SourceSection(name="mine", path=str(tmp_path), **{key: "uri" if key == "id_field" else ("url", "uri")}))
    if kind == "parquet":
        assert f"no field 'uri'; set {key} to one of: text, url" in message
    assert len(items_of(SourceSection(name="mine", path=str(tmp_path), metadata_fields=("url",)))[0]) == (1 if kind == "parquet" else 2)


def test_secrets_are_refused(tmp_path):
    for settings in ({"key": "a"}, {"aws_secret_access_key": "a"}, {"client": {"password": "a"}}, {"hf_token": "a"}):
        assert "looks like a secret" in refused(tmp_path, SourceSection(name="mine", path="memory://x", settings=settings))
    for path in ("s3://me:word@bucket/x", "https://host/a.jsonl?X-Amz-Signature=1"):
        assert "looks like a secret" in refused(tmp_path, SourceSection(name="mine", path=path))
