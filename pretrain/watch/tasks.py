"""Scores of tasks of lm-evaluation-harness (Gao et al. 2021), by the harness's model class over functions of ours.

In: tasks; a function that gives logits, one that continues prompts. Out: a score for each metric of each task. This module
imports lm_eval, so it is imported only where there are tasks.

The harness runs on every rank with all requests; the class divides them, and brings the answers together. Every rank makes the same
number of forwards of the same shapes, as ZeRO-3 needs it.

Shapes: B requests, T tokens, V vocabulary, n tokens that are judged.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks.manager import TaskDict
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from configs.errors import UserError
from pretrain.data.prompts import Prompt, PromptForm
from pretrain.watch.task_files import Decoding, quiet_harness, read_generation_settings

LENGTH_STEP = 64
"""Tokens; rows are padded to a multiple, so that there are few shapes."""
RESAMPLES = 1000
"""For the standard error of metrics that are no means."""

Answer = tuple[float, bool]
"""The logarithm of a continuation's probability, and whether it is what greedy decoding writes."""


class Logits(Protocol):
    """A model's forward without gradients."""

    def __call__(self, tokens_BT: torch.Tensor, prefix_BT: torch.Tensor | None) -> torch.Tensor:
        """Logits (B, T, V); `prefix_BT` marks places that see each other in both directions, None: there are none."""
        ...


class Complete(Protocol):
    """What continues prompts; on all ranks at once, each with its own."""

    def __call__(
        self, prompts: Sequence[Prompt], *, numbers: Sequence[int], decoding: Decoding, is_enough: Callable[[int, Sequence[int]], bool]
    ) -> list[list[int]]:
        """The new tokens of each prompt. `numbers` are theirs among all prompts, for the draws; `is_enough` as in `generate_batch`."""
        ...


@dataclass(frozen=True)
class Ranks:
    """This rank's place among those that evaluate together."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    """From a value of each rank the values of all, in order, on every rank (a blocking collective)."""


@dataclass(frozen=True)
class Score:
    """A metric of a task or of a group of tasks."""

    task: str
    metric: str
    filter: str
    """The task's filter of answers; `none` where it has none."""
    value: float
    standard_error: float | None
    num_documents: int | None
    higher_is_better: bool | None

    @property
    def name(self) -> str:
        """As in metrics.jsonl: `task/arithmetic/acc`."""
        return f"task/{self.task}/{self.metric}" + ("" if self.filter == "none" else f"/{self.filter}")


