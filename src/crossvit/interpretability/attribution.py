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
"""Adapters between CrossViT and packages of attribution methods, such as pytorch-grad-cam and captum, which expect a
model that returns a tensor, and maps instead of tokens.

```python
from captum.attr import IntegratedGradients, LayerGradientXActivation
from pytorch_grad_cam import GradCAM

logits, to_maps = LogitsModel(model), TokensToMaps(model)
layers = [branch.layers[-1].layernorm_before for branch in model.crossvit.stages[-1].branches]
with GradCAM(logits, layers, reshape_transform=to_maps) as grad_cam:
    heat = grad_cam(pixel_values, targets=None)  # (batch, height, width) of `pixel_values`, for the top label
tokens = LayerGradientXActivation(logits, layers[0]).attribute(pixel_values, target=label)
heat = to_maps(tokens).sum(dim=1)  # (batch, rows, columns) of the patches of the branch
pixels = IntegratedGradients(logits).attribute(pixel_values, target=label)
```

[`CropRegion.align`] resamples any of these to the pixels of the image.
"""

from typing import Any

import torch
from torch import nn


class LogitsModel(nn.Module):
    """A classifier that returns only its logits (batch_size, num_labels)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.model(pixel_values, **kwargs).logits


class TokensToMaps:
    """
    Reshapes all tokens (batch_size, 1 + num_patches, embed_dim) of a branch to maps (batch_size, embed_dim, rows,
    columns) of its patches. The branch is the one with this width and number of patches.

    Args:
        model (`CrossViTPreTrainedModel`): the model of the tokens.
        image_size (`tuple[int, int]`, *optional*): (height, width) of the `pixel_values`, if the model is called with
            `interpolate_pos_encoding=True`.
    """

    def __init__(self, model: Any, image_size: tuple[int, int] | None = None):
        self.grid_sizes: dict[tuple[int, ...], set[tuple[int, int]]] = {}
        for branch, embeddings in enumerate(model.branch_embeddings):
            size = embeddings.image_size
            if image_size is not None:
                size = embeddings.get_image_size(*image_size, interpolate_pos_encoding=True)
            rows, columns = embeddings.get_grid_size(size)
            shape = (1 + rows * columns, model.config.embed_dim[branch])
            self.grid_sizes.setdefault(shape, set()).add((rows, columns))

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """
        Raises:
            `ValueError`: if the tokens are not all tokens of a branch, or could be those of two branches with
                different grids.
        """
        grid_sizes = self.grid_sizes.get(tuple(tokens.shape[1:]), set())
        if len(grid_sizes) != 1:
            raise ValueError(
                f"Tokens of shape {tuple(tokens.shape)} are not those of one branch; (tokens, embed_dim) of the"
                f" branches are {', '.join(map(str, self.grid_sizes))}. Choose a layer of `stages[...].branches[...]`,"
                " and pass the `image_size` of `pixel_values` if the position embeddings are interpolated."
            )
        # (batch, 1 + patches, dim) -> (batch, dim, rows, columns)
        return tokens[:, 1:].transpose(1, 2).unflatten(2, *grid_sizes)
