"""Task files of lm-evaluation-harness: tasks with local data, and how the texts that a task asks for are written.

In: task files and folders of them (YAML). Out: the harness's tasks. Nothing is fetched: a task that would need a network is
refused. This module imports lm_eval, so it is imported only where there are tasks.
"""

import contextlib
import difflib
import io
import logging
import os
import re
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import lm_eval.api.metrics  # pyright: ignore[reportUnusedImport]  # it fills metric_registry
import lm_eval.api.task
import tqdm
from jinja2 import UndefinedError
from lm_eval.api.registry import metric_registry
from lm_eval.config.task import TaskConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict, load_yaml

from configs.errors import UserError

LOCAL_FORMATS = ("json", "csv", "parquet", "arrow", "text")
"""What `dataset_path` may say: formats of files that `datasets` reads by itself."""
FEWSHOT_SEED = 1234
"""The harness's own default."""
DEFAULT_NEW_TOKENS = 256
"""The harness's own, for a task that does not say `max_gen_toks`."""
TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
METRICS = ", ".join(sorted(metric_registry.keys()))


def load_tasks(paths: Sequence[Path]) -> TaskDict:
    """Tasks and groups of task files (YAML), and of all such files in and below folders.

    `dataset_kwargs.data_files` are relative to the task's file. Raises UserError for what cannot be read or would need a network.
    """
    loaded = TaskDict(tasks={}, groups={})
    source: dict[str, Path] = {}
    for path in paths:
        with quiet_harness(), tempfile.TemporaryDirectory() as cache:  # datasets are kept in memory; nothing is left in anybody's cache
            found = _load_file(path, cache)
        for name in found["tasks"]:
            if name in source:
                raise UserError(f"{path} and {source[name]} both hold a task {name!r}; give one of them another name.")
            source[name] = path
        loaded["tasks"].update(found["tasks"])
        loaded.setdefault("groups", {}).update(found.get("groups", {}))
    for name, task in loaded["tasks"].items():
        _refuse_missing_fields(task, source[name])
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _refuse_missing_fields(task: Any, path: Path) -> None:
    """A field that a template writes out and a document lacks would be judged as the text `None`."""
    texts = [task.get_config(key) for key in ("doc_to_text", "doc_to_target")]
    names = {name for text in texts if isinstance(text, str) for name in (text, *re.findall(r"{{\s*(\w+)\s*}}", text))}
    for number, document in enumerate(task.eval_docs, 1):
        if missing := sorted(name for name in names if name in document and document[name] is None):
            raise UserError(f"{path}: document {number} of its data has no {missing[0]!r}; mend it or leave it out.")


def _load_file(path: Path, cache: str) -> TaskDict:
    if not path.exists():
        near = sorted(other.name for other in path.parent.glob("*.yaml"))[:8] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such task file" + (f"; beside it: {', '.join(near)}." if near else "."))
    config: dict[str, Any] = {}
    try:
        config = {} if path.is_dir() else load_yaml(path)
        if not path.is_dir() and "group" not in config:
            if "task" not in config:
                raise UserError(f"{path}: a task file has `task: NAME`, found {', '.join(map(str, config)) or 'nothing'}.")
            if isinstance(config["task"], str) and not config.keys() & {"dataset_path", "custom_dataset", "include", "class"}:
                raise UserError(
                    f"{path}: dataset_path is missing; wanted one of {', '.join(LOCAL_FORMATS)}, and dataset_kwargs.data_files."
                )
            return TaskManager(include_defaults=False).load(_with_local_data(config, path, cache))
        manager = TaskManager(include_path=path if path.is_dir() else path.parent, include_defaults=False)
        for entry in manager.task_index.values():
            if entry.yaml_path is not None:
                entry.cfg, entry.yaml_path = _with_local_data(load_yaml(entry.yaml_path), entry.yaml_path, cache), None
        if not path.is_dir():
            return manager.load(config["group"])
        groups = manager.load(manager.all_groups) if manager.all_groups else TaskDict(tasks={})
        inner = {name for children in groups.get("group_map", {}).values() for name in children}
        names = [name for name in manager.all_groups + manager.all_subtasks if name not in inner]
        if not names:
            raise UserError(f"{path} holds no task files (*.yaml with `task: NAME`).")
        return manager.load(names)
    except UserError:
        raise
    except Exception as error:  # a task file may hold code, templates, data: whatever they raise is its author's to mend
        raise UserError(f"{path}: lm-eval cannot load it: {_explain(error, config)}.") from error


