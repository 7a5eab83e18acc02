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
"""Exponential moving average (EMA) of the weights during training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class ExponentialMovingAverage:
    """
    An average of the trainable weights over the last steps, which often classifies better than the last weights.

    Args:
        model (`nn.Module`): the model. The average starts from its weights.
        decay (`float`):
            Share of the average that is kept at each step, between 0 and 1. It is at most `(1 + step) / (10 + step)`,
            so that the initial weights do not dominate a short training run.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.parameters: list[torch.Tensor] = [
            parameter for parameter in model.parameters() if parameter.requires_grad
        ]
        # At least in single precision: half precision would round small updates away
        types = [torch.promote_types(parameter.dtype, torch.float32) for parameter in self.parameters]
        self.averages = [parameter.detach().to(dtype, copy=True) for parameter, dtype in zip(self.parameters, types)]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Updates the average after a step, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [parameter.to(average.dtype) for parameter, average in zip(self.parameters, self.averages)]
        torch._foreach_lerp_(self.averages, weights, 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Replaces the weights of the model by their averages."""
        torch._foreach_copy_(self.parameters, self.averages)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replaces the weights of the model by their averages inside a `with` block."""
        weights = [parameter.detach().clone() for parameter in self.parameters]
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, weights)


__all__ = ["ExponentialMovingAverage"]
