"""THE LOOP. One process of it runs on every device; `pretrain/run/supervisor.py` starts them.

In: a run folder with `run.yaml`, token shards. Out: commits in `checkpoints/`, rows in `metrics.jsonl`, and a record
of how this rank ended. Every call of the engine is DeepSpeed's own.
"""

import os
import random
import sys
import traceback
import warnings
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import torch
from deepspeed import DeepSpeedEngine

from configs.errors import UserError
from configs.schema import RunConfig
from pretrain.checkpoint.commit import newest_verified_commit, write_commit
from pretrain.checkpoint.fragments import read_fragments, write_fragments
from pretrain.checkpoint.random_state import describe_random_state, restore_random_state
from pretrain.checkpoint.retention import remove_old_commits
from pretrain.data.batches import Batches, held_out_batches
from pretrain.data.corpus import open_corpus
from pretrain.data.order import DataOrder
from pretrain.engine.optimizer import learning_rate, set_learning_rate
from pretrain.engine.parallel import Layout, initialize_layout
from pretrain.engine.setup import initialize_engine
from pretrain.model.decoder import Decoder, initialize_weights
from pretrain.run.folder import RunFolder
from pretrain.run.lease import holds_lease
from pretrain.run.outcome import OUTCOME_FOLDER_VARIABLE, Outcome, announce_ready, write_outcome
from pretrain.run.signals import StopRequest, end_with_parent
from pretrain.state import TrainState
from pretrain.watch.evaluate import evaluate
from pretrain.watch.journal import Journal
from pretrain.watch.verdicts import Verdicts


