"""Every knob of a run, with its unit, its default and its checks. No torch, no ray: milliseconds.

In: the merged mapping that `loader.py` read. Out: a frozen `RunConfig`. A value of the wrong type is
refused, never converted; what cannot work together is refused here, before anyone asks for a GPU.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.config import JsonDict

from configs.deepspeed_keys import check_deepspeed_section

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

# A key that carries this mark may differ when a run folder is started again: it changes who computes what,
# or what is watched, never what is learnt. Every other key must be equal to the folder's own.
CHANGEABLE: JsonDict = {"changeable_on_resume": True}
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FUNCTION_PATTERN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
SOURCE_FORMATS = ("auto", "text", "jsonl", "parquet", "warc", "datasets", "hub", "megatron")


class Section(BaseModel):
    """A section of a run file: frozen, strict about types, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)


class RunSection(Section):
    """The run as a folder: its name, where it stands, who may read it."""

    name: str | None = Field(default=None, json_schema_extra=CHANGEABLE)
    """Folder name below `root`; when null, the run file's own name. Letters, digits, '.', '_', '-'."""
    root: str = Field(default="runs", json_schema_extra=CHANGEABLE)
    """Folder that holds run folders; relative paths start at the current directory."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    """Seeds initial weights, data order and dropout; each is a pure function of it."""
    deterministic: bool = False
    """True: an interrupted and resumed run ends with the same bits as an undisturbed one."""
    readable_by: Literal["owner", "group"] = Field(default="owner", json_schema_extra=CHANGEABLE)
    """Who may read the run folder: its owner alone (0700) or the owner's group too (0750)."""

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str | None) -> str | None:
        if name is not None and not NAME_PATTERN.fullmatch(name):
            raise ValueError("a run name has 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit")
        return name


class SourceSection(Section):
    """One source of documents."""

    name: str
    """Short name, used in the manifest and in reports."""
    path: Annotated[str, Field(min_length=1)]
    """A file, a folder that is searched for files, a glob, or a URL of any of these that fsspec reads (`s3://bucket/x/*.jsonl.zst`,
    `gs://`, `hf://`); for format hub, the name of a data set. `{stdlib}` stands for the running Python's own library."""
    format: str = "auto"
    """auto: by each file's suffix; text (a file is a document), jsonl, parquet, warc (WARC and WET); datasets: a Hugging Face
    `save_to_disk` folder; hub: a Hugging Face data set, streamed; megatron: prefixes of `.bin` and `.idx`, already tokenised;
    or `package.module:function` of your own, which is given a local path and yields one mapping for each document."""
    pattern: str = "**/*"
    """Which files below a folder (a glob); hidden files and folders are left out."""
    text_field: str = "text"
    """The field of a row that holds the text."""
    id_field: str | None = None
    """The field of a row that names the document, kept beside its tokens."""
    metadata_fields: tuple[str, ...] = ()
    """Fields of a row that are kept beside its tokens, and that rules may look at."""
    settings: dict[str, Any] = {}
    """Further arguments: of `datasets.load_dataset` for format hub (`name`, `split`, `revision`), of fsspec for a URL, or of
    a function of your own."""

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError("a source name has 1 to 64 letters, digits, '.', '_' or '-'")
        return name

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        if name not in SOURCE_FORMATS and not FUNCTION_PATTERN.fullmatch(name):
            raise ValueError(f"wanted one of {', '.join(SOURCE_FORMATS)}, or package.module:function of your own")
        return name


