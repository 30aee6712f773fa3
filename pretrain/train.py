"""THE LOOP. One process of it runs on every device; `pretrain/run/supervisor.py` starts them.

In: a run folder with `run.yaml`, token shards. Out: commits in `checkpoints/`, rows in `metrics.jsonl`, and a record
of how this rank ended. Every call of the engine is DeepSpeed's own.
"""

import os
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from deepspeed import DeepSpeedEngine

from configs.errors import UserError
from configs.redaction import redact_output
from configs.schema import RunConfig
from pretrain.checkpoint.arena import Answer, Arena
from pretrain.checkpoint.commit import Saves, StartWriting
from pretrain.checkpoint.fragments import (
    check_slices,
    image_of,
    owned_bytes,
    owned_slices,
)
from pretrain.checkpoint.layouts import StateLayout
from pretrain.checkpoint.places import Place
from pretrain.checkpoint.random_state import describe_random_state
from pretrain.checkpoint.self_test import save_and_load
from pretrain.checkpoint.set_aside import step_of
from pretrain.checkpoint.verify import list_commits
from pretrain.data.batches import Batches, Objective, held_out_batches
from pretrain.data.corpus import Corpus, open_corpus
from pretrain.data.fill_in_the_middle import open_fill_in_the_middle
from pretrain.data.objective import open_objective
from pretrain.engine.finite import spread_not_finite
from pretrain.engine.gradients import loss_scale, owned_gradients
from pretrain.engine.optimizer import rate_share, set_learning_rate
from pretrain.engine.parallel import Layout, initialize_layout
from pretrain.engine.replicas import CorruptReplicaError, compare_replicas
from pretrain.engine.setup import set_global_batch
from pretrain.engine.speed import announce_compiling, choose_attention
from pretrain.evaluate_tasks import open_scoring
from pretrain.run.folder import RunFolder
from pretrain.run.guard import NUM_LOSSES, Guard, Skip, Spike, StepNumbers, first_spike
from pretrain.run.heartbeat import UNHEARD, Pulse
from pretrain.run.lease import holds_lease
from pretrain.run.outcome import OUTCOME_FOLDER_VARIABLE, Outcome, announce_ready, write_outcome
from pretrain.run.rollback import plan_rollback
from pretrain.run.signals import StopRequest, end_with_parent
from pretrain.start import begin
from pretrain.watch.evaluate import HeldOut, evaluate
from pretrain.watch.journal import Journal
from pretrain.watch.norms import Norms
from pretrain.watch.profile import Profile
from pretrain.watch.samples import Samples
from pretrain.watch.slow_ranks import Pace
from pretrain.watch.step_times import StepClock
from pretrain.watch.timeline import Timeline
from pretrain.watch.verdicts import Verdicts


