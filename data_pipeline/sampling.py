"""Which texts the tokenizer is trained on: the first ones of every work unit, an equal share of bytes from each."""

from collections.abc import Callable, Iterator

from data_pipeline.documents import Document
from data_pipeline.sources import WorkUnit, read_unit


def sample_texts(
    units: tuple[WorkUnit, ...], training_bytes: int, largest_document_bytes: int, tell: Callable[[int, int], None]
) -> Iterator[str]:
    """At most `training_bytes` of text (UTF-8), the same for the same units; a text that exceeds what is left is cut.

    What a small unit leaves of its share is divided among those behind it. `tell` gets the number of units sampled and
    the bytes so far. Raises OSError as `read_unit` does.
    """
    left = training_bytes
    for done, unit in enumerate(units):
        share = left // (len(units) - done)
        for item in read_unit(unit, largest_document_bytes):
            if share <= 0:
                break
            if isinstance(item, Document):
                content = item.text.encode("utf-8")[:share]
                share -= len(content)
                left -= len(content)
                yield content.decode("utf-8", "ignore")  # only a character that the cut went through is left out
        tell(done + 1, training_bytes - left)
