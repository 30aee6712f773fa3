"""Every knob of a run, with its unit, its default and its checks. No torch, no ray: milliseconds.

In: the merged mapping that `loader.py` read. Out: a frozen `RunConfig`. A value of the wrong type is
refused, never converted; what cannot work together is refused here, before anyone asks for a GPU.
"""

import os
import re
from math import gcd
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from configs.data_section import DataSection
from configs.deepspeed_keys import check_deepspeed_section
from configs.guard_section import GuardSection
from configs.model_section import ModelSection
from configs.objective_section import FillInTheMiddleSection, ObjectiveSection
from configs.section import APPLIED, FREE, IN_NEW_DATA, NAME_PATTERN, Fraction, ImportPath, PositiveFloat, PositiveInt, Section
from configs.stall_section import StallSection
from configs.start_section import StartFrom
from configs.steps import Steps, plan_steps
from configs.watch_section import ProfileSection, WatchSection


class RunSection(Section):
    """The run as a folder: its name, where it stands, who may read it."""

    name: str | None = Field(default=None, json_schema_extra=FREE)
    """Folder name below `root`; when null, the run file's own name. Letters, digits, '.', '_', '-'."""
    root: str = Field(default="runs", json_schema_extra=FREE)
    """Folder that holds run folders; relative paths start at the current directory."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    """Seeds initial weights, data order and dropout; each is a pure function of it."""
    deterministic: bool = False
    """True: an interrupted and resumed run ends with the same bits as an undisturbed one."""
    attempts_in_vain: PositiveInt = Field(default=3, json_schema_extra=FREE)
    """Attempts in a row that may end, by a rank that was killed or crashed, without a new checkpoint; then the command gives up. 1: it
    never begins again by itself."""
    readable_by: Literal["owner", "group"] = Field(default="owner", json_schema_extra=FREE)
    """Who may read the run folder: its owner alone (0700) or the owner's group too (0750)."""

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str | None) -> str | None:
        if name is not None and not NAME_PATTERN.fullmatch(name):
            raise ValueError("a run name has 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit")
        return name


