# Copyright 2026 The CrossViT for Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Learning rates: the schedule of the authors' script, and lower rates for the layers that are far from the heads."""

import math
from typing import Any

from torch import nn

from ..modeling_crossvit import CrossViTModel


def cosine_by_epoch(
    step: int,
    *,
    num_warmup_steps: int,
    num_training_steps: int,
    num_epochs: float,
    warmup_lr_rate: float = 0.0,
    min_lr_rate: float = 0.0,
) -> float:
    """
    The learning rate at a step of the authors' script, as a multiple of the peak learning rate.

    It is that of timm's `CosineLRScheduler`, which the script updates after each epoch with the number of that epoch.
    The learning rate is therefore constant within an epoch, and epoch `n` uses the value of `n - 1`. The warmup is
    part of the cosine's cycle: after 30 of 300 epochs, the cosine begins at 0.976 of the peak.

    Args:
        step (`int`): number of optimizer steps before this one.
        num_warmup_steps (`int`): steps of the linear warmup, rounded to whole epochs.
        num_training_steps (`int`): steps of the training run.
        num_epochs (`float`): epochs that these steps are divided into.
        warmup_lr_rate (`float`): the first learning rate of the warmup, as a multiple of the peak.
        min_lr_rate (`float`): the learning rate at the end of the cosine, as a multiple of the peak.
    """
    warmup_epochs = round(num_warmup_steps * num_epochs / num_training_steps)
    epoch = max(step * num_epochs // num_training_steps - 1, 0)
    if epoch < warmup_epochs:
        return warmup_lr_rate + (1 - warmup_lr_rate) * epoch / warmup_epochs
    return min_lr_rate + (1 - min_lr_rate) * (1 + math.cos(math.pi * epoch / num_epochs)) / 2


def layer_decay_groups(
    model: nn.Module, layer_decay: float, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """
    Parameter groups of an optimizer for layer-wise learning rate decay: those of timm's `param_groups_layer_decay`.

    The learning rate of the heads is multiplied by `layer_decay` for the last stage and the final norms, once more for
    each earlier stage, and once more for the embeddings. Class tokens, position embeddings and parameters of one
    dimension have no weight decay.

    Args:
        model (`nn.Module`): a CrossViT of any kind, also with adapters. Frozen parameters are in no group.
        layer_decay (`float`): between 0 and 1.
        learning_rate (`float`): of the heads.
        weight_decay (`float`): of the other parameters.

    Returns:
        `list[dict[str, Any]]`: groups with "params", "lr" and "weight_decay", those of the heads first, as the Trainer
        logs the learning rate of the first group.
    """
    encoder: Any = next(module for module in model.modules() if isinstance(module, CrossViTModel))
    layers = [encoder.layernorms, *reversed(encoder.stages), encoder.embeddings]
    distances = {
        parameter: max(distance, 1)  # the norms belong to the last stage
        for distance, layer in enumerate(layers)
        for parameter in layer.parameters()
    }
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            distance = distances.get(parameter, 0)
            decayed = parameter.ndim > 1 and not name.endswith(("cls_token", "position_embeddings"))
            options = {"lr": learning_rate * layer_decay**distance, "weight_decay": weight_decay if decayed else 0.0}
            groups.setdefault((distance, decayed), {"params": [], **options})["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


__all__ = ["cosine_by_epoch", "layer_decay_groups"]
