"""Tasks of lm-evaluation-harness on a run's newest checkpoint, and on the model that is being trained.

In: task files with local data, a model. Out: scores. The harness is imported when there is a task, and not before.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from configs.errors import UserError
from configs.model_section import ModelSection
from configs.schema import RunConfig
from data_pipeline.manifest import TOKENIZER
from data_pipeline.tokenizer import load_tokenizer, vocabulary_size
from pretrain.data.prompts import Prompt, PromptForm
from pretrain.data.remote import described_in
from pretrain.model.decoder import Decoder
from pretrain.model.generate import generate_batch
from pretrain.run.folder import RunFolder
from pretrain.write import SaidProgress, load_newest, seeded_generator

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict

    from pretrain.engine.parallel import Layout
    from pretrain.watch.task_files import Decoding
    from pretrain.watch.tasks import Score


def open_tasks(paths: Sequence[str | Path]) -> "TaskDict":
    """The tasks of task files or folders of them. Raises UserError for what cannot be read, and where the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("tasks need lm-evaluation-harness, which is not installed: pip install 'pretrain[eval]'.")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):  # read when the libraries are imported
        os.environ[name] = "1"
    from pretrain.watch.task_files import load_tasks

    return load_tasks([Path(path) for path in paths])


def evaluate_tasks(
    tasks: "TaskDict",
    model: Decoder,
    section: ModelSection,
    form: PromptForm,
    *,
    batch_size: int,
    limit: int | None = None,
    with_errors: bool = False,
    tell: Callable[[int, int, str], object] = lambda done, total, what: None,
    rank: int = 0,
    size: int = 1,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> "list[Score]":
    """Scores of tasks that `open_tasks` opened; the same on every rank, and for any number of ranks.

    model: a Decoder, or a DeepSpeed engine around one; `section`: its shape. limit: at most so many documents of each task.
    batch_size: requests that one rank reads at once. with_errors: whether standard errors are estimated too.
    tell: called as work is done, with how much of how much of what. gather: from a value of each rank the values of all, on every
    rank. Collective: all ranks call this, and make equally many forwards.

    The model is left as it was, and so is every random state. Raises UserError for a task that does not fit the model.
    """
    from pretrain.watch.tasks import Ranks, TaskModel, score_tasks

    @torch.no_grad()
    def logits(tokens_BT: torch.Tensor, prefix_BT: torch.Tensor | None) -> torch.Tensor:
        return model(tokens_BT, prefix_BT=prefix_BT)

    def complete(
        prompts: Sequence[Prompt], *, numbers: Sequence[int], decoding: "Decoding", is_enough: Callable[[int, Sequence[int]], bool]
    ) -> list[list[int]]:
        written: list[list[int]] = [[] for _ in prompts]
        tokens_and_ends = generate_batch(
            model,
            [prompt.tokens for prompt in prompts],
            section=section,
            num_prefix=[prompt.num_prefix for prompt in prompts],
            end_of_text=form.end_of_text,
            generators=[seeded_generator(0, number) for number in numbers],
            num_tokens=vocabulary_size(form.tokenizer),
            is_enough=is_enough,
            on_any_rank=lambda holds: any(gather(holds)),
            **asdict(decoding),
        )
        for row, token in tokens_and_ends:
            if token is not None:
                written[row].append(token)
        return written

    task_model = TaskModel(
        logits,
        complete,
        form,
        context=section.largest_context,
        batch_size=batch_size,
        device=next(model.parameters()).device,
        ranks=Ranks(rank, size, gather),
        tell=tell,
    )
    was_training = model.training
    model.eval()
    try:
        # Requests have many lengths, and layers that are compiled for fixed shapes would be compiled for each.
        with torch.compiler.set_stance("force_eager"):
            return score_tasks(task_model, tasks, limit=limit, with_errors=with_errors)
    finally:
        model.train(was_training)


def evaluate_run(
    run: RunFolder, paths: Sequence[Path], *, limit: int | None, batch_size: int, say: Callable[[str], object]
) -> dict[str, Any]:
    """The scores of a run's newest verified commit, on one device: `{run, step, tokens_seen, scores}`."""
    tasks = open_tasks(paths)
    trained = load_newest(run, say)
    section = trained.config.model
    scores = evaluate_tasks(
        tasks, trained.model, section, trained.form, batch_size=batch_size, limit=limit, with_errors=True, tell=SaidProgress(say)
    )
    state = trained.commit.state
    return {"run": str(run.path), "step": state.step, "tokens_seen": state.tokens_seen, "scores": [asdict(score) for score in scores]}


def open_scoring(config: RunConfig, engine: torch.nn.Module, layout: "Layout") -> Callable[[], dict[str, float]] | None:
    """What gives the scores of `evaluate.tasks` by a model that is being trained, `task/NAME/METRIC` -> value: a collective.

    None where there are no tasks. Raises UserError for tasks that cannot be read.
    """
    if not config.evaluate.tasks:
        return None
    end_of_text = config.data.tokenizer.end_of_text
    form = PromptForm(load_tokenizer(described_in(config.data) / TOKENIZER, end_of_text), end_of_text, config.objective)
    tasks = open_tasks(config.evaluate.tasks)
    how = {"batch_size": config.evaluate.micro_batch_samples, "limit": config.evaluate.tasks_limit}
    where: dict[str, Any] = {"rank": layout.data_rank, "size": layout.data_size, "gather": layout.gather}

    def score() -> dict[str, float]:
        return {one.name: one.value for one in evaluate_tasks(tasks, cast("Decoder", engine), config.model, form, **how, **where)}

    return score
