"""Which document stayed in place of a near duplicate, by name: for the few examples that people read.

In: the units' tasks, whose surveys and lists of duplicates are still there. Out: a document's id and where it stands. For each
example two surveys are looked into, and of those only where their documents came from.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from data_pipeline.dedup import NEAR_DUPLICATE, REASONS, load_duplicates
from data_pipeline.documents import identify_document
from data_pipeline.signature_files import Numbers, first_numbers
from data_pipeline.survey import SurveyTask, read_origins
from data_pipeline.units import UnitTask


class Survivors:
    """The documents that deduplication kept, as far as somebody asks for them."""

    def __init__(self, tasks: Sequence[UnitTask]) -> None:
        """`tasks` are in the order in which deduplication saw their surveys; those without one are passed over."""
        self._surveyed = {task.unit.index: task.surveyed for task in tasks if task.surveyed}
        self._folders = [SurveyTask(task.recipe, task.unit).folder for task in tasks if task.surveyed]

    def name(self, unit: int, example: dict[str, Any]) -> dict[str, Any]:
        """An example of what a unit dropped; if it is a near duplicate, with `survivor`: what stayed in its place, by `document_id`,
        `source`, `file` and `position`. Raises OSError."""
        surveyed = self._surveyed.get(unit)
        if surveyed is None or example["reason"] != REASONS[NEAR_DUPLICATE]:
            return example
        origins = read_origins(self._folders[surveyed.place])
        is_asked = (origins["position"].to_numpy() == example["position"]) & (origins["file"].to_numpy() == example["file"])
        if not is_asked.any():  # a rule of the user's own may give this reason too, before deduplication
            return example
        found = load_duplicates(surveyed.duplicates, surveyed.place)
        survivor = int(found.survivors[np.searchsorted(found.ordinals, is_asked.argmax())])
        home = int(np.searchsorted(self._firsts, survivor, side="right")) - 1
        origin = read_origins(self._folders[home]).slice(survivor - int(self._firsts[home]), 1).to_pylist()[0]
        return {**example, "survivor": {"document_id": identify_document(**origin), **origin}}

    @cached_property
    def _firsts(self) -> Numbers:
        return first_numbers(self._folders)
