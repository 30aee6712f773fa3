"""What one rank does in test_tasks.py: a DeepSpeed engine that is asked a task's questions. Called by `run_on_ranks`."""

import atexit
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

from data_pipeline.tokenizer import load_tokenizer
from pretrain.data.prompts import PromptForm
from pretrain.engine.setup import construct_model, initialize_engine
from pretrain.evaluate_tasks import evaluate_tasks, open_tasks
from tests.tiny import END_OF_TEXT
from tests.training import this_rank, tiny_config


def ask_engines(tokenizer_file: str, runs: str, files: list[str], stages: list[str]) -> dict[str, Any]:
    """By stage, the scores that this rank has, before and behind a step of training, and whether the loop could go on."""
    layout = this_rank()
    rank, size = layout.data_rank, layout.data_size
    tokenizer = load_tokenizer(Path(tokenizer_file), END_OF_TEXT)
    tasks = open_tasks(files)

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * size
        distributed.all_gather_object(values, value)
        return values

    found: dict[str, Any] = {}
    for stage in stages:
        config = tiny_config("none", runs, parallel__zero_stage=stage, precision="fp32", training__micro_batch_samples="2")
        engine = initialize_engine(config, layout, construct_model(config, layout))
        form = PromptForm(tokenizer, END_OF_TEXT, config.objective)

        def ask(engine: Any = engine, config: Any = config, form: PromptForm = form) -> dict[str, float]:
            scores = evaluate_tasks(tasks, engine, config.model, form, batch_size=2, limit=5, rank=rank, size=size, gather=gather)
            return {score.name: score.value for score in scores}

        first = ask()
        was_training = engine.training
        tokens_BT = torch.arange(16).reshape(2, 8) + 20 * rank
        for _ in range(config.training.accumulation(size)):
            engine.backward(engine(tokens_BT, tokens_BT))
            engine.step()
        found[stage] = {"first": first, "behind": ask(), "training": was_training, "steps": engine.global_steps}
    # Nothing is left to do: without it the interpreter's end aborts now and then (a thread of torch that nobody joined).
    atexit.register(os._exit, 0)
    return found
