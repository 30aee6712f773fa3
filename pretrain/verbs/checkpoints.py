"""The verbs `checkpoints import|export|matrix`: DeepSpeed's own files in and out, and what becomes of a checkpoint under another layout."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.errors import UserError
from pretrain.verbs.arguments import AsJson, Overrides, RunArgument, RunFile, find_run, say

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from pretrain.checkpoint.deepspeed_files import DeepSpeedFiles
    from pretrain.checkpoint.verify import Commit
    from pretrain.run.folder import RunFolder

MATRIX_RANKS, MATRIX_MICRO_BATCH, MATRIX_GLOBAL_BATCH = (1, 2), 2, 12


def export_commit(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that is not there yet.", show_default=False)],
    deepspeed: Annotated[bool, typer.Option("--deepspeed", help="In DeepSpeed's own form (Hugging Face's: `pretrain export`).")] = False,
    step: Annotated[int | None, typer.Option(help="Which step's; else the newest that is intact.", show_default=False)] = None,
) -> None:
    """Write a checkpoint in the form that DeepSpeed's zero_to_fp32 and its universal loader read.

    Any stage from 1 on and any number of ranks loads it, with `checkpoint: {load_universal: true}`. Every byte is verified before, and
    read back and compared behind; OUT is there whole or not at all.

    Example: pretrain checkpoints export runs/demo demo-for-deepspeed --deepspeed
    """
    if not deepspeed:
        raise UserError("in which form? Add --deepspeed; for Hugging Face's use `pretrain export RUN OUT`.")
    folder = find_run(run)
    from configs.durable import new_folder
    from pretrain.checkpoint.deepspeed_export import export_deepspeed
    from pretrain.write import SaidProgress, newest_intact_commit

    commit = newest_intact_commit(folder, say) if step is None else _intact_commit(folder, step)
    with new_folder(out) as temporary:
        tag = export_deepspeed(commit, temporary, SaidProgress(say)).name
    say(f"{out}: {commit.folder.name} of {folder.path}, read back and equal bit for bit.")
    say(f"weights: python -m deepspeed.utils.zero_to_fp32 {out} WEIGHTS_FOLDER")
    say(f"training: engine.load_checkpoint({str(out)!r}, tag={tag!r}) with checkpoint: {{load_universal: true}} and equal parameter names")


def import_commit(
    source: Annotated[
        Path, typer.Argument(metavar="DEEPSPEED_DIR", help="What save_checkpoint was given, or a tag in it.", show_default=False)
    ],
    run_file: RunFile,
    overrides: Overrides = None,
    tag: Annotated[str | None, typer.Option(help="Which tag; else the one that `latest` names.", show_default=False)] = None,
    samples_seen: Annotated[
        int | None, typer.Option(min=0, help="Where the data goes on; else where the run file is behind so many steps.", show_default=False)
    ] = None,
    run_its_pickle: Annotated[
        bool, typer.Option("--run-its-pickle", help="Open files that could run any code. Only for those you wrote yourself.")
    ] = False,
) -> None:
    """Make a checkpoint that DeepSpeed's engine wrote (ZeRO stages 1 to 3, Adam) the first one of a new run.

    Weights, moments and steps are taken as they are; names and shapes must be those of the run file's model. Files are opened without
    running code; what DeepSpeed 0.19 writes by itself needs nothing more. `pretrain train` goes on from it.

    Example: pretrain checkpoints import old-run/checkpoints RUN.yaml --tag global_step1000
    """
    from configs.loader import load_config

    config = load_config(run_file, overrides or [])
    from pretrain.checkpoint.deepspeed_files import DeepSpeedFiles
    from pretrain.checkpoint.verify import list_commits
    from pretrain.data.remote import described_in
    from pretrain.run.folder import RunFolder
    from pretrain.run.lease import Lease

    run = RunFolder.of(config)
    if config.checkpoint.store is not None:
        raise UserError(f"checkpoint.store={config.checkpoint.store}: an import is written into the run folder; leave it out for this run.")
    if list_commits(run.checkpoints):
        raise UserError(f"{run.path} has checkpoints of its own; import into another run with run.name=NAME.")
    if config.optimizer.kind != "adamw":
        raise UserError(f"optimizer.kind {config.optimizer.kind}: only adamw goes on with the moments that DeepSpeed's files hold.")
    files = DeepSpeedFiles(source, tag, run_its_pickle)
    _check_shapes(config, files)
    run.prepare(config)
    with Lease(run) as lease:
        run.write_description(config, described_in(config.data))
        commit = _write_commit(config, run, files, lease.attempt, samples_seen)
    say(
        f"{commit.folder}: {files.num_ranks} rank(s) of stage {files.zero_stage} at step {files.step}, taken over and read back; the data "
        f"goes on behind {commit.state.samples_seen:,} samples."
    )
    for number, settings in enumerate(files.settings):
        kept = {key: settings[key] for key in ("lr", "weight_decay", "betas", "eps") if key in settings}
        say(f"its group {number} had {kept}; from here on the run file's settings hold")
    say(f"go on: pretrain train {run_file}")


def matrix(as_json: AsJson = False) -> None:
    """Print what becomes of a checkpoint when a run goes on at another ZeRO stage, number of ranks or precision.

    exact: weights, moments, steps and settings are the same bits; the losses that follow differ at most by the tolerance that is
    printed. converted: they are the same bits too, and the model goes on in another precision. refused: with the reason.

    Example: pretrain checkpoints matrix
    """
    from pretrain.checkpoint.layouts import all_pairs
    from pretrain.page import open_page

    rows = all_pairs(MATRIX_RANKS, MATRIX_MICRO_BATCH, MATRIX_GLOBAL_BATCH)
    if as_json:
        typer.echo(json.dumps(rows))
        return
    from pretrain.checkpoint_matrix import tell_matrix

    tell_matrix(rows, open_page())


def _intact_commit(run: "RunFolder", step: int) -> "Commit":
    from pretrain.checkpoint.verify import commit_folder_of, list_commits, read_commit, verify_commit

    folder, there = commit_folder_of(run.checkpoints, step), list_commits(run.checkpoints)
    if folder not in there:
        steps = ", ".join(str(int(path.name.removeprefix("step-"))) for path in there[:8]) or "none"
        raise UserError(f"{run.path} has no checkpoint of step {step}; it has {steps}.")
    if problems := verify_commit(folder):
        raise UserError(f"{folder} is damaged: {'; '.join(problems[:3])}. Take another step.")
    return read_commit(folder)


def _check_shapes(config: "RunConfig", files: "DeepSpeedFiles") -> None:
    """Raises UserError where the files hold other parameters than the run file's model."""
    import torch

    from pretrain.model.build import build_model

    with torch.device("meta"):
        model = build_model(config.model, config.objective)
    kept = model.state_dict().keys()
    ours = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ours |= {name: tuple(buffer.shape) for name, buffer in model.named_buffers() if name in kept}
    theirs = files.shapes | {name: tuple(buffer.shape) for name, buffer in files.buffers.items() if name in ours}
    if ours != theirs:
        different = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
        rows = "; ".join(f"{name}: found {theirs.get(name)}, wanted {ours.get(name)}" for name in different[:4])
        raise UserError(f"{files.folder} holds other parameters than the run file's model ({len(different)}): {rows}.")