class RuleSection(Section):
    """One rule of cleaning: it keeps a document, changes it, or drops it for a reason. A plain name is short for {rule: name}."""

    rule: str
    """The name of one of ours (`pretrain data rules` lists them), or `package.module:function` of your own."""
    settings: dict[str, Any] = {}
    """The rule's arguments by name; those left out have the published values."""
    sources: tuple[str, ...] | None = None
    """Names of the sources whose documents pass the rule; null: all."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, found: Any) -> Any:
        return {"rule": found} if isinstance(found, str) else found


class NearDuplicatesSection(Section):
    """Documents whose words are nearly the same, found by MinHash and locality-sensitive hashing."""

    similarity: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Two documents are near duplicates when the estimated Jaccard similarity of their word shingles is at least this."""
    num_permutations: PositiveInt = 128
    """Hash functions of a signature; the estimate's standard error is at most 0.5 / sqrt of it."""
    num_bands: PositiveInt = 16
    """A divisor of `num_permutations`: two documents are compared when all rows of one band agree."""
    shingle_words: PositiveInt = 5
    """Consecutive words that make a shingle."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    """Chooses the hash functions."""

    @model_validator(mode="after")
    def _bands(self) -> "NearDuplicatesSection":
        if self.num_permutations % self.num_bands:
            raise ValueError(f"num_bands {self.num_bands} does not divide num_permutations {self.num_permutations}")
        return self


class DeduplicationSection(Section):
    """What is dropped because it is there already; the document that comes first in the sources' order stays."""

    exact: bool = True
    """Drop documents whose text, after cleaning, is that of another."""
    near: NearDuplicatesSection | None = None
    """Drop near duplicates too; null: only exact ones."""


class TokenizerSection(Section):
    """The tokenizer: loaded from a file, or trained on the sources."""

    path: str | None = None
    """A `tokenizer.json` to use as it is; when null, a byte-level BPE is trained on the sources."""
    vocabulary_size: Annotated[int, Field(ge=257)] = 32768
    """Entries to train, special tokens included (256 bytes + 1 at least). Unused with `path`."""
    training_bytes: PositiveInt = 100_000_000
    """At most this much text is sampled, evenly over the work units, to train on."""
    end_of_text: str = "<|endoftext|>"
    """The token placed after every document; generation stops at it."""
    engine: Literal["auto", "fastokens", "tokenizers"] = Field(default="auto", json_schema_extra=CHANGEABLE)
    """What encodes: fastokens (fast, checked against tokenizers) or tokenizers, which defines the ids. auto: fastokens where it
    reads the tokenizer."""
    checked_fraction: Fraction = Field(default=0.002, json_schema_extra=CHANGEABLE)
    """Share of each work unit's text (at least one document) that is encoded by tokenizers too; one differing id ends the build."""


class DataSection(Section):
    """Raw text to token shards: what `pretrain data build` makes."""

    root: str | None = Field(default=None, json_schema_extra=CHANGEABLE)
    """Folder of the built shards and their manifest; when null, `datasets/` + the name of the first source. Training may also name a
    URL that the folder was copied to (`s3://bucket/web`, whatever fsspec reads): its shards are then read through `cache`."""
    cache: str | None = Field(default=None, json_schema_extra=CHANGEABLE)
    """Folder on the node's own disk for blocks of a dataset that `root` names by URL, shared by the node's ranks; when null,
    `pretrain/staged` below $XDG_CACHE_HOME or ~/.cache."""
    cache_bytes: PositiveInt = Field(default=50_000_000_000, json_schema_extra=CHANGEABLE)
    """The most that the blocks take there. Where it holds the whole dataset, each block is fetched once."""
    sources: tuple[SourceSection, ...] = ()
    """Where documents come from, at least one."""
    clean: tuple[RuleSection, ...] = ()
    """Rules that every document passes, in this order."""
    deduplicate: DeduplicationSection | None = None
    """What is dropped because it is there twice; null: nothing."""
    tokenizer: TokenizerSection = TokenizerSection()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    """Shuffles the documents within each shard."""
    held_out_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.005
    """Share of the documents kept out of training for evaluation, chosen by a hash of each document's id."""
    work_unit_bytes: PositiveInt = 16_000_000
    """Files are gathered into work units of about this many bytes, and large ones split where their format allows it."""
    shard_tokens: PositiveInt = 32_000_000
    """A work unit's tokens are cut into shards of about this many (a document stays whole)."""
    packed_lengths: tuple[PositiveInt, ...] = ()
    """Sequence lengths for which every shard gets an index of best-fit packing (`training.packing: best_fit`)."""
    largest_document_bytes: PositiveInt = 50_000_000
    """A larger document goes to quarantine instead of into memory."""
    quarantine_limit: Fraction = Field(default=0.01, json_schema_extra=CHANGEABLE)
    """The build stops when more than this share of the documents cannot be read."""
    train_while_building: bool = False
    """True: training may begin while the data is being built. Each source is then seen unit by unit, in the build's order, shuffled
    within the unit; training waits where it is faster than the build. The held-out text is that of each source's first unit."""
    verify_before_training: bool = Field(default=False, json_schema_extra=CHANGEABLE)
    """Whether `pretrain train` reads every shard and compares its SHA-256 first. Either way each block of 64 KiB is compared with its
    CRC32C when it is first read, and a flipped bit ends the run."""
    workers: PositiveInt | None = Field(default=None, json_schema_extra=CHANGEABLE)
    """Ray tasks at once; when null, one per CPU. The result does not depend on it."""

    @model_validator(mode="after")
    def _sources(self) -> "DataSection":
        names = [source.name for source in self.sources]
        if len(names) != len(set(names)):
            raise ValueError(f"two sources have the same name: {names}")
        unknown = [name for rule in self.clean for name in rule.sources or () if name not in names]
        if unknown:
            raise ValueError(f"clean speaks of sources that there are not: {unknown}; there are {names}")
        if self.is_remote and (self.train_while_building or self.verify_before_training):
            raise ValueError("root is a URL: train_while_building and verify_before_training need a folder")
        return self

    def folder(self) -> str:
        """The dataset's folder, or its URL."""
        return self.root or f"datasets/{self.sources[0].name if self.sources else 'default'}"

    @property
    def is_remote(self) -> bool:
        """Whether the dataset is one of another place, to be read through the cache."""
        return "://" in self.folder()

    def cache_folder(self) -> str:
        """Where blocks of a dataset of another place are kept."""
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return self.cache or f"{caches}/pretrain/staged"