class OptimizerSection(Section):
    """What changes the weights. Matrices are decayed, vectors (norms, biases) are not."""

    kind: Literal["adamw", "muon"] | ImportPath = "adamw"
    """adamw: Loshchilov & Hutter 2019. muon: Jordan et al. 2024, for the matrices of the layers, and adamw for tables and vectors. Or
    `package.module:function` of your own, called with parameter groups and this section; it returns a torch optimizer that treats each
    element for itself (ZeRO cuts parameters anywhere)."""
    peak_lr: PositiveFloat = Field(default=3e-4, json_schema_extra=APPLIED)
    """The learning rate at its highest; `schedule` says how much of it there is when."""
    muon_peak_lr: PositiveFloat = Field(default=0.02, json_schema_extra=APPLIED)
    """The same, for the matrices that Muon changes."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.95, json_schema_extra=APPLIED)
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, json_schema_extra=APPLIED)
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.95, json_schema_extra=APPLIED)
    epsilon: PositiveFloat = Field(default=1e-8, json_schema_extra=APPLIED)
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(default=0.1, json_schema_extra=APPLIED)
    clip_norm: PositiveFloat | None = Field(default=1.0, json_schema_extra=APPLIED)
    """Largest global gradient norm; null: no clipping."""
    offload: bool = Field(default=False, json_schema_extra=APPLIED)
    """Whether the optimizer's state lies in the host's memory and is updated there (DeepSpeed's CPUAdam, compiled at its first use)."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """For a function of your own: whatever it reads from here."""

    @model_validator(mode="after")
    def _offload(self) -> "OptimizerSection":
        if self.offload and self.kind != "adamw":
            raise ValueError(f"offload is DeepSpeed's CPUAdam; it goes with kind adamw only, found {self.kind}")
        return self


class ScheduleSection(Section):
    """The learning rate as a pure function of tokens seen, as a share of `optimizer.peak_lr`."""

    kind: Literal["warmup_stable_decay", "cosine"] = "warmup_stable_decay"
    warmup_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens over which the rate rises linearly from 0 to its peak."""
    decay_tokens: Annotated[int, Field(ge=0)] | None = None
    """Tokens of the final linear fall (warmup_stable_decay only); null: a fifth of the run."""
    final_ratio: Fraction = 0.0
    """The rate at the very end, as a share of the peak."""


class StageSection(Section):
    """A part of a run with its own mixture of sources. At most one of `weights` and `epochs`; neither: every source in proportion
    to its size."""

    from_tokens: Annotated[int, Field(ge=0)] = 0
    """Where the stage begins, in tokens of the run; rounded up to a whole step. The first stage begins at 0."""
    weights: dict[str, PositiveFloat] | None = None
    """By source, its share of the tokens (any positive numbers; they are divided by their sum). A source left out rests."""
    epochs: dict[str, PositiveFloat] | None = None
    """By source, how often it is seen while one of 1.0 is seen once. A source left out rests."""
    sequence_length: PositiveInt | None = None
    """Shorter sequences for this stage: a divisor of `training.sequence_length`, whose samples are cut into so many equal parts."""

    @model_validator(mode="after")
    def _one_kind(self) -> "StageSection":
        if self.weights is not None and self.epochs is not None:
            raise ValueError("a stage has either weights or epochs, found both; remove one")
        if self.weights == {} or self.epochs == {}:
            raise ValueError("a stage without any source has nothing to learn from; name one, or leave weights and epochs out for all")
        return self


class MixtureSection(Section):
    """Which sources are seen when. What is still to come may be edited while a run rests; what was seen may not."""

    stages: tuple[StageSection, ...] = (StageSection(),)
    """In the order of their beginnings."""
    max_epochs: PositiveFloat | None = Field(default=None, json_schema_extra=FREE)
    """A run that would see a source more often is refused; null: it is warned of beyond 4 (Muennighoff et al. 2023)."""

    @model_validator(mode="after")
    def _in_order(self) -> "MixtureSection":
        begins = [stage.from_tokens for stage in self.stages]
        if not begins or begins[0] != 0:
            raise ValueError(f"the first stage begins at from_tokens 0, found {begins[0] if begins else 'no stage'}")
        if sorted(set(begins)) != begins:
            raise ValueError(f"stages begin one after the other, found from_tokens {begins}; put them in ascending order, each once")
        return self


class BatchSection(Section):
    """A beginning of a run with smaller steps."""

    until_tokens: PositiveInt
    """Where it ends, in tokens of the run; rounded up to a whole step of it."""
    global_batch_samples: PositiveInt
    """Samples that one of its steps learns from, over all ranks."""


class TrainingSection(Section):
    """How much is learnt from, in what portions."""

    total_tokens: PositiveInt = Field(default=1_000_000_000, json_schema_extra=APPLIED)
    """Tokens to train on; rounded up to whole steps."""
    sequence_length: PositiveInt = 2048
    """T: tokens of one sample that are learnt from."""
    packing: Literal["chop", "best_fit"] = "chop"
    """How documents become samples. chop: laid end to end and cut every T tokens. best_fit: whole documents are put together so that
    as few as possible are cut (Ding et al. 2024), at the price of a little padding; `data.packed_lengths` must hold T."""
    separate_documents: bool = True
    """Whether attention stays inside each document of a sample."""
    restart_positions: bool = True
    """Whether positions count from 0 at the beginning of each document of a sample."""
    fill_in_the_middle: FillInTheMiddleSection | None = None
    """Rearranges a share of the documents; null: none."""
    global_batch_samples: PositiveInt = 256
    """Samples one step (one optimizer update) learns from, over all ranks."""
    batch_ramp: tuple[BatchSection, ...] = ()
    """Smaller steps at the beginning, in ascending order; behind them `global_batch_samples`. The noise of
    gradients grows while a model learns, so small steps suffice at first (McCandlish et al. 2018). The learning rate is not scaled."""
    micro_batch_samples: PositiveInt = Field(default=8, json_schema_extra=APPLIED)
    """Samples one rank feeds the engine at once: as many as fit into memory."""

    @property
    def steps(self) -> Steps:
        """Which samples each step learns from."""
        ramp = tuple((section.until_tokens, section.global_batch_samples) for section in self.batch_ramp)
        return plan_steps(self.total_tokens, self.sequence_length, ramp, self.global_batch_samples)

    @property
    def tokens_per_step(self) -> int:
        """Tokens one step learns from, once the ramp is over."""
        return self.global_batch_samples * self.sequence_length

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps.total_steps

    def first_sample(self, tokens: int) -> int:
        """The first sample of the first step that begins at `tokens` or behind."""
        return self.steps.first_sample(tokens)

    @model_validator(mode="after")
    def _ramped(self) -> "TrainingSection":
        if not self.batch_ramp:
            return self
        ends = [section.until_tokens for section in self.batch_ramp]
        if sorted({*ends, self.total_tokens}) != [*ends, self.total_tokens]:
            raise ValueError(
                f"batch_ramp ends its sections at until_tokens {ends} of total_tokens {self.total_tokens}; wanted each behind the one "
                "before it and all before the run's end: put them in ascending order, each once, or raise total_tokens"
            )
        sizes = self.steps.sizes
        if sorted(set(sizes)) != sizes:
            raise ValueError(
                f"batch_ramp and global_batch_samples give steps of {sizes} samples, one after the other; wanted each size above the one "
                "before it: put them in ascending order, each once"
            )
        starts = [phase.first_sample for phase in self.steps.phases]
        if len(set(starts)) < len(starts) or starts[-1] >= self.steps.total_samples:
            raise ValueError(
                f"batch_ramp's steps of {sizes} samples begin at samples {starts} of {self.steps.total_samples} (whole steps); each "
                "size needs a step of its own before the run's end: move until_tokens, or remove a section"
            )
        return self

    def accumulation(self, num_data_ranks: int) -> int:
        """Micro-steps per step on each of `num_data_ranks`, once the ramp is over.

        Raises ValueError for a size of a step, of the ramp too, that does not divide, naming the nearest sizes that do.
        """
        portion = self.micro_batch_samples * num_data_ranks
        sizes = {"training": self.global_batch_samples}
        sizes |= {f"training.batch_ramp[{number}]": section.global_batch_samples for number, section in enumerate(self.batch_ramp)}
        place, wrong = next(((place, size) for place, size in sizes.items() if size % portion), ("", None))
        if wrong is None:
            return self.global_batch_samples // portion
        below, above = wrong // portion * portion, -(-wrong // portion) * portion
        batches = " or ".join(str(size) for size in (below, above) if size)
        common = gcd(*sizes.values())
        micros = [n for n in range(1, common + 1) if common % (n * num_data_ranks) == 0]
        near = sorted(sorted(micros, key=lambda n: abs(n - self.micro_batch_samples))[:2])
        also = f", or training.micro_batch_samples={' or '.join(map(str, near))}" if near else ""
        ranks = "1 rank" if num_data_ranks == 1 else f"{num_data_ranks} ranks"
        raise ValueError(
            f"a global batch of {wrong} samples does not divide by {ranks} x "
            f"{self.micro_batch_samples} samples; the nearest that do: {place}.global_batch_samples={batches}{also}"
        )


class ParallelSection(Section):
    """How many ranks, and what each holds. None of it changes what is learnt."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(default=1, json_schema_extra=APPLIED)
    """What DeepSpeed shards over the data ranks: 1 optimizer state, 2 also gradients, 3 also weights."""
    processes: PositiveInt | None = Field(default=None, json_schema_extra=APPLIED)
    """Ranks on this machine; null: one per GPU, or `cpu_processes` where there is none."""
    cpu_processes: PositiveInt = Field(default=1, json_schema_extra=APPLIED)
    """Ranks on a machine without a GPU."""


class PerformanceSection(Section):
    """How a step is computed. It changes the last bits of the weights, never what they mean."""

    compile: bool | None = None
    """Whether each layer and the loss are compiled (torch.compile, fixed shapes); null: on a GPU."""
    compile_cache: str | None = Field(default=None, json_schema_extra=FREE)
    """Folder of what was compiled, so that a restart is warm; null: `pretrain/compiled` below $XDG_CACHE_HOME or ~/.cache."""
    activation_checkpointing: Literal["selective", "full"] | None = None
    """What is computed again in the backward pass instead of being kept. selective: all but matrix products and attention; full:
    everything inside a layer; null: nothing."""
    loss_memory_bytes: PositiveInt = 500_000_000
    """What the loss may take beside its inputs and their gradients. A head whose gradient in fp32 does not fit into half of it is
    multiplied a fourth time instead of three."""
    fp8: bool = False
    """Experimental, on GPUs with fp8 units: the layers' matrix products in fp8 by torchao. Its loss has not been shown to be equal."""

    def compile_folder(self) -> str:
        """Where compiled code is kept."""
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return self.compile_cache or f"{caches}/pretrain/compiled"


STORE_PATTERN = re.compile(r"(?!file:|local:)[a-z][a-z0-9+.-]*://[^/:@?#\s][^:@?#\s]*")


class CheckpointSection(Section):
    """When the run is saved and how much of it is kept."""

    asynchronous: bool = Field(default=True, json_schema_extra=FREE)
    """Whether training goes on while a save is written, behind a copy in the host's memory (12 bytes for each parameter that a rank
    holds); false: it waits."""
    store: str | None = None
    """URL in an object store where commits lie (`s3://bucket/runs`, `gs://`, `az://`, what fsspec reads), in a folder of the run's own
    below it; null: `checkpoints/` in the run folder."""
    fast_folder: str | None = Field(default=None, json_schema_extra=FREE)
    """A folder of each node's own (a local disk, /dev/shm) for saves in between: a rank that dies costs fewer steps then, a node that is
    lost costs what was done since the last durable save. Each run has a folder of its own in it; the newest two are kept."""
    fast_every_steps: PositiveInt | None = Field(default=None, json_schema_extra=FREE)
    """Steps between those."""
    self_test: bool = Field(default=True, json_schema_extra=FREE)
    """Whether a new run first writes its state, reads it back and compares every bit."""

    every_steps: PositiveInt | None = Field(default=1000, json_schema_extra=FREE)
    """Steps between saves; null: only when stopping and at the end."""
    keep: Annotated[int, Field(ge=2)] = Field(default=3, json_schema_extra=FREE)
    """Newest commits that are kept (2 at least: the older one is the fall-back)."""
    keep_every_steps: PositiveInt | None = Field(default=None, json_schema_extra=FREE)
    """Of older ones those of every so many steps stay for ever; null: none for its step."""
    keep_every_hours: PositiveFloat | None = Field(default=None, json_schema_extra=FREE)
    """And one of every so many hours; null: none for its time."""

    @field_validator("store")
    @classmethod
    def _store(cls, store: str | None) -> str | None:
        if store is not None and not STORE_PATTERN.fullmatch(store):  # what was found may hold a password: it is not said
            raise ValueError(
                "wanted the URL of a folder in an object store, such as s3://bucket/runs, without credentials: those stand in the "
                "environment. A folder of a disk, also a shared one, is named by run.root"
            )
        return store

    @model_validator(mode="after")
    def _fast(self) -> "CheckpointSection":
        if (self.fast_folder is None) != (self.fast_every_steps is None):
            raise ValueError("fast_folder and fast_every_steps go together: found one without the other; set both, or neither")
        return self


class EvaluateSection(Section):
    """Held-out loss while training."""

    every_steps: PositiveInt | None = Field(default=1000, json_schema_extra=APPLIED)
    """Steps between evaluations; null: only at the end."""
    micro_batch_samples: PositiveInt = Field(default=8, json_schema_extra=APPLIED)
    """Samples one rank evaluates at once."""
    tasks: tuple[str, ...] = Field(default=(), json_schema_extra=APPLIED)
    """Task files of lm-evaluation-harness (YAML, with local data) that are evaluated while training; `pip install 'pretrain[eval]'`."""
    tasks_every_steps: PositiveInt | None = Field(default=None, json_schema_extra=APPLIED)
    """Steps between evaluations of the tasks; null: only at the end."""
    tasks_limit: PositiveInt | None = Field(default=None, json_schema_extra=APPLIED)
    """At most this many documents of each task; null: all."""
    prompts: tuple[str, ...] = Field(default=(), json_schema_extra=FREE)
    """Beginnings that the model continues at every evaluation (and at the end), so that one can read how it learns: `RUN/samples.jsonl`."""
    prompt_tokens: PositiveInt = Field(default=64, json_schema_extra=FREE)
    """At most so many tokens are written behind each prompt."""


class RunConfig(Section):
    """A whole run file, resolved."""

    run: RunSection = RunSection()
    start_from: StartFrom | None = None
    """Another run whose checkpoint this one begins with: `PATH@STEP`, or `PATH` for its newest (PATH: a run folder, or a name below
    `run.root`). Read once, at the first start; null: weights as `model` says."""
    start_with: Literal["weights", "everything"] = "weights"
    """weights: those alone, at step 0, with a fresh optimizer. everything: weights, moments, steps and tokens seen: a branch that counts on
    where its parent was. Its data goes on there too if it is the parent's (`mixture.stages` ahead may differ); data of which the parent
    saw nothing is read from its own beginning, and `mixture.stages` count from there."""
    data: DataSection = Field(default=DataSection(), json_schema_extra=IN_NEW_DATA)
    """A checkpoint knows by hash what it has seen of which source, so other keys here are refused only where that differs."""
    mixture: MixtureSection = Field(default=MixtureSection(), json_schema_extra=APPLIED)
    """Stages that have begun are held by a hash in every checkpoint; those to come may be edited."""
    model: ModelSection = ModelSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = Field(default=ScheduleSection(), json_schema_extra=APPLIED)
    """A pure function of tokens, so a change holds from the next step on; what is past keeps its rate."""
    training: TrainingSection = TrainingSection()
    objective: ObjectiveSection = ObjectiveSection()
    precision: Literal["bf16", "fp16", "fp32"] = Field(default="bf16", json_schema_extra=APPLIED)
    """What weights and activations are computed in; the optimizer's own weights are fp32 always. fp16 scales the loss."""
    parallel: ParallelSection = ParallelSection()
    performance: PerformanceSection = Field(default=PerformanceSection(), json_schema_extra=APPLIED)
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    guard: GuardSection = Field(default=GuardSection(), json_schema_extra=APPLIED)
    watch: WatchSection = WatchSection()
    profile: ProfileSection = ProfileSection()
    stall: StallSection = Field(default=StallSection(), json_schema_extra=FREE)
    deepspeed: dict[str, Any] = Field(default_factory=dict, json_schema_extra=APPLIED)
    """DeepSpeed's own configuration, word for word; see `deepspeed_keys.py` for the keys that are ours."""

    @field_validator("deepspeed")
    @classmethod
    def _deepspeed(cls, section: dict[str, Any]) -> dict[str, Any]:
        check_deepspeed_section(section)
        return section

    @model_validator(mode="after")
    def _together(self) -> "RunConfig":
        if self.start_from is None and self.start_with == "everything":
            raise ValueError("start_with says what is taken of another run, and start_from names none; set start_from=PATH@STEP")
        if self.start_from is not None and self.model.initial_weights is not None:
            raise ValueError("start_from and model.initial_weights both say which weights the run begins with; remove one of the two")
        if self.precision != "fp32" and self.parallel.zero_stage == 0:
            raise ValueError(
                f"precision {self.precision} with parallel.zero_stage 0 keeps no fp32 weights that could be resumed exactly (DeepSpeed has "
                "another optimizer there); use zero_stage 1, which on one rank costs the same, or precision fp32"
            )
        if self.training.sequence_length > self.model.largest_context:
            raise ValueError(
                f"training.sequence_length {self.training.sequence_length} is longer than model.largest_context "
                f"{self.model.largest_context}; lower the one or raise the other"
            )
        if self.optimizer.kind == "muon" and (self.precision, self.parallel.zero_stage) not in (("bf16", 1), ("fp32", 0)):
            raise ValueError(
                f"optimizer.kind muon needs precision bf16 with parallel.zero_stage 1, or fp32 with 0, found {self.precision} with "
                f"{self.parallel.zero_stage}: elsewhere DeepSpeed clips the orthogonalised update instead of the gradient"
            )
        if self.optimizer.offload and self.parallel.zero_stage == 0:
            raise ValueError("optimizer.offload needs parallel.zero_stage 1 to 3, found 0")
        if self.model.implementation is not None and (self.objective.loss is not None or self.objective.z_loss):
            raise ValueError(
                "model.implementation computes its loss itself; objective.loss and objective.z_loss would change nothing: remove them"
            )
        if self.objective.kind == "prefix" and not self.training.separate_documents:
            raise ValueError("objective.kind prefix needs training.separate_documents: true; a prefix is that of one document")
        training = self.training
        starts = [training.first_sample(stage.from_tokens) for stage in self.mixture.stages]
        if starts[-1] >= training.steps.total_samples or len(set(starts)) < len(starts):
            raise ValueError(
                f"mixture.stages begin at samples {starts} of {training.steps.total_samples} (whole steps of "
                f"{training.steps.spell_sizes()}); each needs a step of its own before the run's end: move from_tokens, or remove a stage"
            )
        for stage in self.mixture.stages:
            if stage.sequence_length is not None and training.sequence_length % stage.sequence_length:
                raise ValueError(
                    f"a stage's sequence_length {stage.sequence_length} does not divide training.sequence_length {training.sequence_length}"
                )
        if self.data.tokenizer.path is None and self.data.tokenizer.vocabulary_size > self.model.vocabulary_size:
            raise ValueError(
                f"data.tokenizer.vocabulary_size {self.data.tokenizer.vocabulary_size} does not fit into "
                f"model.vocabulary_size {self.model.vocabulary_size}; the model's must be at least as large"
            )
        total = training.steps.total_tokens
        if self.schedule.kind == "cosine" and self.schedule.decay_tokens is not None:
            raise ValueError("schedule.decay_tokens is for kind warmup_stable_decay; a cosine falls from the warm-up to the end: remove it")
        fall = self.schedule.decay_tokens or 0
        if self.schedule.warmup_tokens + fall > total:
            raise ValueError(
                f"schedule.warmup_tokens {self.schedule.warmup_tokens} + schedule.decay_tokens {fall} is more than the run's {total} tokens"
            )
        # Any number of ranks is a multiple of `processes`, so what does not divide here divides nowhere.
        self.training.accumulation(self.parallel.processes or 1)
        zero = self.deepspeed.get("zero_optimization")
        if self.run.deterministic and isinstance(zero, dict) and cast("dict[str, Any]", zero).get("overlap_comm"):
            raise ValueError("run.deterministic needs deepspeed.zero_optimization.overlap_comm to be false (its order of sums varies)")
        return self
