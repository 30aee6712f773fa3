"""Which texts the tokenizer is trained on: the first ones of work units spread over all, an equal share of bytes from each.

In: the plan's units. Out: texts, the same for the same units. The rules run on them, so a unit is read where units are made, by
a task of its own: a rule that kills its process kills no build.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_pipeline.cleaning import RuleError
from data_pipeline.recipe import Recipe
from data_pipeline.sources import WorkUnit
from data_pipeline.survey import read_for_sampling

SAMPLED_UNITS = 256  # of 10 TB in units of 16 MB every one would be opened for a few hundred bytes


@dataclass(frozen=True)
class SampleTask:
    """All that a unit's part of the sample depends on."""

    recipe: Recipe
    unit: WorkUnit
    share_bytes: int
    """At most so much text, in UTF-8."""

    def __str__(self) -> str:
        return f"the tokenizer's sample of {self.unit}"


@dataclass(frozen=True)
class Sample:
    """What a unit gives to the sample."""

    texts: tuple[str, ...]
    num_bytes: int
    """Of the share, used up: a character that the end of the share went through is left out, and counted."""
    failure: str = ""
    """What was said of the first document on which a rule failed, if any."""


def take_sample(task: SampleTask) -> Sample:
    """The unit's first texts after cleaning; one that exceeds what is left of the share is cut. Raises OSError, UserError."""
    texts: list[str] = []
    left = task.share_bytes
    failures: list[RuleError] = []
    for document in read_for_sampling(task.recipe, task.unit, failures):
        content = document.text.encode("utf-8")[:left]
        texts.append(content.decode("utf-8", "ignore"))
        left -= len(content)
        if left == 0:
            break
    return Sample(tuple(texts), task.share_bytes - left, str(failures[0]) if failures else "")


def sample_texts(
    units: tuple[WorkUnit, ...], training_bytes: int, take: Callable[[WorkUnit, int], Sample], tell: Callable[[int, int], None]
) -> Iterator[str]:
    """At most `training_bytes` of text (UTF-8), the same for the same units.

    `take` gives a unit's texts up to a share of bytes. What a small unit leaves of its share is divided among those behind it,
    so one is taken after the other. `tell` gets the number of units sampled (at most `SAMPLED_UNITS`) and the bytes so far.
    Raises what `take` does.
    """
    num_chosen = min(len(units), SAMPLED_UNITS)
    left = training_bytes
    for done in range(num_chosen):
        if share := left // (num_chosen - done):
            sample = take(units[done * len(units) // num_chosen], share)
            left -= sample.num_bytes
            yield from sample.texts
        tell(done + 1, training_bytes - left)
