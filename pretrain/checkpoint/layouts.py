"""How a commit's state was laid out when it was written, and what becomes of it under another layout.

In: the layout a commit names, the one a run file asks for. Out: exact, converted or refused, with the reason, and the line that says so.
The refusals are the schema's own and those of the keys that may not change. No torch.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from configs.changes import differing_keys
from configs.schema import RunConfig
from pretrain.checkpoint.verify import Commit

TOLERANCES = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}
"""Of the losses that follow, relative, while the same numbers are summed in another order."""
CONVERTED_TOLERANCES = {"fp32": 1e-2, "bf16": 1e-2, "fp16": 1e-1}
"""The same where the model computes in another precision from then on (measured: tests/faults/matrix.py). fp16 begins with a large scale of
its loss, and skips steps until it fits."""


@dataclass(frozen=True)
class StateLayout:
    """What decides which rank holds what, and what the model computes with."""

    zero_stage: int
    precision: str
    optimizer: str
    micro_batch_samples: int
    num_ranks: int

    @staticmethod
    def of(config: RunConfig, num_ranks: int) -> "StateLayout":
        """The one that a run file asks for."""
        return StateLayout(
            config.parallel.zero_stage, config.precision, config.optimizer.kind, config.training.micro_batch_samples, num_ranks
        )

    @staticmethod
    def written(commit: Commit) -> "StateLayout | None":
        """The one that a commit was written under; None where it does not say."""
        return StateLayout(**commit.layout, num_ranks=commit.world_size) if commit.layout else None

    def to_json(self) -> dict[str, Any]:
        """What `Commit.layout` holds: all but the number of ranks, which the commit has beside it."""
        return {key: value for key, value in vars(self).items() if key != "num_ranks"}

    def __str__(self) -> str:
        ranks = "1 rank" if self.num_ranks == 1 else f"{self.num_ranks} ranks"
        return f"{ranks} at stage {self.zero_stage}, {self.precision}, micro-batches of {self.micro_batch_samples}"


class Judgement(NamedTuple):
    """What becomes of a commit under another layout."""

    outcome: Literal["exact", "converted", "refused"]
    """exact: weights, moments, steps and settings are the same bits. converted: these too, and the model computes with other roundings of
    the weights."""
    tolerance: float
    """Of the losses that follow, relative to those of a run that was never moved; 0: the same bits. With dropout, another number of
    ranks or other micro-batches draw other masks, and then no tolerance holds."""
    reason: str
    """Why it is refused, else nothing."""


def judge(written: StateLayout, asked: StateLayout, global_batch_samples: int) -> Judgement:
    """Exact, converted or refused, by the rules that the run file and the run folder are checked with."""
    configs: list[RunConfig] = []
    for layout in (written, asked):
        try:
            configs.append(_configuration(layout, global_batch_samples))
            configs[-1].training.accumulation(layout.num_ranks)
        except ValidationError as error:
            return Judgement("refused", 0.0, "; ".join(one["msg"].removeprefix("Value error, ") for one in error.errors()))
        except ValueError as error:
            return Judgement("refused", 0.0, str(error))
    if different := differing_keys(*configs):
        rows = ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in different.items())
        return Judgement("refused", 0.0, f"a run keeps its own: {rows}")
    if written.precision != asked.precision:
        return Judgement("converted", CONVERTED_TOLERANCES[asked.precision], "")
    return Judgement("exact", 0.0 if written == asked else TOLERANCES[asked.precision], "")


def _configuration(layout: StateLayout, global_batch_samples: int) -> RunConfig:
    """The smallest run file that asks for a layout. Raises ValidationError where the schema refuses it."""
    return RunConfig.model_validate(
        {
            "precision": layout.precision,
            "parallel": {"zero_stage": layout.zero_stage},
            "optimizer": {"kind": layout.optimizer},
            "training": {"micro_batch_samples": layout.micro_batch_samples, "global_batch_samples": global_batch_samples},
        }
    )


def tell_resharding(written: StateLayout | None, asked: StateLayout, global_batch_samples: int) -> str | None:
    """The line that announces a change of layout; None where there is none."""
    if written is None or written == asked:
        return None
    judgement = judge(written, asked, global_batch_samples)
    converted = f"; the model goes on in {asked.precision}" if judgement.outcome == "converted" else ""
    return f"resharding: {written} -> {asked}: weights, moments, steps and settings are exact{converted}"


def all_pairs(ranks: tuple[int, ...], micro_batch_samples: int, global_batch_samples: int) -> list[dict[str, Any]]:
    """What happens for every pair of (stage, precision, optimizer, ranks), as plain values."""
    layouts = [
        StateLayout(stage, precision, optimizer, micro_batch_samples, num_ranks)
        for optimizer, precision, stage, num_ranks in product(("adamw", "muon"), ("fp32", "bf16", "fp16"), range(4), ranks)
    ]
    rows: list[dict[str, Any]] = []
    for written, asked in product(layouts, layouts):
        judgement = judge(written, asked, global_batch_samples)
        rows.append({"from": vars(written), "to": vars(asked), **judgement._asdict()})
    return rows