def _write_commit(config: "RunConfig", run: "RunFolder", files: "DeepSpeedFiles", attempt: int, samples_seen: int | None) -> "Commit":
    """The run's first commit, read back before it has its name."""
    import time

    from configs.durable import new_folder
    from configs.functions import code_of_the_user
    from pretrain.checkpoint.blocks import FileRecord
    from pretrain.checkpoint.index import FragmentIndex
    from pretrain.checkpoint.layouts import StateLayout
    from pretrain.checkpoint.random_state import describe_random_state
    from pretrain.checkpoint.verify import Commit, commit_name, read_commit, verify_commit, write_manifest
    from pretrain.data.corpus import open_corpus
    from pretrain.data.order import DataOrder
    from pretrain.state import TrainState
    from pretrain.write import SaidProgress

    training, corpus = config.training, open_corpus(config)
    if files.step > training.total_steps:
        raise UserError(
            f"{files.folder} is at step {files.step}, and the run file ends at step {training.total_steps}; raise training.total_tokens."
        )
    samples = training.steps.samples_before(files.step) if samples_seen is None else samples_seen
    state = TrainState(files.step, samples, samples * training.sequence_length, files.skipped_steps)
    order = DataOrder(corpus.sources, config.mixture, training, config.run.seed)
    written = StateLayout(files.zero_stage, files.precision, "adamw", training.micro_batch_samples, files.num_ranks)
    final, progress = run.checkpoints / commit_name(files.step), SaidProgress(say)
    run.checkpoints.mkdir(exist_ok=True)
    with new_folder(final) as temporary:
        records: dict[str, FileRecord] = {}
        for rank in range(files.num_ranks):
            records |= files.image(rank, _groups(config), describe_random_state()).write(temporary)
            progress(rank + 1, files.num_ranks, "ranks")
        commit = Commit(
            temporary,
            state,
            records,
            identity=order.identity(samples) | {"tokenizer": corpus.tokenizer_sha256},
            code=code_of_the_user(config),
            world_size=files.num_ranks,
            attempt=attempt,
            loss=float("nan"),
            time=int(time.time()),
            layout=written.to_json(),
        )
        write_manifest(commit)
        if problems := verify_commit(temporary):
            raise RuntimeError(f"what was written is damaged: {problems[0]}")
        with FragmentIndex(commit):  # every element of every parameter exactly once
            pass
    return read_commit(final)


def _groups(config: "RunConfig") -> list[dict[str, object]]:
    """The settings that training will go on with, as a commit has them."""
    import torch

    from pretrain.checkpoint.fragments import HYPER_PARAMETERS
    from pretrain.engine.optimizer import parameter_groups
    from pretrain.model.build import build_model

    with torch.device("meta"):
        groups = parameter_groups(build_model(config.model, config.objective), config.optimizer)
    adam = {"betas": [config.optimizer.beta1, config.optimizer.beta2], "eps": config.optimizer.epsilon}
    return [{key: value for key, value in {**group, **adam}.items() if key in HYPER_PARAMETERS} for group in groups]
