"""The sections `objective:` and `training.fill_in_the_middle:` of a run file: what is learnt from a document."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from configs.section import Fraction, ImportPath, Section


class ObjectiveSection(Section):
    """What is learnt from the tokens of a sample. Held-out text is judged by it too, but always by its plain cross-entropy."""

    kind: Literal["next_token", "continuation", "prefix"] | ImportPath = "next_token"
    """next_token: every token from those before it. continuation: of each document only what follows its `separator`. prefix: the same,
    and the places up to the separator see each other in both directions (Raffel et al. 2020, section 3.2.3). Documents without the
    separator are learnt from whole. Or `package.module:function` of your own; see `pretrain/data/objective.py`."""
    separator: str | None = None
    """The token (an entry of the tokenizer) that ends the given part of a document; see `data.tokenizer.added_tokens`."""
    masked_tokens: tuple[str, ...] = ()
    """Entries of the tokenizer that are never learnt as targets."""
    z_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weight of the squared logarithm of the softmax's denominator, added to the loss (Chowdhery et al. 2022: 1e-4)."""
    loss: ImportPath | None = None
    """A loss of your own, `package.module:function`, called like `pretrain.model.loss.summed_cross_entropy`; null: cross-entropy."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Arguments by name of a function of your own named by `kind`."""

    @model_validator(mode="after")
    def _separated(self) -> "ObjectiveSection":
        if self.kind in ("continuation", "prefix") and self.separator is None:
            raise ValueError(f"kind {self.kind} needs the separator that ends the given part of a document, such as separator: '<|sep|>'")
        if self.kind == "next_token" and self.separator is not None:
            raise ValueError("kind next_token has no use for a separator; remove it, or set kind: continuation or prefix")
        if ":" in self.kind and self.separator is not None:
            raise ValueError("a separator is for our kinds; give a function of your own its arguments in settings")
        if ":" not in self.kind and self.settings:
            raise ValueError(f"settings are the arguments of a function of your own, found kind {self.kind}; remove them")
        if self.loss is not None and self.z_loss:
            raise ValueError("z_loss is part of our loss; a loss of your own adds its own terms: remove one of the two")
        return self


class FillInTheMiddleSection(Section):
    """Documents whose middle is moved to their end, so that it is learnt from both sides (Bavarian et al. 2022)."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the documents of a sample that are rearranged; which, and where they are cut, follows from the seed and the sample."""
    suffix_first_share: Fraction = 0.5
    """Of these, the share in which the suffix stands first (SPM), the others having the prefix first (PSM)."""
    prefix_token: str = "<|fim_prefix|>"
    middle_token: str = "<|fim_middle|>"
    suffix_token: str = "<|fim_suffix|>"
    """Entries of the tokenizer that mark the parts; see `data.tokenizer.added_tokens`."""
