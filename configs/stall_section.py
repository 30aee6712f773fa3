"""The section `stall:` of a run file: how long a rank may be silent before it counts as hung. No torch, no ray."""

from configs.section import PositiveFloat, Section


class StallSection(Section):
    """Seconds that a rank may be silent in each phase before the attempt is ended and the next one begins.

    null: learned from the run itself: ten times the longest silence of that phase so far, three minutes at least; half an hour until
    the phase was seen once.
    """

    start_seconds: PositiveFloat | None = None
    """Until the first step is done, compiling included; null: half an hour."""
    step_seconds: PositiveFloat | None = None
    """Between two micro-steps, waiting for data that is there included."""
    evaluate_seconds: PositiveFloat | None = None
    """Between two batches of held-out text."""
    score_seconds: PositiveFloat | None = None
    """All tasks of one evaluation."""
    save_seconds: PositiveFloat | None = None
    """One save, as long as training waits for it."""
    end_seconds: PositiveFloat | None = None
    """Behind the last save: Weights & Biases and the end of the process; null: two minutes."""