class ModelSection(Section):
    """The decoder. The defaults are the Llama form; GPT-2 is the other end of every choice."""

    vocabulary_size: PositiveInt = 32768
    """Rows of the token table: at least the tokenizer's size, best a multiple of 64."""
    num_layers: PositiveInt = 12
    width: PositiveInt = 768
    """D: features per token."""
    num_heads: PositiveInt = 12
    """N: query heads."""
    num_kv_heads: PositiveInt | None = None
    """K: key and value heads, a divisor of `num_heads`; null: as many as query heads."""
    head_width: PositiveInt | None = None
    """H: features per head; null: width / num_heads."""
    feed_forward_width: PositiveInt = 2048
    """F: features inside the feed-forward part."""
    feed_forward: Literal["swiglu", "gelu"] = "swiglu"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_epsilon: PositiveFloat = 1e-5
    positions: Literal["rope", "learned", "sinusoidal"] = "rope"
    rope_theta: PositiveFloat = 10_000.0
    largest_context: PositiveInt = 8192
    """Longest sequence in tokens; rows of the table when positions are learned."""
    biases: bool = False
    """Whether linear layers carry biases."""
    qk_norm: bool = False
    """Whether queries and keys are normalised per head (Qwen3's form)."""
    tied_head: bool = False
    """Whether the output projection is the token table itself."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of embeddings, attention weights and residual outputs dropped while training."""
    initial_deviation: PositiveFloat = 0.02
    """Standard deviation of initial weights; outputs into the residual are divided by sqrt(2 x layers)."""

    @property
    def kv_heads(self) -> int:
        """K, resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def features_per_head(self) -> int:
        """H, resolved."""
        return self.head_width or self.width // self.num_heads

    @model_validator(mode="after")
    def _shapes(self) -> "ModelSection":
        if self.head_width is None and self.width % self.num_heads:
            below = self.width // self.num_heads * self.num_heads
            widths = " or ".join(str(width) for width in (below, below + self.num_heads) if width)
            raise ValueError(
                f"width {self.width} does not divide by num_heads {self.num_heads}; choose a width of {widths}, or set head_width"
            )
        if self.num_heads % self.kv_heads:
            divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ValueError(f"num_kv_heads {self.kv_heads} does not divide num_heads {self.num_heads}; choose one of {divisors}")
        if self.positions == "rope" and self.features_per_head % 2:
            raise ValueError(f"rotary positions need an even head width, found {self.features_per_head}")
        if self.positions == "sinusoidal" and self.width % 2:
            raise ValueError(f"sinusoidal positions need an even width, found {self.width}")
        return self


class OptimizerSection(Section):
    """AdamW (Loshchilov & Hutter 2019); matrices are decayed, vectors (norms, biases) are not."""

    peak_lr: PositiveFloat = 3e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    epsilon: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    clip_norm: PositiveFloat | None = 1.0
    """Largest global gradient norm; null: no clipping."""


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
    max_epochs: PositiveFloat | None = None
    """A run that would see a source more often is refused; null: it is warned of beyond 4 (Muennighoff et al. 2023)."""

    @model_validator(mode="after")
    def _in_order(self) -> "MixtureSection":
        begins = [stage.from_tokens for stage in self.stages]
        if not begins or begins[0] != 0:
            raise ValueError(f"the first stage begins at from_tokens 0, found {begins[0] if begins else 'no stage'}")
        if sorted(set(begins)) != begins:
            raise ValueError(f"stages begin one after the other, found from_tokens {begins}; put them in ascending order, each once")
        return self


class TrainingSection(Section):
    """How much is learnt from, in what portions."""

    total_tokens: PositiveInt = 1_000_000_000
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
    global_batch_samples: PositiveInt = 256
    """Samples one step (one optimizer update) learns from, over all ranks."""
    micro_batch_samples: PositiveInt = Field(default=8, json_schema_extra=CHANGEABLE)
    """Samples one rank feeds the engine at once: as many as fit into memory."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens one step learns from."""
        return self.global_batch_samples * self.sequence_length

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return -(-self.total_tokens // self.tokens_per_step)

    def first_sample(self, tokens: int) -> int:
        """The first sample of the first step that begins at `tokens` or behind."""
        return -(-tokens // self.tokens_per_step) * self.global_batch_samples

    def accumulation(self, num_data_ranks: int) -> int:
        """Micro-steps per step on each of `num_data_ranks`. Raises ValueError naming the nearest sizes that divide."""
        portion = self.micro_batch_samples * num_data_ranks
        if self.global_batch_samples % portion == 0:
            return self.global_batch_samples // portion
        below, above = self.global_batch_samples // portion * portion, -(-self.global_batch_samples // portion) * portion
        batches = " or ".join(str(size) for size in (below, above) if size)
        micros = [n for n in range(1, self.global_batch_samples + 1) if self.global_batch_samples % (n * num_data_ranks) == 0]
        near = sorted(sorted(micros, key=lambda n: abs(n - self.micro_batch_samples))[:2])
        also = f", or training.micro_batch_samples={' or '.join(map(str, near))}" if near else ""
        ranks = "1 rank" if num_data_ranks == 1 else f"{num_data_ranks} ranks"
        raise ValueError(
            f"a global batch of {self.global_batch_samples} samples does not divide by {ranks} x "
            f"{self.micro_batch_samples} samples; the nearest that do: training.global_batch_samples={batches}{also}"
        )


class ParallelSection(Section):
    """How many ranks, and what each holds. None of it changes what is learnt."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(default=1, json_schema_extra=CHANGEABLE)
    """What DeepSpeed shards over the data ranks: 1 optimizer state, 2 also gradients, 3 also weights."""
    processes: PositiveInt | None = Field(default=None, json_schema_extra=CHANGEABLE)
    """Ranks on this machine; null: one per GPU, or `cpu_processes` where there is none."""
    cpu_processes: PositiveInt = Field(default=1, json_schema_extra=CHANGEABLE)
    """Ranks on a machine without a GPU."""


class CheckpointSection(Section):
    """When the run is saved and how much of it is kept."""

    every_steps: PositiveInt | None = Field(default=1000, json_schema_extra=CHANGEABLE)
    """Steps between saves; null: only when stopping and at the end."""
    keep: Annotated[int, Field(ge=2)] = Field(default=3, json_schema_extra=CHANGEABLE)
    """Newest commits that are kept (2 at least: the older one is the fall-back)."""


class EvaluateSection(Section):
    """Held-out loss while training."""

    every_steps: PositiveInt | None = Field(default=1000, json_schema_extra=CHANGEABLE)
    """Steps between evaluations; null: only at the end."""
    micro_batch_samples: PositiveInt = Field(default=8, json_schema_extra=CHANGEABLE)
    """Samples one rank evaluates at once."""


class WatchSection(Section):
    """What is written down about a run, and where it is shown."""

    log_every_steps: PositiveInt = Field(default=10, json_schema_extra=CHANGEABLE)
    """Steps between rows of metrics.jsonl (and of Weights & Biases)."""
    wandb: Literal["auto", "online", "offline", "disabled"] = Field(default="auto", json_schema_extra=CHANGEABLE)
    """auto: online where an API key is configured, offline elsewhere. Never a prompt."""
    wandb_project: str = Field(default="pretrain", json_schema_extra=CHANGEABLE)
    wandb_entity: str | None = Field(default=None, json_schema_extra=CHANGEABLE)


class RunConfig(Section):
    """A whole run file, resolved."""

    run: RunSection = RunSection()
    data: DataSection = Field(default=DataSection(), json_schema_extra=CHANGEABLE)
    """A checkpoint knows by hash what it has seen of which source, so other keys here are refused only where that differs."""
    mixture: MixtureSection = Field(default=MixtureSection(), json_schema_extra=CHANGEABLE)
    """Stages that have begun are held by a hash in every checkpoint; those to come may be edited."""
    model: ModelSection = ModelSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    training: TrainingSection = TrainingSection()
    precision: Literal["bf16", "fp32"] = "bf16"
    """What weights and activations are computed in; the optimizer's own weights are fp32 always."""
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    watch: WatchSection = WatchSection()
    deepspeed: dict[str, Any] = Field(default_factory=dict, json_schema_extra=CHANGEABLE)
    """DeepSpeed's own configuration, word for word; see `deepspeed_keys.py` for the keys that are ours."""

    @field_validator("deepspeed")
    @classmethod
    def _deepspeed(cls, section: dict[str, Any]) -> dict[str, Any]:
        check_deepspeed_section(section)
        return section

    @model_validator(mode="after")
    def _together(self) -> "RunConfig":
        if self.precision == "bf16" and self.parallel.zero_stage == 0:
            raise ValueError(
                "precision bf16 with parallel.zero_stage 0 keeps no fp32 weights that could be resumed exactly (DeepSpeed has another "
                "optimizer there); use zero_stage 1, which on one rank costs the same, or precision fp32"
            )
        if self.training.sequence_length > self.model.largest_context:
            raise ValueError(
                f"training.sequence_length {self.training.sequence_length} is longer than model.largest_context "
                f"{self.model.largest_context}; lower the one or raise the other"
            )
        training = self.training
        starts = [training.first_sample(stage.from_tokens) for stage in self.mixture.stages]
        if starts[-1] >= training.total_steps * training.global_batch_samples or len(set(starts)) < len(starts):
            raise ValueError(
                f"mixture.stages begin at samples {starts} of {training.total_steps * training.global_batch_samples} (whole steps of "
                f"{training.global_batch_samples}); each needs a step of its own before the run's end: move from_tokens, or remove a stage"
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
        total = self.training.total_steps * self.training.tokens_per_step
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


def differing_keys(before: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Keys of two configurations that differ and may not, when `now` continues the run of `before`.

    Returns: dotted key -> (value of the run folder, value asked for). Empty: the run may go on.
    """

    def walk(section: type[BaseModel], one: Any, two: Any, prefix: str) -> dict[str, tuple[Any, Any]]:
        found: dict[str, tuple[Any, Any]] = {}
        for key, field in section.model_fields.items():
            old, new = getattr(one, key), getattr(two, key)
            if old == new or field.json_schema_extra == CHANGEABLE:
                continue
            if isinstance(old, BaseModel) and isinstance(new, BaseModel) and type(old) is type(new):
                found |= walk(type(old), old, new, f"{prefix}{key}.")
            else:
                found[prefix + key] = (old, new)
        return found

    return walk(RunConfig, before, now, "")
