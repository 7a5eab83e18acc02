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
"""Attention maps of a CrossViT: what its class tokens attend to, by token, by patch and on the pixels of the image.

```python
maps = AttentionMaps(model, image_processor, image)
maps.self_attention(branch=0)                    # of the class token in the last layer, averaged over the heads
maps.cross_attention(branch=1, stage=0, head=2)  # of the class token of branch 1 to the patches of branch 0
maps.rollout().on_image()                        # (height, width) of the image

maps = AttentionMaps(model, image_processor, (photo, mask))  # a separate image for each branch
maps.rollout().on_image(branch=1)                            # (height, width) of the mask
```
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers.image_utils import load_image

from .rollout import attention_rollout, attention_weights_by_stage, checked_index


MAX_RESIZED_PIXELS = 16_000_000  # 213 times as long as wide at 274 pixels, 96 times at 408


@dataclass(frozen=True)
class CropRegion:
    """
    The part of an image that reaches the model: what its image processor crops after resizing. Every branch resizes
    this crop to whole patches, so that the patches of each branch cover it evenly.

    Args:
        image_size (`tuple[int, int]`): (height, width) of the image in pixels.
        origin (`tuple[float, float]`): (top, left) of the crop in pixels of the image; negative where the image
            processor pads.
        size (`tuple[float, float]`): (height, width) of the crop in pixels of the image.
    """

    image_size: tuple[int, int]
    origin: tuple[float, float]
    size: tuple[float, float]

    @classmethod
    def from_image(
        cls, image_processor: Any, image: PIL.Image.Image, first: PIL.Image.Image | None = None
    ) -> "CropRegion":
        """
        The part of `image` that `image_processor` crops. Where each branch has its own image, it is the same relative
        part as of the `first`.
        """
        first = first or image
        top, left, height, width = image_processor.get_crop_box(first.height, first.width)
        rows, columns = image.height / first.height, image.width / first.width
        return cls((image.height, image.width), (top * rows, left * columns), (height * rows, width * columns))

    def align(self, values: np.ndarray, smooth: bool = False, image_size: tuple[int, int] | None = None) -> np.ndarray:
        """
        Resamples a grid of values over the crop to the pixels of the image.

        Args:
            values (`np.ndarray`): (rows, columns), one value per patch or, as from Grad-CAM, per pixel of the crop.
            smooth (`bool`, *optional*, defaults to `False`): whether to interpolate between the cells, for display;
                otherwise a pixel gets the mean over its area, which keeps the sum.
            image_size (`tuple[int, int]`, *optional*): (height, width) of the result, for a scaled copy of the image.

        Returns:
            `np.ndarray`: (height, width), 0 outside the crop.
        """
        height, width = image_size or self.image_size
        rows = self._resampling_weights(0, values.shape[0], height, smooth)
        columns = self._resampling_weights(1, values.shape[1], width, smooth)
        return rows @ values @ columns.T

    def _resampling_weights(self, axis: int, cells: int, pixels: int, smooth: bool) -> np.ndarray:
        """The weights (pixels, cells) of the cells of the crop in each pixel along an axis."""
        cells_per_pixel = self.image_size[axis] / pixels * cells / self.size[axis]
        start = self.origin[axis] / self.size[axis] * cells
        edges = (np.arange(pixels + 1) * cells_per_pixel - start)[:, None]
        cell = np.arange(cells)
        overlaps = np.clip(np.minimum(edges[1:], cell + 1) - np.maximum(edges[:-1], cell), 0, None) / cells_per_pixel
        if not smooth:
            return overlaps
        # Cubic B-splines: never negative, and round where linear interpolation shows stars
        centers = np.clip((edges[1:] + edges[:-1] - 1) / 2, 0, cells - 1)
        distances = np.abs(centers - cell) / max(1, cells_per_pixel)
        weights = np.where(
            distances < 1, 2 / 3 - distances**2 + distances**3 / 2, np.clip(2 - distances, 0, None) ** 3 / 6
        )
        return overlaps.sum(axis=1, keepdims=True) * weights / weights.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class AttentionMap:
    """
    The attention of one token to class tokens and patches, which sums to one.

    Args:
        class_tokens (`dict[int, float]`): the attention to class tokens, by branch.
        patches (`dict[int, np.ndarray]`): the attention to the patches (rows, columns), by branch.
        crops (`dict[int, CropRegion]`): where the patches are in the image of the branch, by branch.
    """

    class_tokens: dict[int, float]
    patches: dict[int, np.ndarray]
    crops: dict[int, CropRegion]

    def on_image(
        self,
        smooth: bool = False,
        image_size: tuple[int, int] | None = None,
        branch: int | None = None,
        relative: bool = False,
    ) -> np.ndarray:
        """
        The attention to the patches, spread evenly over their areas.

        Args:
            smooth, image_size:
                As in [`CropRegion.align`].
            branch (`int`, *optional*): whose patches, on its image; by default the sum over the branches in `patches`.
            relative (`bool`, *optional*, defaults to `False`): whether to return multiples of uniform attention, that
                is, of the same attention to the patches spread evenly over the crop, for display.

        Returns:
            `np.ndarray`: (height, width) of the image, the attention to each pixel: 0 outside the crop. Its sum is
            the attention to all these patches, unless `smooth`, `relative`, or the image was padded.

        Raises:
            `ValueError`: if `patches` has no such branch, or a sum is over images of different sizes.
        """
        branches = list(self.patches)
        if branch is not None:
            if branch not in branches:
                raise ValueError(f"`branch={branch}` must be one of {branches}: the map has no patches of others.")
            branches = [branch]
        crop = self.crops[branches[0]]
        if any(self.crops[index] != crop for index in branches):
            raise ValueError(
                f"The images of branches {branches} have different sizes, so that the attention to them cannot be"
                " summed: choose one of them with `branch`."
            )
        patches = [self.patches[index].astype(np.float64) for index in branches]
        if relative:
            # Not zero where a head attends only to class tokens
            uniform = max(sum(shares.sum() for shares in patches), np.finfo(np.float64).tiny)
        else:
            height, width = image_size or crop.image_size
            uniform = np.prod(crop.size) * height * width / np.prod(crop.image_size)
        densities = [shares * shares.size / uniform for shares in patches]
        return np.sum([crop.align(density, smooth, image_size) for density in densities], axis=0)


class AttentionMaps:
    """
    The attention of a model for one image, or for a separate image for each branch. The model runs once, with eager
    attention and without dropout, since other attention implementations do not return weights; afterwards its settings
    are restored. Threads may share a model that was loaded with `attn_implementation="eager"` and is in evaluation
    mode.

    Args:
        model (`CrossViTForImageClassification` or `CrossViTModel`): on any device.
        image_processor (`CrossViTImageProcessor` or `CrossViTImageProcessorPil`): of the model.
        image (`PIL.Image.Image`, `str`, or a `tuple` or `list` of them):
            An image, its path or its URL; or one for each branch. Images are turned upright by their EXIF orientation,
            as in pipelines.
        interpolate_pos_encoding (`bool`, *optional*, defaults to `False`): as in [`CrossViTModel`].

    Raises:
        `ValueError`: if there are neither one nor as many images as branches, for a model of another class, for images
            of more than 8 bits per channel, or if resizing would make more than `MAX_RESIZED_PIXELS` of an image that
            has fewer, as of an image one pixel wide.

    Attributes:
        images (`tuple[PIL.Image.Image, ...]`): the image of each branch, upright and in RGB.
        outputs (`ModelOutput`): of the model, with the logits.
        crops (`tuple[CropRegion, ...]`): the part of the image of each branch that reaches the model.
        grid_sizes (`list[tuple[int, int]]`): (rows, columns) of patches of each branch.
    """

    def __init__(self, model: Any, image_processor: Any, image: Any, interpolate_pos_encoding: bool = False):
        self.config = model.config
        is_per_branch = isinstance(image, (list, tuple))
        if is_per_branch and len(image) != self.config.num_branches:
            raise ValueError(
                f"`image` must be one image or {self.config.num_branches}, one for each branch of the model, got"
                f" {len(image)}."
            )
        opened = image_processor.fetch_images(list(image) if is_per_branch else [image])
        images = tuple(load_image(entry) for entry in opened)
        check_resized_size(image_processor, images[0])
        pixel_values = image_processor([images] if is_per_branch else images, return_tensors="pt").pixel_values
        crops = tuple(CropRegion.from_image(image_processor, entry, images[0]) for entry in images)
        with torch.no_grad(), eager_attention(model):
            self.outputs = model(
                pixel_values.to(model.device, model.dtype),
                interpolate_pos_encoding=interpolate_pos_encoding,
                output_attentions=True,
                return_dict=True,
            )
        self._stages = attention_weights_by_stage(self.outputs, self.config)
        repeats = 1 if is_per_branch else self.config.num_branches
        self.images, self.crops = images * repeats, crops * repeats
        height, width = pixel_values.shape[-2:]
        self.grid_sizes = [
            embeddings.get_grid_size(embeddings.get_image_size(height, width, interpolate_pos_encoding))
            for embeddings in model.branch_embeddings
        ]

    def self_attention(
        self, branch: int, stage: int = -1, layer: int = -1, head: int | None = None, token: int = 0
    ) -> AttentionMap:
        """
        The attention of a token of a branch to all tokens of that branch.

        Args:
            branch, stage, layer (`int`): which of the layers of the branch in the stage, counted from 0; negative
                numbers count from the end.
            head (`int`, *optional*): which head; by default the mean of all heads.
            token (`int`, *optional*, defaults to 0): which token: 0 is the class token, 1 the first patch.

        Raises:
            `ValueError`: if one of them is out of range.
        """
        self_weights, _ = checked_index("stage", stage, self._stages)
        layers = checked_index("branch", branch, self_weights)
        weights = checked_index("layer", layer, layers, f" in branch {branch} of stage {stage}")
        return self._map(branch, branch, checked_index("token", token, select_head(weights, head)))

    def cross_attention(self, branch: int, stage: int = -1, head: int | None = None) -> AttentionMap:
        """
        The cross-attention of the class token of a branch, in the fusion of a stage: to itself and to the patches of
        the next branch.

        Args:
            branch, stage, head:
                As in [`~AttentionMaps.self_attention`].

        Raises:
            `ValueError`: if one of them is out of range.
        """
        _, cross_weights = checked_index("stage", stage, self._stages)
        weights = checked_index("branch", branch, cross_weights)
        return self._map(branch, branch + 1, select_head(weights, head)[0])

    def class_token_maps(self, stage: int = -1, head: int | None = None) -> dict[str, AttentionMap]:
        """
        All maps of a stage, by title: the self-attention of the class token in the last layer of each branch that has
        layers in the stage, then the cross-attention of each branch.

        Args:
            stage, head:
                As in [`~AttentionMaps.self_attention`].
        """
        branches = range(self.config.num_branches)
        maps = {}
        self_weights, _ = checked_index("stage", stage, self._stages)
        for branch, layers in zip(branches, self_weights):
            rows, columns = self.grid_sizes[branch]
            if layers:
                title = f"branch {branch} ({rows}x{columns} patches)\nself-attention"
                maps[title] = self.self_attention(branch, stage, head=head)
        for branch in branches:
            title = f"branch {branch} to branch {(branch + 1) % len(branches)}\ncross-attention"
            maps[title] = self.cross_attention(branch, stage, head)
        return maps

    def rollout(self, branch: int | None = None) -> AttentionMap:
        """
        The share of each input token in the class token of a branch at the end, as [`attention_rollout`] defines it.

        Args:
            branch (`int`, *optional*): whose class token; by default the mean over the branches.

        Raises:
            `ValueError`: if `branch` is out of range.
        """
        rows = [row[0].cpu().double().numpy() for row in attention_rollout(self.outputs, self.config, branch)]
        return AttentionMap(
            {index: float(row[0]) for index, row in enumerate(rows)},
            {index: row[1:].reshape(grid_size) for index, (row, grid_size) in enumerate(zip(rows, self.grid_sizes))},
            dict(enumerate(self.crops)),
        )

    def _map(self, class_branch: int, patch_branch: int, weights: np.ndarray) -> AttentionMap:
        """The map of a token that attends to the class token of one branch and to the patches of one."""
        class_branch, patch_branch = (index % len(self.grid_sizes) for index in (class_branch, patch_branch))
        # A copy, since a view would keep the attention of all tokens
        patches = weights[1:].reshape(self.grid_sizes[patch_branch]).copy()
        crops = {patch_branch: self.crops[patch_branch]}
        return AttentionMap({class_branch: float(weights[0])}, {patch_branch: patches}, crops)


def check_resized_size(image_processor: Any, image: PIL.Image.Image) -> None:
    """A `ValueError` refuses an image of which resizing would make gigabytes, before it is resized."""
    height, width = image_processor.get_resized_size(image.height, image.width)
    if height * width > max(MAX_RESIZED_PIXELS, image.height * image.width):
        raise ValueError(
            f"The image has {image.width}x{image.height} pixels (width x height) and would have {width}x{height} after"
            f" resizing, which is more than {MAX_RESIZED_PIXELS:,}: crop it to a less extreme aspect ratio."
        )


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Eager attention and evaluation mode for a while."""
    implementation, training = model.config._attn_implementation, model.training
    try:
        if implementation != "eager":
            model.set_attn_implementation("eager")
        model.eval()
        yield
    finally:
        if implementation != "eager":
            model.set_attn_implementation(implementation)
        model.train(training)


def select_head(weights: torch.Tensor, head: int | None) -> np.ndarray:
    """(1, heads, queries, keys) -> (queries, keys) of a head, or the mean of all heads"""
    heads = weights[0] if head is None else checked_index("head", head, weights[0]).unsqueeze(0)
    return heads.cpu().double().mean(dim=0).numpy()
