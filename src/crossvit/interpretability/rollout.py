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
"""Attention rollout of a batch in torch, with gradients, and its overlap with masks, for losses that guide attention.

```python
model.set_attn_implementation("eager")  # the other implementations return no attention weights
outputs = model(pixel_values, labels=labels, output_attentions=True)
overlap = attention_iou(attention_rollout(outputs, model.config), masks, model.config)
loss = outputs.loss + 0.1 * (1 - overlap).mean()
```
"""

from itertools import islice
from typing import Any

import torch
from torch import nn


def attention_weights_by_stage(outputs: Any, config: Any) -> list[tuple[list[list[torch.Tensor]], list[torch.Tensor]]]:
    """
    The attention weights (batch_size, num_heads, queries, keys) of each stage: of self-attention by branch and layer,
    and of the fusions by branch. Those of a fusion are of its first layer, the only one that attends to patches.

    Raises:
        `ValueError`: if `outputs` has no attention weights.
    """
    attentions, cross_attentions = getattr(outputs, "attentions", None), getattr(outputs, "cross_attentions", None)
    if not cross_attentions or any(weights is None for weights in (*attentions, *cross_attentions)):
        raise ValueError(
            "`outputs` must have the weights of self-attention and cross-attention, got a"
            f" {type(outputs).__name__} without them: call a CrossViTForImageClassification or a CrossViTModel with"
            " `output_attentions=True`, after `model.set_attn_implementation('eager')`."
        )
    self_weights, cross_weights = iter(attentions), iter(cross_attentions)
    stages = []
    for *branch_depths, fusion_depth in config.depth:
        layers = [list(islice(self_weights, depth)) for depth in branch_depths]
        fusion_layers = max(1, fusion_depth)
        fusions = list(islice(cross_weights, fusion_layers * len(branch_depths)))[::fusion_layers]
        stages.append((layers, fusions))
    return stages


def attention_rollout(outputs: Any, config: Any, branch: int | None = None) -> tuple[torch.Tensor, ...]:
    """
    Attention rollout (Abnar and Zuidema 2020, arXiv:2005.00928): the share of each input token in the final class
    tokens, if attention were all that moves information between tokens. Heads are averaged, residual connections
    get weight 0.5, and layers are multiplied. The tokens of all branches form one sequence, in which

    - a layer of a branch mixes the tokens of that branch: x <- (x + A x) / 2;
    - a fusion mixes the class token c of a branch with the patches p of the next branch:
      c <- (c + a_0 c + sum_n a_n p_n) / 2. The projections to the width of the other branch and back act on each
      token by itself, as MLPs do, and so does every cross-attention layer after the first, where the class token
      attends only to itself: they change nothing here.

    Args:
        outputs ([`CrossViTImageClassifierOutput`] or [`CrossViTModelOutput`]):
            Of a model with eager attention, compiled or not, called with `output_attentions=True`. Gradients pass
            through the attention weights, which have none with reentrant gradient checkpointing
            (`use_reentrant=True`). In training mode the weights are those after dropout.
        config ([`CrossViTConfig`]): of the model.
        branch (`int`, *optional*): whose class token; by default the mean over the branches, as logits are the mean
            over the heads of the branches.

    Returns:
        `tuple[torch.Tensor, ...]`: for each branch (batch_size, 1 + num_patches) in float32, the shares of its class
        token and of its patches. The shares of all branches together sum to one, as the attention weights do.

    Raises:
        `ValueError`: if `outputs` has no attention weights, or `branch` is out of range.
    """
    stages = attention_weights_by_stage(outputs, config)
    branches = range(config.num_branches)
    if branch is not None:
        branch = checked_index("branch", branch, branches)

    # The rows of the class tokens in the product of all layers, (batch, 1 + patches) of each branch. From the last
    # layer to the first, only vectors are multiplied by matrices
    _, last_fusions = stages[-1]
    device = last_fusions[-1].device  # with a `device_map` the branches may be on different devices
    shares = []
    for index in branches:
        # The fusion of the branch before attends to as many tokens as this branch has
        row = torch.zeros_like(last_fusions[index - 1][:, 0, 0], dtype=torch.float32, device=device)
        row[:, 0] = 1 / len(branches) if branch is None else float(index == branch)
        shares.append(row)

    with torch.autocast(device.type, enabled=False):
        for layers, fusions in reversed(stages):
            fusion_rows = [weights.to(device).float().mean(dim=1)[:, 0] for weights in fusions]
            class_shares = [row[:, :1] for row in shares]
            for index in branches:
                class_share = class_shares[index] * (1 + fusion_rows[index][:, :1]) / 2
                # The patches are those to which the class token of the branch before attends
                patch_shares = shares[index][:, 1:] + class_shares[index - 1] * fusion_rows[index - 1][:, 1:] / 2
                shares[index] = torch.cat((class_share, patch_shares), dim=1)
            for index in branches:
                for weights in reversed(layers[index]):
                    attention = weights.to(device).float().mean(dim=1)
                    shares[index] = (shares[index] + (shares[index].unsqueeze(1) @ attention).squeeze(1)) / 2
    return tuple(shares)


def attention_iou(rollout: tuple[torch.Tensor, ...], masks: torch.Tensor, config: Any) -> torch.Tensor:
    """
    The soft intersection over union of masks and the attention to the patches, relative to its maximum in each branch:
    sum(a m) / sum(a + m - a m), for attention a and the masked part m of each patch. The result is the mean over the
    branches: 1 if each attends evenly to the masked patches and to no others, 0 for an empty mask, without a gradient.

    Args:
        rollout (`tuple[torch.Tensor, ...]`): from [`attention_rollout`].
        masks (`torch.Tensor`):
            (batch_size, height, width) between 0 and 1, over the area of `pixel_values` in any resolution.
        config ([`CrossViTConfig`]): of the model, which was called with images of its native sizes.

    Returns:
        `torch.Tensor`: (batch_size,) between 0 and 1.

    Raises:
        `ValueError`: if the masks have another shape, or the position embeddings were interpolated.
    """
    if masks.ndim != 3 or len(masks) != len(rollout[0]):
        raise ValueError(
            f"`masks` must be of shape ({len(rollout[0])}, height, width), one per image, got {tuple(masks.shape)}."
        )
    overlaps = []
    for shares, (height, width), patch_size in zip(rollout, config.image_sizes, config.patch_size):
        rows, columns = height // patch_size, width // patch_size
        patch_shares = shares[:, 1:]
        if patch_shares.shape[1] != rows * columns:
            raise ValueError(
                f"The rollout has {patch_shares.shape[1]} patches where images of the native size have {rows} x"
                f" {columns}: call the model without `interpolate_pos_encoding`."
            )
        # (batch, height, width) -> (batch, patches)
        masked = nn.functional.adaptive_avg_pool2d(masks.to(shares)[:, None], (rows, columns)).flatten(1)
        # The lower bounds avoid 0 / 0 in a branch that does not contribute to the class token of another one
        attention = patch_shares / patch_shares.amax(dim=1, keepdim=True).clamp_min(1e-12)
        intersection = (attention * masked).sum(dim=1)
        union = (attention + masked).sum(dim=1) - intersection
        overlaps.append(intersection / union.clamp_min(1e-12))
    return torch.stack(overlaps).mean(dim=0)


def checked_index(name: str, index: int, entries: Any, where: str = "") -> Any:
    """The entry with this index, negative ones from the end; a `ValueError` names an index out of range."""
    if not -len(entries) <= index < len(entries):
        raise ValueError(f"`{name}={index}` is out of range: there are {len(entries)}{where}, counted from 0.")
    return entries[index]
