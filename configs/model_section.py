"""The section `model:` of a run file: the shape of the decoder, and who computes it."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from configs.section import ImportPath, PositiveFloat, PositiveInt, Section


class RopeScalingSection(Section):
    """How rotary positions are stretched beyond the context that a model was first trained on."""

    kind: Literal["linear", "llama3", "yarn"]
    """linear: all angles divided by `factor` (Chen et al. 2023); llama3: slow ones divided, fast ones kept (Dubey et al. 2024);
    yarn: the same by another ramp, and larger logits (Peng et al. 2023)."""
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    original_context: PositiveInt
    """Tokens of the context before it was stretched."""
    low_frequency_factor: PositiveFloat = 1.0
    """llama3: waves longer than original_context / this are divided by `factor`."""
    high_frequency_factor: PositiveFloat = 4.0
    """llama3: waves shorter than original_context / this are kept; between the two, a mean of both."""
    beta_fast: PositiveFloat = 32.0
    """yarn: pairs that turn more often than this within the original context are kept."""
    beta_slow: PositiveFloat = 1.0
    """yarn: pairs that turn less often than this are divided by `factor`."""
    attention_factor: PositiveFloat | None = None
    """yarn: what cosines and sines are multiplied by; null: 0.1 ln(factor) + 1."""

    @model_validator(mode="after")
    def _in_order(self) -> "RopeScalingSection":
        if self.kind == "llama3" and self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError(
                f"low_frequency_factor {self.low_frequency_factor} must be below high_frequency_factor {self.high_frequency_factor}"
            )
        if self.kind == "yarn" and self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow {self.beta_slow} must be below beta_fast {self.beta_fast}")
        return self


class ModelSection(Section):
    """The decoder. The defaults are the Llama form; GPT-2 is the other end of every choice."""

    implementation: ImportPath | None = None
    """A model of your own: `package.module:Class`, made with this section; its forward is that of `pretrain.model.decoder.Decoder`. null:
    the Decoder."""
    block: ImportPath | None = None
    """A layer of your own for the Decoder: `package.module:Class`, made and called like `pretrain.model.decoder.Block`; null: the Block."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """For classes of your own: whatever they read from here."""
    initial_weights: str | None = None
    """A folder that `pretrain import` made, whose weights training starts from; null: random ones."""
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
    norm_placement: Literal["before", "after"] = "before"
    """Whether the norm of each part of a layer is before it (Llama, GPT-2) or behind it, ahead of the sum (OLMo-2)."""
    norm_epsilon: PositiveFloat = 1e-5
    positions: Literal["rope", "learned", "sinusoidal", "none"] = "rope"
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: RopeScalingSection | None = None
    """How rotary positions are stretched; null: not at all."""
    largest_context: PositiveInt = 8192
    """Longest sequence in tokens; rows of the table when positions are learned."""
    sliding_window: PositiveInt | None = None
    """How many tokens each sees, itself included (Mistral); null: all earlier ones."""
    attention_softcap: PositiveFloat | None = None
    """c: attention scores s become c tanh(s / c) (Gemma 2: 50); null: they stay as they are."""
    logit_softcap: PositiveFloat | None = None
    """c: logits l become c tanh(l / c) (Gemma 2: 30); null: they stay as they are."""
    biases: bool = False
    """Whether linear layers carry biases."""
    qk_norm: Literal["head", "full"] | None = None
    """Whether queries and keys are normalised: head: each head for itself (Qwen3); full: all heads together (OLMo-2); null: not."""
    tied_head: bool = False
    """Whether the output projection is the token table itself."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of embeddings, attention weights and residual outputs dropped while training."""
    initial_deviation: PositiveFloat = 0.02
    """Standard deviation of initial weights."""
    depth_scaled_initialization: bool = True
    """Whether initial weights of outputs into the residual are divided by sqrt(2 x layers) (GPT-2)."""

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
        if self.rope_scaling is not None and self.positions != "rope":
            raise ValueError(f"rope_scaling stretches rotary positions, found positions: {self.positions}; remove one of the two")
        if self.implementation is not None and self.block is not None:
            raise ValueError("a block of your own stands in the Decoder, which implementation replaces; remove one of the two")
        if self.settings and self.implementation is None and self.block is None:
            raise ValueError("settings are for a class of your own, and neither implementation nor block names one; remove them")
        return self