def train(config: RunConfig, run: RunFolder, attempt: int, layout: Layout, stop: StopRequest) -> Outcome:
    """Train from the newest commit (or from nothing) to the end, or until a stop is agreed on. Collective."""
    training, total_steps = config.training, config.training.total_steps
    corpus = open_corpus(config)
    model = Decoder(config.model)
    initialize_weights(model, config.run.seed)
    engine = initialize_engine(config, layout, model)
    order = DataOrder(corpus.sources, config.mixture, training, config.run.seed)
    start = state = resume(engine, run, order, corpus.tokenizer_sha256, layout)
    order = order.skipping(state.skipped_samples)
    batches = Batches(
        corpus, order, training, layout.data_rank, layout.data_size, layout.device, state.samples_seen, lambda: open_corpus(config)
    )
    verdicts = Verdicts(layout)

    with Journal(config, run.path, attempt, state, is_writer=layout.rank == 0) as journal, closing(batches):
        stopping = not data_is_there(config, batches, layout, stop, journal)
        while state.step < total_steps and not stopping:
            rate = learning_rate(state.tokens_seen + training.tokens_per_step // 2, training, config.optimizer, config.schedule)
            set_learning_rate(engine.optimizer, rate)
            micro_batches = batches.next_step()
            num_valid = layout.sum_over_data_ranks(sum(batch.num_valid for batch in micro_batches))
            for micro_step, batch in enumerate(micro_batches):
                seed_dropout(config.run.seed, state.step, micro_step, layout.data_rank)
                loss = engine(batch.tokens_BT, batch.labels_BT, documents_BT=batch.documents_BT, positions_BT=batch.positions_BT)
                # The exact mean over the global batch's valid targets. DeepSpeed averages over the data ranks: their number is
                # multiplied in. Its division by the accumulation is switched off.
                engine.backward(loss * (layout.data_size / max(1.0, num_valid)), scale_wrt_gas=False)
                engine.step()
                verdicts.add(loss)
            state = state.advance(training.global_batch_samples, training.tokens_per_step, engine.was_step_applied())
            verdicts.send(state.step, num_valid, stop.asked)

            is_last = state.step == total_steps
            log_due = is_last or due(state.step, config.watch.log_every_steps)
            save_due = is_last or due(state.step, config.checkpoint.every_steps)
            mean_loss, stopping = verdicts.read(now=log_due or save_due)
            if log_due:
                journal.step(state, mean_loss, rate, gradient_norm(engine), batches.seconds_waited)
            if len(corpus.held_out) and (is_last or due(state.step, config.evaluate.every_steps)):
                held_out = held_out_batches(
                    corpus.held_out, training, config.evaluate.micro_batch_samples,
                    layout.data_rank, layout.data_size, layout.device,
                )  # fmt: skip
                journal.held_out(state, evaluate(engine, held_out, corpus.held_out_bytes, layout.sum_over_data_ranks))
            stopping = stopping or is_last or not data_is_there(config, batches, layout, stop, journal)
            if save_due or stopping:
                verdicts.read(now=True)  # nothing that is not finite is ever committed
                identity = batches.order.identity(state.samples_seen) | {"tokenizer": corpus.tokenizer_sha256}
                if problem := save(engine, run, state, identity, attempt, layout, config.checkpoint.keep):
                    if is_last or stopping:
                        raise UserError(f"{problem} Nothing partial was left; mend it and run the same command again.")
                    journal.say(f"WARNING: {problem} Training goes on.")
    if state.step < total_steps:
        message = f"stopped and saved at step {state.step} of {total_steps}; the same command goes on from there."
        return Outcome("stopped", message, start.step, state.step)
    return Outcome("done", f"done: {state.step} steps, {state.tokens_seen:,} tokens; {run.path}", start.step, state.step)


def data_is_there(config: RunConfig, batches: Batches, layout: Layout, stop: StopRequest, journal: Journal) -> bool:
    """Wait until every rank can read its part of the next step; False when a stop is asked for meanwhile.

    Data waits for training, but where it is still built, or comes from an object store that may be down; then this is a collective,
    so that no rank waits in another.
    """
    waited = 0
    while config.data.train_while_building or config.data.is_remote:
        ready, asked = batches.is_ready(timeout_seconds=1.0), stop.asked
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


def resume(engine: DeepSpeedEngine, run: RunFolder, order: DataOrder, tokenizer_sha256: str, layout: Layout) -> TrainState:
    """The state of the newest verified commit, with the engine filled from it; step 0 where there is none. Collective."""

    def say(text: str) -> None:
        if layout.rank == 0:
            with suppress(OSError):
                print(text, file=sys.stderr, flush=True)

    commit = newest_verified_commit(run.checkpoints, say)
    if commit is None:
        return TrainState()
    state = commit.state
    order = order.skipping(state.skipped_samples)
    identity = order.identity(state.samples_seen) | {"tokenizer": tokenizer_sha256}
    changed = sorted(key for key in commit.identity | identity if commit.identity.get(key) != identity.get(key))
    if changed:
        raise UserError(
            f"{commit.folder} has seen {state.samples_seen} samples, and what the run file now names would have made them others: "
            f"what differs: {', '.join(changed)}. mixture.stages may change from step {state.step} on (from_tokens: "
            f"{order.next_token(state.samples_seen)} or more); put the rest back as it was, or start another run with run.name=NAME."
        )
    read_fragments(engine, commit.folder)
    restore_random_state(commit.folder, commit.world_size)
    engine.global_steps, engine.skipped_steps = commit.state.step, commit.state.skipped_steps
    say(f"resumed from {commit.folder.name}, every byte verified")
    return commit.state


def save(
    engine: DeepSpeedEngine, run: RunFolder, state: TrainState, identity: dict[str, str], attempt: int, layout: Layout, keep: int
) -> str | None:
    """Commit the state and remove commits beyond `keep`. Collective. Returns what went wrong, in a sentence, or None."""
    problem = write_commit(
        run.checkpoints,
        state,
        write_rank_files=lambda folder: write_fragments(
            engine, folder, layout.rank, layout.world_size, {"random": describe_random_state()}
        ),
        identity=identity,
        attempt=attempt,
        still_ours=lambda: holds_lease(run, attempt),
    )
    if problem is None and layout.rank == 0:
        remove_old_commits(run.checkpoints, keep)
    return f"step {state.step} could not be saved: {problem}." if problem else None


def main() -> int:
    """One rank: `python -m pretrain.train RUN_FOLDER ATTEMPT`, started by the supervisor."""
    end_with_parent()
    warnings.filterwarnings(
        "ignore", message=r".*torch\.distributed\.\w+` is deprecated.*", category=FutureWarning
    )  # DeepSpeed's calls, not ours
    stop = StopRequest()
    run, attempt, rank = RunFolder(Path(sys.argv[1])), int(sys.argv[2]), int(os.environ.get("RANK", "0"))
    records = Path(os.environ[OUTCOME_FOLDER_VARIABLE])
    announce_ready(records)
    try:
        config = run.load_config()
        random.seed(config.run.seed)
        np.random.seed(config.run.seed % 2**32)
        outcome = train(config, run, attempt, initialize_layout(), stop)
    except UserError as error:
        outcome = Outcome("mistake", str(error))
    except Exception:
        outcome = Outcome("defect", traceback.format_exc())
    write_outcome(records, rank, outcome)
    sys.stdout.flush()
    # Clean-up of libraries may hang where another rank is gone; the record is written, and nothing is left to save.
    os._exit(0 if outcome.kind in ("done", "stopped") else 1)


if __name__ == "__main__":
    main()
