"""A run file's model: the Decoder with the parts that were chosen, or a model of the user's own.

In: the sections `model` and `objective`. Out: a module whose weights are unset, called like `Decoder`.
"""

import functools
from typing import Any, cast

import torch
from torch import nn

from configs.functions import calling, load_function
from configs.model_section import ModelSection
from configs.objective_section import ObjectiveSection
from pretrain.model.attention import Attend, causal_attention
from pretrain.model.decoder import Decoder
from pretrain.model.loss import SummedLoss, summed_cross_entropy


def build_model(
    section: ModelSection,
    objective: ObjectiveSection,
    attend: Attend = causal_attention,
    *,
    loss: SummedLoss | None = None,
    activation_dtype: torch.dtype | None = None,
) -> Decoder:
    """The model of a run; one of the user's own is said to be a Decoder because it is called like one.

    loss: what training minimises; None: `choose_loss(objective)`.
    Raises UserError for an import path that leads nowhere, and for what the user's own class raises.
    """
    loss = loss or choose_loss(objective)
    if section.implementation is not None:
        implementation, _ = load_function(section.implementation)
        with calling("model.implementation", section.implementation, "section"):
            return cast("Decoder", implementation(section))
    if section.block is None:
        return Decoder(section, attend, loss, None, activation_dtype)
    block = cast("type[nn.Module]", load_function(section.block)[0])
    with calling("model.block", section.block, "section, attend"):
        return Decoder(section, attend, loss, block, activation_dtype)


def choose_loss(objective: ObjectiveSection, **how: Any) -> SummedLoss:
    """What training minimises: ours, computed `how` (`compiled`, `memory_bytes`), or the user's own.

    Raises UserError for an import path that leads nowhere.
    """
    if objective.loss is not None:
        return cast("SummedLoss", load_function(objective.loss)[0])
    return functools.partial(summed_cross_entropy, z_weight=objective.z_loss, **how)
