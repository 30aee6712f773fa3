"""The section `guard:` of a run file: what is done about numbers that cannot be right."""

from typing import Annotated, Literal

from pydantic import Field

from configs.section import PositiveFloat, PositiveInt, Section


class GuardSection(Section):
    """When a step is a bad one, and what follows. Steps whose loss or gradient is not finite are always skipped, on all ranks."""

    skips_in_a_row: PositiveInt = 5
    """So many skipped steps in a row end the run. Those in which fp16 looks for the scale of its loss are not counted."""
    spike_z: PositiveFloat = 8.0
    """A loss is a spike when it lies so many robust standard deviations (from the median's absolute deviations) above the median of the
    128 before it."""
    on_spike: Literal["alarm", "rollback", "ignore"] = "alarm"
    """alarm: it is said and logged. rollback: the run goes back to the newest checkpoint before it and leaves its samples out."""
    spike_window_steps: Annotated[int, Field(ge=0)] = 1
    """Steps on either side of a spike whose samples a rollback leaves out too: the one before it made the weights that it met."""
    rollbacks: PositiveInt = 3
    """So many rollbacks a run may have; the next spike ends it."""
    compare_replicas_every_steps: PositiveInt | None = 1000
    """Steps between comparisons of the weights that every rank holds (ZeRO stages 0 to 2); null: never."""