class TaskModel(LM):
    """The harness's view of a model: text in, probabilities and text out."""

    def __init__(
        self,
        logits: Logits,
        complete: Complete,
        form: PromptForm,
        *,
        context: int,
        batch_size: int,
        device: torch.device,
        ranks: Ranks,
        tell: Callable[[int, int, str], object],
    ) -> None:
        super().__init__()
        self._logits, self._complete, self._form = logits, complete, form
        self._context, self._batch_size, self._device, self._ranks, self._tell = context, batch_size, device, ranks, tell

    def loglikelihood(self, requests: list[Instance]) -> list[Answer]:
        """How likely each continuation is behind its context."""
        pairs: list[tuple[Prompt, list[int]]] = []
        for request in requests:
            context, continuation = cast("tuple[str, str]", request.args)
            if not context:
                pairs.append((Prompt([self._form.end_of_text]), self._form.encode_text(continuation)))
                continue
            if self._form.separator is None:  # as in the harness: a space belongs to the word behind it
                bare = context.rstrip()
                context, continuation = bare, context[len(bare) :] + continuation
            pairs.append(self._form.encode_pair(context, continuation))
        for request, (_, continuation) in zip(requests, pairs, strict=True):
            if len(continuation) > self._context:
                raise UserError(
                    f"{request.task_name}: document {(request.doc_id or 0) + 1} is judged by a continuation of {len(continuation)} tokens; "
                    f"the model's context is {self._context}. Shorten it, or leave it out."
                )
        return self._judge(pairs)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """How likely whole texts are: every token once, those beyond the context in windows of their own."""
        pairs: list[tuple[Prompt, list[int]]] = []
        text_of_pair: list[int] = []
        for number, request in enumerate(requests):
            tokens = self._form.encode_text(cast("str", request.args[0]))
            for window in get_rolling_token_windows(tokens, self._form.end_of_text, self._context, context_len=1):
                before, judged = make_disjoint_window(window)
                pairs.append((Prompt(before), judged))
                text_of_pair.append(number)
        sums = [0.0] * len(requests)
        for number, (value, _) in zip(text_of_pair, self._judge(pairs), strict=True):
            sums[number] += value
        return sums

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model writes behind each context, up to the first of the task's stop strings."""
        groups: dict[Decoding, list[int]] = {}
        prompts: list[Prompt] = []
        stops: list[list[str]] = []
        for number, request in enumerate(requests):
            context, settings = cast("tuple[str, dict[str, Any]]", request.args)
            decoding, stop = read_generation_settings(settings)
            if decoding.max_new_tokens >= self._context:
                raise UserError(
                    f"a task asks for {decoding.max_new_tokens} new tokens, the model's context is {self._context}; "
                    "lower generation_kwargs.max_gen_toks in the task's file."
                )
            prompts.append(self._form.encode(context).last(self._context - decoding.max_new_tokens))
            stops.append(stop)
            groups.setdefault(decoding, []).append(number)
        texts: dict[int, str] = {}
        for decoding, numbers in groups.items():
            longest_first = sorted(numbers, key=lambda number: (-len(prompts[number].tokens), number))
            for mine, _ in self._divide(longest_first, "texts written"):
                written = self._complete(
                    [prompts[number] for number in mine],
                    numbers=mine,
                    decoding=decoding,
                    is_enough=functools.partial(self._meets_a_stop, [stops[number] for number in mine]),
                )
                for number, tokens in zip(mine, written, strict=True):
                    text = self._form.tokenizer.decode(tokens)
                    for stop in stops[number]:
                        text = text.partition(stop)[0]
                    texts[number] = text
        texts = {number: text for part in self._ranks.gather(texts) for number, text in part.items()}
        return [texts[number] for number in range(len(requests))]

    def _meets_a_stop(self, stops: Sequence[Sequence[str]], row: int, tokens: Sequence[int]) -> bool:
        # A string of so many bytes ends within so many tokens; a few more, as the first of them may be half a character.
        num_tokens = max((len(stop.encode()) for stop in stops[row]), default=0) + 4
        end = self._form.tokenizer.decode(list(tokens[-num_tokens:]))
        return any(stop in end for stop in stops[row])

    def _judge(self, pairs: Sequence[tuple[Prompt, list[int]]]) -> list[Answer]:
        """An answer for each continuation; what is longer than the context loses tokens of its beginning."""
        # Choices of one token share a row: it is the same but for its last token, which is not read.
        judged_in: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for number, (prompt, continuation) in enumerate(pairs):
            whole = Prompt(prompt.tokens + continuation, prompt.num_prefix).last(self._context + 1)
            read = tuple(whole.tokens[:-1]) if continuation else tuple(whole.last(self._context).tokens)
            judged_in.setdefault((read, whole.num_prefix), []).append(number)
        rows = sorted(judged_in, key=lambda row: (-len(row[0]), row))
        answers: dict[int, Answer] = {}
        for mine, longest in self._divide(rows, "rows judged"):
            num_tokens = min(self._context, -(-len(longest[0]) // LENGTH_STEP) * LENGTH_STEP)
            tokens_BT = torch.full((self._rows_at_once(len(rows)), num_tokens), self._form.end_of_text)
            prefix_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
            for place, (read, num_prefix) in enumerate(mine):
                tokens_BT[place, : len(read)] = torch.tensor(read)
                prefix_BT[place, :num_prefix] = True
            has_prefix = any(num_prefix for _, num_prefix in rows)
            logits_BTV = self._logits(tokens_BT.to(self._device), prefix_BT.to(self._device) if has_prefix else None)
            for place, row in enumerate(mine):
                for number in judged_in[row]:
                    end, continuation = len(row[0]), pairs[number][1]
                    answers[number] = _read_answer(logits_BTV[place, end - len(continuation) : end], continuation)
        answers = {number: answer for part in self._ranks.gather(answers) for number, answer in part.items()}
        return [answers[number] for number in range(len(pairs))]

    def _rows_at_once(self, num_items: int) -> int:
        return min(self._batch_size, -(-num_items // self._ranks.size))

    def _divide(self, items: Sequence[Any], what: str) -> Iterator[tuple[list[Any], Any]]:
        """This rank's part of each round, and the first item of the round: on all ranks the same number of rounds."""
        for start in range(0, len(items), self._batch_size * self._ranks.size):
            together = items[start : start + self._batch_size * self._ranks.size]
            yield list(together[self._ranks.rank :: self._ranks.size]), together[0]
            self._tell(start + len(together), len(items), what)


def _read_answer(logits_nV: torch.Tensor, continuation: list[int]) -> Answer:
    """Judge a continuation by the logits of the places before its tokens."""
    tokens_n = torch.tensor(continuation, dtype=torch.long, device=logits_nV.device)
    chances_nV = logits_nV.float().log_softmax(dim=-1)
    value = chances_nV.gather(1, tokens_n[:, None]).double().sum()
    return float(value), bool((chances_nV.argmax(dim=-1) == tokens_n).all())


def score_tasks(model: TaskModel, tasks: TaskDict, *, limit: int | None, with_errors: bool) -> list[Score]:
    """Run tasks, of each at most `limit` documents; the same scores on every rank."""
    with quiet_harness():
        # Never None: to the harness every rank of ours is rank 0 of 1.
        results: Any = evaluate(model, tasks, limit=limit, bootstrap_iters=RESAMPLES if with_errors else 0, log_samples=False)
    scores: list[Score] = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{name}")
            counts = values.get("sample_len", values.get("sample_count"))
            scores.append(
                Score(
                    task,
                    metric,
                    name,
                    float(value),
                    float(error) if isinstance(error, int | float) else None,
                    counts if isinstance(counts, int) else None,
                    results.get("higher_is_better", {}).get(task, {}).get(metric),
                )
            )
    return scores
