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
"""Exponential moving average of the weights of a model that trains."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class ExponentialMovingAverage:
    """
    The mean of the trainable weights over the last steps, which often classifies better than the last weights do.

    Args:
        model (`nn.Module`): the average begins with its weights.
        decay (`float`):
            Share of the average that stays at each step, between 0 and 1; less at first, `(1 + step) / (10 + step)`,
            so that a short training is not the average of its beginning.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.parameters: list[torch.Tensor] = [
            parameter for parameter in model.parameters() if parameter.requires_grad
        ]
        # In single precision at least: half precision has no room for steps of a thousandth
        types = [torch.promote_types(parameter.dtype, torch.float32) for parameter in self.parameters]
        self.averages = [parameter.detach().to(dtype, copy=True) for parameter, dtype in zip(self.parameters, types)]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after this step (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [parameter.to(average.dtype) for parameter, average in zip(self.parameters, self.averages)]
        torch._foreach_lerp_(self.averages, weights, 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Gives the model the averages for good."""
        torch._foreach_copy_(self.parameters, self.averages)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the model the averages for a while."""
        weights = [parameter.detach().clone() for parameter in self.parameters]
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, weights)


__all__ = ["ExponentialMovingAverage"]
