"""A run's beginning with the checkpoint of another run: verified whole, read once, and where the new run then stands.

In: a pinned `start_from`, what fills the engine. Out: the parent's commit, and the state that the new run begins in. Nothing of the parent
is changed but its list of children.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as distributed

from configs.errors import UserError
from configs.schema import RunConfig
from pretrain.checkpoint.commit import told_by_rank_0
from pretrain.checkpoint.parent import parent_commit, record_child
from pretrain.checkpoint.verify import Commit, check_files
from pretrain.data.order import DataOrder
from pretrain.state import TrainState


def load_parent(config: RunConfig, child: Path, load: Callable[[Commit], None], say: Callable[[str], None]) -> Commit:
    """Fill the engine from the commit that `config.start_from` names, once every byte of it is verified. Collective.

    load: is no collective, and raises ValueError where something is damaged or of another shape. Raises UserError then, naming what is
    wrong; a damaged commit stays where it is, for it is another run's.
    """
    if distributed.get_rank() == 0:
        try:
            record_child(config, child)  # before it is read: from here on the parent's retention leaves it alone
        except OSError as error:
            say(f"WARNING: {error.filename} cannot be written ({error.strerror}): the parent's retention does not know of this run.")
    told_by_rank_0(None)
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    commit = parent_commit(config)
    _agree(config, check_files(commit, sorted(commit.files)[rank::world_size]))
    problems: list[str] = []
    try:
        load(commit)
    except ValueError as error:
        problems.append(str(error))
    _agree(config, problems)
    return commit


def _agree(config: RunConfig, problems: list[str]) -> None:
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, problems)
    found = sorted({problem for part in gathered for problem in part})
    if found:
        raise UserError(f"start_from={config.start_from} cannot be taken: {'; '.join(found[:3])}. Nothing of it was changed.")


def first_state(config: RunConfig, parent: Commit, order: DataOrder, tokenizer: dict[str, str]) -> TrainState:
    """Where a run stands that begins with `parent`. With its weights: at the beginning.

    With everything it counts on. Its data goes on where the parent's was, if what the parent saw is what this run would have seen; of data
    that the parent saw nothing of, the first sample is the next. Raises UserError for data that the parent saw in another order, and for
    another tokenizer.
    """
    if config.start_with == "weights":
        return TrainState()
    state = parent.state
    identity = order.skipping(state.skipped_samples).identity(state.samples_seen) | tokenizer
    different = sorted(key for key in parent.identity | identity if parent.identity.get(key) != identity.get(key))
    if not different:
        return state
    seen, named = ({value for key, value in one.items() if key.startswith("source ")} for one in (parent.identity, identity))
    if seen & named or "tokenizer" in different:
        raise UserError(
            f"start_from={config.start_from} start_with=everything: it has seen {state.samples_seen} samples, which this run file would "
            f"have made others: what differs: {', '.join(different)}. Take its tokenizer and, up to step {state.step}, its mixture, "
            "run.seed and packing; or data of which it saw nothing; or start_with=weights."
        )
    # A range that ends before it begins gives numbers back: the sample behind `samples_seen` has the number 0.
    return replace(state, skipped_samples=((0, -state.samples_seen),))
