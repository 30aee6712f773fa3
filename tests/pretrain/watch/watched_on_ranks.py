"""What one rank does in test_samples.py: trainings that are traced and asked for samples. Called by `run_on_ranks`."""

from typing import Any

from tests.training import train_runs

PROMPTS = ("3 plus 4 is", "", "äö plus")


def train_watched(dataset: str, runs: str, watched: dict[str, str], plain: dict[str, str], stop_at: int) -> dict[str, Any]:
    """What `train_runs` tells of one training without, and of two with everything; the last was stopped and resumed."""
    found = train_runs(dataset, runs, {"plain": plain, "watched": watched})
    stopped = train_runs(dataset, runs, {"resumed": watched}, stop_at=stop_at)["resumed"]
    return {**found, "stopped": stopped, **train_runs(dataset, runs, {"resumed": watched}, attempt=2)}
