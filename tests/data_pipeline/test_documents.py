"""Ids that stay, and places that are spread evenly."""

from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.documents import Document, identify_document, place_document


def test_id_is_fixed_for_ever():
    """A changed id would move documents between the splits of every dataset."""
    assert identify_document("web", "a/b.jsonl", 3) == Document("web", "a/b.jsonl", 3, "any text").document_id == "808f309c27039be92bb2ce76"


@given(st.tuples(st.text(), st.text(), st.integers()), st.tuples(st.text(), st.text(), st.integers()))
def test_ids_differ(one, other):
    if "\0" not in "".join((one[0], one[1], other[0], other[1])):
        assert (identify_document(*one) == identify_document(*other)) == (one == other)


def test_places_are_even():
    places = [place_document(identify_document("web", "file", number)) for number in range(20_000)]
    assert min(places) >= 0 and max(places) < 1
    assert place_document("f" * 24) < 1
    for fraction in (0.005, 0.1, 0.5):
        share = sum(place < fraction for place in places) / len(places)
        assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / len(places)) ** 0.5