def train(config: RunConfig, run: RunFolder, attempt: int, layout: Layout, stop: StopRequest, pulse: Pulse = UNHEARD) -> Outcome:
    """Train from the newest commit (or from nothing) to the end, or until a stop is agreed on. Collective."""
    training, total_steps = config.training, config.training.total_steps
    engine, corpus, order, start, places, rollbacks, code, is_new = begin(config, run, layout)
    state, rearrange, objective = start, open_fill_in_the_middle(config), open_objective(config)
    batches = Batches(
        corpus, order, training, layout.data_rank, layout.data_size, layout.device, state.samples_seen, lambda: open_corpus(config),
        rearrange, objective,
    )  # fmt: skip
    timeline = Timeline(run.path, attempt, state.step, pulse, lambda: batches.seconds_waited, is_writer=layout.rank == 0)
    verdicts, score, pace, clock = Verdicts(layout), open_scoring(config, engine, layout), Pace(layout), StepClock(layout.device)
    norms = Norms(engine.param_names.values(), layout.device)
    samples = Samples(config, run.path, attempt, start, engine, layout)
    arena, checkpoint_bytes = Arena(owned_bytes(engine)), int(layout.sum_over_data_ranks(owned_bytes(engine)))
    saves = Saves(places, attempt, lambda: holds_lease(run, attempt))
    if is_new and config.checkpoint.self_test:
        save_and_load(engine, arena, run.checkpoints, attempt)

    journal = Journal(config, run.path, attempt, state, layout.rank == 0, layout.device, layout.world_size)
    with journal, Profile(config.profile, run.path, attempt, layout, journal.say) as profile, closing(batches), closing(arena):
        journal.say(choose_attention(config, layout.device) + announce_compiling(config, layout.device))
        journal.rollbacks(state, [asdict(one) for one in rollbacks])
        guard = Guard(config.guard, config.precision == "fp16", layout.gather(journal.losses(NUM_LOSSES))[0])
        stopping = not data_is_there(config, batches, layout, stop, journal, timeline)
        timeline.beat("first_step", state.step)
        while state.step < total_steps and not stopping:
            profile.begin(state.step + 1)
            num_samples = training.steps.batch_at(state.samples_seen)
            num_tokens = num_samples * training.sequence_length
            set_global_batch(engine, num_samples)
            share = rate_share(state.tokens_seen + num_tokens // 2, training, config.schedule)
            set_learning_rate(engine.optimizer, share)
            clock.enter("data_wait")
            micro_batches = batches.next_step()
            clock.enter("other")
            norms_due = due(state.step + 1, config.watch.norms_every_steps)
            num_valid = layout.total_over_data_ranks(sum(batch.num_valid for batch in micro_batches))
            for micro_step, batch in enumerate(micro_batches):
                seed_dropout(config.run.seed, state.step, micro_step, layout.data_rank)
                clock.enter("forward")
                loss = engine(
                    batch.tokens_BT, batch.labels_BT,
                    documents_BT=batch.documents_BT, positions_BT=batch.positions_BT, prefix_BT=batch.prefix_BT,
                )  # fmt: skip
                timeline.beat()
                clock.enter("backward")
                # The exact mean over the global batch's valid targets. DeepSpeed averages over the data ranks: their number is
                # multiplied in. Its division by the accumulation is switched off. A step that is not finite is skipped by all ranks.
                scale = (layout.data_size / num_valid.clamp(min=1.0)).float()
                engine.backward(loss * spread_not_finite(scale, loss), scale_wrt_gas=False)
                clock.enter("optimizer")
                if norms_due and micro_step + 1 == len(micro_batches):
                    norms.see_gradients(owned_gradients(engine), loss_scale(engine))  # behind the step they are gone
                engine.step()
                clock.enter("other")
                verdicts.add(loss)
            state = state.advance(num_samples, num_tokens, engine.was_step_applied())
            verdicts.send(state.step, num_valid, stop.asked, saves.is_written, engine.was_step_applied())
            profile.end(state.step)

            is_last = state.step == total_steps
            log_due = is_last or due(state.step, config.watch.log_every_steps)
            save_due = is_last or due(state.step, config.checkpoint.every_steps)
            fast_due = len(places) > 1 and due(state.step, config.checkpoint.fast_every_steps)
            told = verdicts.read(now=log_due or save_due)
            saves.advance(told.step, told.num_written)
            if spread := pace.after_step(clock.end_step(batches.seconds_waited)):
                journal.ranks(state, spread)
            if log_due:
                rate, norm = share * config.optimizer.peak_lr, gradient_norm(engine)
                journal.step(state, told.loss, rate, norm, batches.seconds_waited, loss_scale(engine), clock.means())
            if norms_due:
                journal.norms(state, norms.read(owned_weights(engine, layout)))
            if len(corpus.held_out) and (is_last or due(state.step, config.evaluate.every_steps)):
                journal.held_out(state, evaluate_held_out(engine, corpus, config, objective, layout, timeline, state.step))
            if is_last or due(state.step, config.evaluate.every_steps):
                samples.write(state, partial(timeline.beat, "evaluate", state.step), journal.say)
            if score is not None and (is_last or due(state.step, config.evaluate.tasks_every_steps)):
                timeline.beat("score", state.step)
                journal.scores(state, score())
            stopping = told.stop_asked or is_last or not data_is_there(config, batches, layout, stop, journal, timeline)
            if save_due or fast_due or stopping:
                verdicts.read(now=True)  # nothing is committed that was not judged
            compare_due = config.parallel.zero_stage < 3 and due(state.step, config.guard.compare_replicas_every_steps)
            findings = judge(engine, guard, verdicts.news(), compare_due, saves, layout)
            journal.findings(state, findings)
            if config.guard.on_spike == "rollback" and (spike := first_spike(findings)):
                saves.settle()  # it may be the one to go back to
                plan = plan_rollback(spike, config, batches.order.numbers, committed_steps(run.checkpoints, layout), attempt, rollbacks)
                return Outcome("rollback", str(plan), start.step, state.step, rollback=asdict(plan))
            if save_due or fast_due or stopping:
                timeline.beat("save", state.step)
                began = time.perf_counter()
                identity = batches.order.identity(state.samples_seen) | {"tokenizer": corpus.tokenizer_sha256}
                written = StateLayout.of(config, layout.world_size).to_json()
                about = {"state": state, "loss": guard.finite_loss, "identity": identity, "code": code, "layout": written}
                is_durable, wait = save_due or stopping, stopping or not config.checkpoint.asynchronous
                place = places[0 if is_durable else 1]
                problems = save(saves, place, lambda folder: start_writing(engine, arena, layout, folder), about, wait, stopping)
                journal.saved(state, time.perf_counter() - began, checkpoint_bytes, is_durable, problems)
            timeline.beat("step", state.step)
        timeline.beat("end", state.step)
    if state.step < total_steps:
        message = f"stopped and saved at step {state.step} of {total_steps}; the same command goes on from there."
        return Outcome("stopped", message, start.step, state.step)
    return Outcome("done", f"done: {state.step} steps, {state.tokens_seen:,} tokens; {run.path}", start.step, state.step)


def evaluate_held_out(
    engine: DeepSpeedEngine,
    corpus: Corpus,
    config: RunConfig,
    objective: Objective | None,
    layout: Layout,
    timeline: Timeline,
    step: int,
) -> HeldOut:
    """The held-out loss of the weights as they are. Collective."""
    sources, portion = corpus.held_out_sources, config.evaluate.micro_batch_samples
    batches = held_out_batches(
        corpus.held_out, config.training, portion, layout.data_rank, layout.data_size, layout.device, objective,
        [source.num_tokens for source in sources],
    )  # fmt: skip
    num_bytes = None if objective else corpus.held_out_bytes
    return evaluate(engine, timeline.each("evaluate", step, batches), num_bytes, layout.sum_over_data_ranks, sources)


def owned_weights(engine: DeepSpeedEngine, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and elements in fp32 of the weights that this rank holds; what all hold, rank 0 does."""
    return ((one.parameter, one.of(one.flat)) for one in owned_slices(engine) if layout.rank == 0 or not one.is_whole)


def start_writing(engine: DeepSpeedEngine, arena: Arena, layout: Layout, folder: PurePath) -> Callable[[bool], Answer | None]:
    """Copy this rank's part of the state, and have it written: see `StartWriting`. Raises RuntimeError where it is not the model's."""
    check_slices(engine)
    return arena.start(folder, image_of(engine, layout.rank, layout.world_size, {"random": describe_random_state()}))


def save(saves: Saves, place: Place, write: StartWriting, about: dict[str, Any], wait: bool, is_end: bool) -> list[str]:
    """Begin to save a step (`about`: see `Saves.begin`), and wait for the commit if asked to. Collective.

    Returns what went wrong with this save or the one before it. Raises UserError where the end of an attempt cannot be saved.
    """
    earlier = saves.begin(place, write, **about)
    problem = saves.settle() if wait else None
    if problem and is_end:
        raise UserError(f"{problem} Nothing partial was left; mend it and run the same command again.")
    return [one for one in (earlier, problem) if one is not None]


def judge(
    engine: DeepSpeedEngine, guard: Guard, steps: Sequence[StepNumbers], compare_due: bool, saves: Saves, layout: Layout
) -> list[Skip | Spike]:
    """What is wrong with the next steps, and where asked for with the weights. Collective.

    Raises UserError, or CorruptReplicaError, where the run must not go on: on all ranks, so the save in flight, whose steps were judged
    before it began, is committed first.
    """
    try:
        findings = guard.judge(steps)
        if compare_due:
            compare_replicas(engine, ((one.parameter, one.start, one.of(one.flat)) for one in owned_slices(engine)), layout)
        return findings
    except (UserError, CorruptReplicaError):
        saves.settle()
        raise


def committed_steps(checkpoints: Path, layout: Layout) -> list[int]:
    """The steps that are committed, as rank 0 sees it. Collective."""
    return layout.gather([step_of(commit) for commit in list_commits(checkpoints)])[0]


def data_is_there(config: RunConfig, batches: Batches, layout: Layout, stop: StopRequest, journal: Journal, timeline: Timeline) -> bool:
    """Wait until every rank can read its part of the next step; False when a stop is asked for meanwhile.

    Data waits for training, but where it is still built, or comes from an object store that may be down; then this is a collective,
    so that no rank waits in another.
    """
    waited = 0
    while config.data.train_while_building or config.data.is_remote:
        ready, asked = batches.is_ready(timeout_seconds=1.0), stop.asked
        if ready or batches.awaited_source or config.data.is_remote:
            timeline.wait()
        if layout.sum_over_data_ranks(asked):
            return False
        if layout.sum_over_data_ranks(ready) == layout.data_size:
            break
        if source := batches.awaited_source:
            if waited % 60 == 0:
                journal.say(f"waiting for the next units of {source} in {config.data.folder()}; training goes on when they are built")
            waited += 1
    return True


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every is not None and step % every == 0


def seed_dropout(seed: int, step: int, micro_step: int, data_rank: int) -> None:
    """Make what is random in a forward a pure function of its place, so that a resumed run draws the same."""
    mixed = np.random.SeedSequence([seed, step, micro_step, data_rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(mixed))


def gradient_norm(engine: DeepSpeedEngine) -> float | None:
    """Global norm before clipping, of the last step; None where DeepSpeed does not tell (fp32 at stage 0)."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def main() -> int:
    """One rank: `python -m pretrain.train RUN_FOLDER ATTEMPT PARENT`, started by the process PARENT, with which it ends."""
    end_with_parent(int(sys.argv[3]))
    redact_output()
    warnings.filterwarnings(
        "ignore", message=r".*torch\.distributed\.\w+` is deprecated.*", category=FutureWarning
    )  # DeepSpeed's calls, not ours
    run, attempt, rank = RunFolder(Path(sys.argv[1])), int(sys.argv[2]), int(os.environ.get("RANK", "0"))
    stop = StopRequest(run.stop_file if rank == 0 else None)
    records = Path(os.environ[OUTCOME_FOLDER_VARIABLE])
    announce_ready(records)
    pulse = Pulse.of_rank(records, rank)
    try:
        config = run.load_config()
        random.seed(config.run.seed)
        np.random.seed(config.run.seed % 2**32)
        outcome = train(config, run, attempt, initialize_layout(), stop, pulse)
    except UserError as error:
        outcome = Outcome("mistake", str(error))
    except CorruptReplicaError as error:
        outcome = Outcome("defect", str(error), comes_again=True)
    except Exception:
        outcome = Outcome("defect", traceback.format_exc())
    write_outcome(records, rank, outcome)
    sys.stdout.flush()
    # Clean-up of libraries may hang where another rank is gone; the record is written, and nothing is left to save.
    os._exit(0 if outcome.kind in ("done", "stopped", "rollback") else 1)


if __name__ == "__main__":
    main()