def _explain(error: Exception, config: dict[str, Any]) -> str:
    """What the harness's exception says to the author of a task file."""
    cause = error.__cause__ or error
    splits = (config.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(error, KeyError) and error.args[0] in [value for key, value in config.items() if key.endswith("_split")]:
        return f"there is no split {error.args[0]!r}; its data_files are of {', '.join(splits) if isinstance(splits, dict) else 'train'}"
    if isinstance(cause, StopIteration):
        return "one of its data files has no rows"
    if match := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
        near = difflib.get_close_matches(match[1], [field.name for field in fields(TaskConfig)], 1)
        return f"found the key {match[1]!r}, which no task has" + (f"; the nearest is {near[0]!r}" if near else "")
    if isinstance(cause, UndefinedError):
        return f"a template names a field that its data do not have: {cause}"
    return f"{type(cause).__name__}: {cause}".rstrip(".")


def _with_local_data(config: dict[str, Any], path: Path, cache: str) -> dict[str, Any]:
    """A task's configuration whose data are files, by absolute paths; those of a group's own tasks likewise."""
    config = dict(config)
    members = config.get("task")
    if isinstance(members, list):
        config["task"] = [_with_local_data(member, path, cache) if isinstance(member, dict) else member for member in members]
    for metric in config.get("metric_list") or []:
        name = metric.get("metric")
        if metric.get("hf_evaluate") or (isinstance(name, str) and "process_results" not in config and name not in metric_registry):
            raise UserError(f"{path}: metric {name!r} is not one of lm-eval's own and would have to be fetched; wanted one of {METRICS}.")
    if "dataset_path" not in config or callable(config.get("custom_dataset")):
        return config
    if config["dataset_path"] not in LOCAL_FORMATS:
        raise UserError(
            f"{path}: dataset_path {config['dataset_path']!r} would have to be fetched; wanted one of {', '.join(LOCAL_FORMATS)}, with "
            "the files in dataset_kwargs.data_files, relative to the task's file."
        )
    settings = dict(config.get("dataset_kwargs") or {})
    if "data_files" not in settings:
        raise UserError(f"{path}: dataset_kwargs.data_files is missing; name the task's files there, relative to it.")
    settings["data_files"] = _absolute(settings["data_files"], path)
    config["dataset_kwargs"] = settings | {"cache_dir": cache, "keep_in_memory": True}
    return config


def _absolute(files: Any, path: Path) -> Any:
    """File names, or lists or mappings of them, as absolute paths."""
    if isinstance(files, dict):
        return {split: _absolute(names, path) for split, names in files.items()}
    if isinstance(files, list):
        return [_absolute(name, path) for name in files]
    if "://" in files:
        raise UserError(f"{path}: data file {files} would have to be fetched; copy it beside the task's file.")
    found = path.parent / files
    if not any(letter in files for letter in "*?[") and not found.is_file():
        raise UserError(f"{path}: no such data file {found}.")
    return str(found.resolve())


@dataclass(frozen=True)
class Decoding:
    """How a task's texts are written; the words are those of `generate_batch`."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None


def read_generation_settings(settings: dict[str, Any]) -> tuple[Decoding, list[str]]:
    """A task's `generation_kwargs`: how its texts are written, and the strings that end a text.

    Raises UserError for a setting that asks for another way of decoding.
    """
    rest = dict(settings)
    limits = [limit for limit in (rest.pop(name, None) for name in TOKEN_LIMITS) if limit is not None]
    until = rest.pop("until", None) or []
    temperature, top_k, top_p = rest.pop("temperature", None), rest.pop("top_k", None), rest.pop("top_p", None)
    samples = rest.pop("do_sample", None)
    if rest:
        raise UserError(
            f"a task's generation_kwargs have {', '.join(sorted(rest))}; what is known here: until, {TOKEN_LIMITS[0]}, do_sample, "
            "temperature, top_k, top_p."
        )
    if samples is None:
        samples = bool(temperature)
    heat = float(1.0 if temperature is None else temperature) if samples else 0.0
    num_tokens = int(limits[0] if limits else DEFAULT_NEW_TOKENS)
    decoding = Decoding(num_tokens, heat, top_k or None, None if top_p is None else float(top_p))
    return decoding, [stop for stop in ([until] if isinstance(until, str) else until) if stop]


@contextlib.contextmanager
def quiet_harness() -> Generator[None]:
    """The harness without its bars, its notes, and what it prints; errors of its are still said."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its processes would be forks of this one, threads and all
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it raises what it logs
    lm_eval.api.task.datasets.disable_progress_bars()
    # One of its modules holds the bar by name, the others look it up when they need it.
    holders: tuple[Any, ...] = (lm_eval.api.task, tqdm)
    bar = tqdm.tqdm
    for holder in holders:
        holder.tqdm = lambda items, **_: items
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for holder in holders:
            holder.tqdm = bar
