"""Where an attempt begins: the engine, filled from the newest commit, from another run's, or with first weights; and the place in the data.

In: a run folder with `run.yaml`, token shards. Out: what the loop goes on with. All of it is collective: rank 0 looks, and tells.
"""

import sys
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from deepspeed import DeepSpeedEngine

from configs.errors import UserError
from configs.functions import code_of_the_user
from configs.schema import RunConfig
from pretrain.checkpoint.branch import first_state, load_parent
from pretrain.checkpoint.commit import newest_that_loads
from pretrain.checkpoint.fragments import prepare_weights, read_fragments, refresh_weights, torch_optimizer
from pretrain.checkpoint.index import FragmentIndex
from pretrain.checkpoint.layouts import StateLayout, tell_resharding
from pretrain.checkpoint.places import Place, name_fast_place, name_store, places_of
from pretrain.checkpoint.random_state import restore_random_state
from pretrain.checkpoint.reshard import verify_resharding
from pretrain.checkpoint.retention import check_room
from pretrain.checkpoint.set_aside import set_aside
from pretrain.checkpoint.verify import Commit, list_commits
from pretrain.data.corpus import Corpus, open_corpus
from pretrain.data.order import DataOrder
from pretrain.engine.finite import skip_what_is_not_finite
from pretrain.engine.optimizer import check_groups, rate_share, set_learning_rate
from pretrain.engine.parallel import Layout
from pretrain.engine.setup import construct_model, initialize_engine
from pretrain.run.folder import RunFolder
from pretrain.run.rollback import Rollback, left_out, read_rollbacks
from pretrain.state import TrainState


class Beginning(NamedTuple):
    """What an attempt begins with."""

    engine: DeepSpeedEngine
    corpus: Corpus
    order: DataOrder
    """Without what was left out on purpose."""
    state: TrainState
    places: list[Place]
    """Of commits, the durable one first."""
    rollbacks: list[Rollback]
    code: dict[str, str]
    """SHA-256 of the sources of the user's own classes and functions, by import path."""
    is_new: bool
    """Whether there was no commit."""


def begin(config: RunConfig, run: RunFolder, layout: Layout) -> Beginning:
    """Build the engine and fill it. Raises UserError where the run cannot go on as it is asked to. Collective."""
    corpus, code = open_corpus(config), code_of_the_user(config)
    places = open_places(config, run, layout)
    rollbacks = go_back(run, places, layout)
    # As rank 0 sees it. Else a commit fills the weights, or nothing runs.
    is_new = layout.gather(not any(list_commits(place.checkpoints) for place in places))[0]
    engine = initialize_engine(config, layout, construct_model(config, layout, with_weights=is_new))
    order = DataOrder(corpus.sources, config.mixture, config.training, config.run.seed)
    state = resume(engine, config, run, places, order, {"tokenizer": corpus.tokenizer_sha256}, code, layout)
    if layout.rank == 0:
        total_steps = config.training.total_steps
        every = config.checkpoint.every_steps or total_steps
        check_room(run.checkpoints, config.checkpoint, count_parameters(engine), num_saves=(total_steps - state.step) // every + 1)
    state = replace(state, skipped_samples=left_out(state.skipped_samples, rollbacks))
    skip_what_is_not_finite(engine)
    return Beginning(engine, corpus, order.skipping(state.skipped_samples), state, places, rollbacks, code, is_new)


def open_places(config: RunConfig, run: RunFolder, layout: Layout) -> list[Place]:
    """Where the run's commits lie and will lie, the durable place first. Collective."""
    if layout.rank == 0:
        name_fast_place(config.checkpoint, run.path)
        name_store(config.checkpoint, run.path)
    layout.gather(None)
    return places_of(config.checkpoint, run.path)


def go_back(run: RunFolder, places: list[Place], layout: Layout) -> list[Rollback]:
    """Move aside what is newer than the commits that the run has been rolled back to. Returns all its rollbacks. Collective."""
    rollbacks = layout.gather(read_rollbacks(run.path) if layout.rank == 0 else [])[0]
    for place in places:
        for one in rollbacks if place.has_name_from(layout.rank) else ():
            set_aside(place.checkpoints, one.to_step, one.attempt)
    layout.gather(None)
    return rollbacks


def resume(
    engine: DeepSpeedEngine,
    config: RunConfig,
    run: RunFolder,
    places: list[Place],
    order: DataOrder,
    tokenizer: dict[str, str],
    code: dict[str, str],
    layout: Layout,
) -> TrainState:
    """The state of the newest verified commit, with the engine filled from it; where there is none, that of the parent that
    `start_from` names, or step 0. Collective. What the optimizer then holds is what the configuration says."""

    def say(text: str) -> None:
        if layout.rank == 0:
            with suppress(OSError):
                print(text, file=sys.stderr, flush=True)

    def load(commit: Commit, with_moments: bool = True) -> None:
        with FragmentIndex(commit) as index:
            read_fragments(engine, index, with_moments)
            if with_moments and commit.world_size == layout.world_size:
                restore_random_state(index.description(layout.rank)["random"])

    def load_own(commit: Commit) -> None:
        check_identity(commit, order, tokenizer)
        load(commit)

    prepare_weights(engine)
    commit = newest_that_loads(places, load_own, say)
    if commit is not None:
        state, told = commit.state, f"resumed from {commit.folder.name}"
    elif config.start_from is not None:
        commit = load_parent(config, run.path, lambda parent: load(parent, config.start_with == "everything"), say)
        state, told = first_state(config, commit, order, tokenizer), f"begins with the {config.start_with} of {config.start_from}"
    else:
        state, told = TrainState(), ""
    refresh_weights(engine)
    share = rate_share(state.tokens_seen, config.training, config.schedule)
    set_learning_rate(engine.optimizer, share)
    check_groups(torch_optimizer(engine), config.optimizer, share)
    if commit is None:
        return state
    asked = StateLayout.of(config, layout.world_size)
    if resharding := tell_resharding(StateLayout.written(commit), asked, config.training.global_batch_samples):
        say(resharding)
        say(verify_resharding(engine, commit, with_moments=state.step > 0))
    for warning in commit.changed_code(code):
        say(f"{warning}; the run goes on with it as it is.")
    engine.global_steps, engine.skipped_steps = state.step, state.skipped_steps
    say(f"{told}, every byte verified")
    return state


def check_identity(commit: Commit, order: DataOrder, tokenizer: dict[str, str]) -> None:
    """Raises UserError where what the commit has seen is not what the run file now names."""
    state = commit.state
    order = order.skipping(state.skipped_samples)
    identity = order.identity(state.samples_seen) | tokenizer
    changed = sorted(key for key in commit.identity | identity if commit.identity.get(key) != identity.get(key))
    if changed:
        raise UserError(
            f"{commit.folder} has seen {state.samples_seen} samples, and what the run file now names would have made them others: "
            f"what differs: {', '.join(changed)}. mixture.stages may change from step {state.step} on (from_tokens: "
            f"{order.next_token(state.samples_seen)} or more); put the rest back as it was, or start another run with run.name=NAME."
        )


def count_parameters(engine: DeepSpeedEngine) -> int:
    """Of the whole model, also where each rank holds a part (stage 3)."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in cast(torch.nn.Module, engine.module).parameters())
