"""Which texts the tokenizer is trained on: the first ones of work units spread over all, an equal share of bytes from each."""

from collections.abc import Callable, Iterator

from data_pipeline.documents import Document, Rejected, TokenDocument
from data_pipeline.sources import WorkUnit

SAMPLED_UNITS = 256  # of 10 TB in units of 16 MB every one would be opened for a few hundred bytes


def sample_texts(
    units: tuple[WorkUnit, ...],
    training_bytes: int,
    read: Callable[[WorkUnit], Iterator[Document | Rejected | TokenDocument]],
    tell: Callable[[int, int], None],
) -> Iterator[str]:
    """At most `training_bytes` of text (UTF-8), the same for the same units; a text that exceeds what is left is cut.

    `read` gives a unit's items, of which only documents count. What a small unit leaves of its share is divided among those
    behind it. `tell` gets the number of units sampled (at most `SAMPLED_UNITS`) and the bytes so far. Raises what `read` does.
    """
    num_chosen = min(len(units), SAMPLED_UNITS)
    left = training_bytes
    for done in range(num_chosen):
        unit = units[done * len(units) // num_chosen]
        share = left // (num_chosen - done)
        for item in read(unit):
            if share <= 0:
                break
            if isinstance(item, Document):
                content = item.text.encode("utf-8")[:share]
                share -= len(content)
                left -= len(content)
                yield content.decode("utf-8", "ignore")  # only a character that the cut went through is left out
        tell(done + 1, training_bytes - left)
