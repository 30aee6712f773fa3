"""What differs from what a folder was built from: a line for each thing, and no line for what follows from it."""

import pytest

from configs.data_section import DeduplicationSection, NearDuplicatesSection, RuleSection, SourceSection
from configs.errors import UserError

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")


@pytest.fixture(params=["finished", "unfinished"])
def changes_of(request, two_sources, build):
    """Builds the sources `texts` (24 files) and `rows`, and gives the lines that refuse other settings."""
    folder = build(two_sources).folder
    if request.param == "unfinished":
        (folder / "manifest.json").unlink()

    def changes(**settings) -> list[str]:
        with pytest.raises(UserError, match=r"was built from something else.*What differs:\n") as caught:
            build(two_sources.model_copy(update=settings))
        return [line.strip() for line in str(caught.value).splitlines()[1:]]

    return changes


def test_a_line_for_each_source_that_came_went_or_has_another_name(changes_of, two_sources, tmp_path):
    texts, rows = two_sources.sources
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.txt").write_text("a text more, which is long enough to be kept")
    more = SourceSection(name="more", path=str(tmp_path / "more"))
    lines, path = (rows.model_copy(update={"name": name}) for name in ("lines", "path"))
    for sources, wanted in (
        ((texts,), ["data.sources: rows was removed"]),
        ((rows,), ["data.sources: texts was removed"]),
        ((more, texts, rows), ["data.sources: more was added"]),
        ((texts, lines), ["data.sources: rows was renamed to lines"]),
        ((texts, path), ["data.sources: rows was renamed to path"]),
        ((texts, rows, more.model_copy(update={"name": "path"})), ["data.sources: path was added"]),
        ((rows, texts), ["data.sources: were in the order texts, rows, are in the order rows, texts"]),
        ((more, rows), ["data.sources: more was added", "data.sources: texts was removed"]),
        ((texts, lines.model_copy(update={"id_field": None})), ["data.sources: lines was added", "data.sources: rows was removed"]),
        ((texts, rows.model_copy(update={"id_field": None})), ["data.sources.rows.id_field: was 'url', is None"]),
    ):
        assert changes_of(sources=sources) == wanted


def test_a_section_that_was_not_there_is_one_line(changes_of, two_sources):
    near = NearDuplicatesSection(similarity=0.5, num_permutations=32, num_bands=8)
    [line] = changes_of(deduplicate=DeduplicationSection(near=near))
    assert line.startswith("data.deduplicate: was None, is {'exact': True, 'near': {'similarity': 0.5, ")
    length = RuleSection(rule="length", settings={"min_characters": 3})
    added = "{'rule': 'length', 'settings': {'min_characters': 3}, 'sources': None}"
    assert changes_of(clean=(*two_sources.clean, length)) == [f"data.clean.1: was None, is {added}"]
    gone = "{'rule': 'tests.data_pipeline.rules:drop_short', 'settings': {}, 'sources': None}"
    assert changes_of(clean=()) == [f"data.clean.0: was {gone}, is None"]
