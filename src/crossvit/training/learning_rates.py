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
"""Learning rates of the paper's recipe: the schedule of the authors' script."""

import math


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


__all__ = ["cosine_by_epoch"]
