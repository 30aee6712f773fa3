"""The sections `watch:` and `profile:` of a run file: what is written down about a run, where it is shown. No torch, no ray."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from configs.section import FREE, PositiveFloat, PositiveInt, Section

Tag = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class WatchSection(Section):
    """What is written down about a run, and where it is shown."""

    log_every_steps: PositiveInt = Field(default=10, json_schema_extra=FREE)
    """Steps between rows of metrics.jsonl (and of Weights & Biases)."""
    norms_every_steps: PositiveInt | None = Field(default=100, json_schema_extra=FREE)
    """Steps between norms of each layer's weights and gradients; null: never. A pass over all weights and gradients."""
    device_tflops: PositiveFloat | None = Field(default=None, json_schema_extra=FREE)
    """What one device can do at most in the run's precision, dense, which utilisation (MFU) is a share of; null: of GPUs that are known
    by name, their data sheet's; none is told of others, nor of CPUs."""
    wandb: Literal["auto", "online", "offline", "disabled"] = Field(default="auto", json_schema_extra=FREE)
    """auto: online where an API key is configured, offline elsewhere. Never a prompt."""
    wandb_project: str = Field(default="pretrain", json_schema_extra=FREE)
    wandb_entity: str | None = Field(default=None, json_schema_extra=FREE)
    wandb_group: str | None = Field(default=None, json_schema_extra=FREE)
    """Runs of one group are shown together."""
    wandb_tags: tuple[Tag, ...] = Field(default=(), json_schema_extra=FREE)
    wandb_artifacts: Literal["off", "references", "files"] = Field(default="references", json_schema_extra=FREE)
    """What Weights & Biases is given of configuration, environment, code, data manifest and checkpoints. references: where they lie and
    their hashes. files: the small ones (all but checkpoints) themselves too."""


class ProfileSection(Section):
    """A trace of some steps: what ran when, and where a step's time and memory go. Written to RUN/profile."""

    steps: tuple[PositiveInt, PositiveInt] | None = Field(default=None, json_schema_extra=FREE)
    """The first and the last step of the trace, both in it; null: none. Every traced step is slower; a few are enough."""
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), json_schema_extra=FREE)
    """Those that write one."""
    memory: bool = Field(default=True, json_schema_extra=FREE)
    """Whether a snapshot of the memory is written too (CUDA), and shapes and memory of operations."""

    @model_validator(mode="after")
    def _steps(self) -> "ProfileSection":
        if self.steps is not None and self.steps[0] > self.steps[1]:
            raise ValueError(f"steps: found {list(self.steps)}, wanted the first and the last step, such as [10, 13]")
        return self
