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
"""Where a CrossViT looks: the attention of its class tokens, by token, by patch and on the image itself.

```python
maps = AttentionMaps(model, image_processor, image)
maps.self_attention(branch=0)                    # of the class token in the last layer, the mean of the heads
maps.cross_attention(branch=1, stage=0, head=2)  # of the class token on its visit to the next branch
maps.rollout().on_image()                        # (height, width) of the image
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


@dataclass(frozen=True)
class SeenRegion:
    """
    The part of an image that a model sees: what its image processor cuts out after resizing. Every branch resizes it
    to whole patches, so that the patches of each branch cover it evenly.

    Args:
        image_size (`tuple[int, int]`): (height, width) of the image in pixels.
        origin (`tuple[float, float]`): (top, left) of the region in pixels of the image; negative where the image
            processor pads.
        size (`tuple[float, float]`): (height, width) of the region in pixels of the image.
    """

    image_size: tuple[int, int]
    origin: tuple[float, float]
    size: tuple[float, float]

    @classmethod
    def of(cls, image_processor: Any, image: PIL.Image.Image, pixel_values: torch.Tensor) -> "SeenRegion":
        """What `pixel_values` (1, channels, height, width) show of the image that `image_processor` made them of."""
        uncut = image_processor(
            image, do_center_crop=False, do_rescale=False, do_normalize=False, return_tensors="pt"
        ).pixel_values
        image_size = (image.height, image.width)
        origin, size = [], []
        for side, resized, seen in zip(image_size, uncut.shape[-2:], pixel_values.shape[-2:]):
            # As in `center_crop` of the image processors
            margin = round((resized - seen) / 2) if resized >= seen else -((seen - resized) // 2)
            origin.append(margin * side / resized)
            size.append(seen * side / resized)
        return cls(image_size, (origin[0], origin[1]), (size[0], size[1]))

    def align(self, values: np.ndarray, smooth: bool = False, image_size: tuple[int, int] | None = None) -> np.ndarray:
        """
        Brings values of the region to the pixels of the image.

        Args:
            values (`np.ndarray`): (rows, columns), of patches or, as Grad-CAM makes them, of pixels of the model.
            smooth (`bool`, *optional*, defaults to `False`): whether to blur the edges of the cells, for pictures;
                otherwise a pixel has the mean over its area, and nothing is lost.
            image_size (`tuple[int, int]`, *optional*): (height, width) of the result, for a scaled copy of the image.

        Returns:
            `np.ndarray`: (height, width), 0 where the model does not see the image.
        """
        height, width = image_size or self.image_size
        rows = self._shares(0, values.shape[0], height, smooth)
        columns = self._shares(1, values.shape[1], width, smooth)
        return rows @ values @ columns.T

    def cell_area(self, shape: tuple[int, ...], image_size: tuple[int, int] | None = None) -> float:
        """The area in pixels of the image, or a scaled copy, of a cell if (rows, columns) of them cover the region."""
        scaled_size = image_size or self.image_size
        scaling = (scaled_size[0] / self.image_size[0]) * (scaled_size[1] / self.image_size[1])
        return scaling * self.size[0] * self.size[1] / (shape[0] * shape[1])

    def _shares(self, axis: int, cells: int, pixels: int, smooth: bool) -> np.ndarray:
        """The shares (pixels, cells) of the cells of the region in each pixel along an axis."""
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
        shares = np.where(
            distances < 1, 2 / 3 - distances**2 + distances**3 / 2, np.clip(2 - distances, 0, None) ** 3 / 6
        )
        return overlaps.sum(axis=1, keepdims=True) * shares / shares.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class AttentionMap:
    """
    How a token shares its attention among class tokens and patches: shares that sum to one.

    Args:
        class_tokens (`dict[int, float]`): the shares of class tokens, by branch.
        patches (`dict[int, np.ndarray]`): the shares of the patches (rows, columns), by branch.
        region (`SeenRegion`): where the patches are.
    """

    class_tokens: dict[int, float]
    patches: dict[int, np.ndarray]
    region: SeenRegion

    def on_image(self, smooth: bool = False, image_size: tuple[int, int] | None = None) -> np.ndarray:
        """
        The shares of the patches, spread evenly over their areas and over all branches.

        Args:
            smooth, image_size:
                As in [`SeenRegion.align`].

        Returns:
            `np.ndarray`: (height, width) of the image, the share of each pixel: 0 outside of what the model sees, and
            together the share of all patches, unless `smooth` or the image was padded.
        """
        densities = [shares / self.region.cell_area(shares.shape, image_size) for shares in self.patches.values()]
        return np.sum([self.region.align(density, smooth, image_size) for density in densities], axis=0)


class AttentionMaps:
    """
    The attention of a model on one image. The model runs once, with eager attention and without dropout, as other
    implementations do not say how they attend; then it is as it was, which is not for several threads at once unless
    it is loaded with `attn_implementation="eager"`.

    Args:
        model (`CrossViTForImageClassification` or `CrossViTModel`): on any device.
        image_processor (`CrossViTImageProcessor` or `CrossViTImageProcessorPil`): of the model.
        image (`PIL.Image.Image` or `str`): or its path or URL. Turned upright by its EXIF orientation as in pipelines.
        interpolate_pos_encoding (`bool`, *optional*, defaults to `False`): as in [`CrossViTModel`].

    Raises:
        `TypeError`: for a model of another class.

    Attributes:
        image (`PIL.Image.Image`): upright and in RGB.
        outputs (`ModelOutput`): of the model, with the logits.
        region (`SeenRegion`): what the model sees of the image.
        grid_sizes (`list[tuple[int, int]]`): (rows, columns) of patches of each branch.
    """

    def __init__(self, model: Any, image_processor: Any, image: Any, interpolate_pos_encoding: bool = False):
        self.image = load_image(image)
        self.config = model.config
        pixel_values = image_processor(self.image, return_tensors="pt").pixel_values
        self.region = SeenRegion.of(image_processor, self.image, pixel_values)
        with torch.no_grad(), attending_eagerly(model):
            self.outputs = model(
                pixel_values.to(model.device, model.dtype),
                interpolate_pos_encoding=interpolate_pos_encoding,
                output_attentions=True,
                return_dict=True,
            )

        if getattr(self.outputs, "cross_attentions", None) is None:
            raise TypeError(
                "The model must be a CrossViTForImageClassification or a CrossViTModel, which return the attention of"
                f" their fusions, got a {type(model).__name__}."
            )

        height, width = pixel_values.shape[-2:]
        self.grid_sizes = [
            embeddings.get_grid_size(embeddings.get_image_size(height, width, interpolate_pos_encoding))
            for embeddings in model.branch_embeddings
        ]
        # (heads, queries, keys) of each stage, branch and layer; of fusions the first layer alone sees patches
        attentions, cross_attentions = iter(self.outputs.attentions), iter(self.outputs.cross_attentions)
        self.self_weights: list[list[list[np.ndarray]]] = []
        self.cross_weights: list[list[np.ndarray]] = []
        for *branch_depths, fusion_depth in self.config.depth:
            self.self_weights.append([[to_array(next(attentions)) for _ in range(depth)] for depth in branch_depths])
            layers = [[to_array(next(cross_attentions)) for _ in range(max(1, fusion_depth))] for _ in branch_depths]
            self.cross_weights.append([first for first, *_ in layers])

    def self_attention(
        self, branch: int, stage: int = -1, layer: int = -1, head: int | None = None, token: int = 0
    ) -> AttentionMap:
        """
        How a token of a branch attends to all tokens of the branch.

        Args:
            branch, stage, layer (`int`): which layer, of those of the branch in the stage; negative ones count from
                the end.
            head (`int`, *optional*): which head; by default the mean of them.
            token (`int`, *optional*, defaults to 0): which token: 0 is the class token, 1 the first patch.

        Raises:
            `ValueError`: if there is no such one.
        """
        layers = pick("branch", branch, pick("stage", stage, self.self_weights))
        weights = pick("layer", layer, layers, f" in branch {branch} of stage {stage}")
        return self._map(branch, branch, pick("token", token, of_head(weights, head)))

    def cross_attention(self, branch: int, stage: int = -1, head: int | None = None) -> AttentionMap:
        """
        How the class token of a branch attends to itself and to the patches of the next branch, in the fusion of a
        stage.

        Args:
            branch, stage, head:
                As in [`~AttentionMaps.self_attention`].

        Raises:
            `ValueError`: if there is no such one.
        """
        weights = pick("branch", branch, pick("stage", stage, self.cross_weights))
        return self._map(branch, branch + 1, of_head(weights, head)[0])

    def rollout(self, branch: int | None = None) -> AttentionMap:
        """
        What the class token of a branch at the end is made of: the class tokens and patches of all branches at the
        start, if attention were all that moves information. Attention rollout (Abnar and Zuidema 2020,
        arXiv:2005.00928: heads are averaged, half of each token stays through the residual, layers are multiplied),
        carried over to several branches: the tokens of all of them form one sequence, in which

        - a layer of a branch mixes the tokens of the branch: x <- (x + A x) / 2, and leaves the others as they are;
        - a fusion mixes the class token c of a branch with the patches p of the next one:
          c <- (c + a_0 c + sum_n a_n p_n) / 2. The projections to the other branch and back change what a class token
          says, not where it is from, as MLPs do. Further cross-attention layers, where the class token attends to
          itself alone, change nothing.

        Args:
            branch (`int`, *optional*): which class token; by default their mean, as logits are the mean of a head on
                each of them.

        Raises:
            `ValueError`: if there is no such branch.
        """
        ends = np.cumsum([1 + rows * columns for rows, columns in self.grid_sizes])
        starts = [0, *ends[:-1]]
        # Row i has the shares of all tokens at the start in token i, in float64 as they are multiplied by the dozen
        shares = np.eye(ends[-1])
        for self_weights, cross_weights in zip(self.self_weights, self.cross_weights):
            for start, end, layers in zip(starts, ends, self_weights):
                for weights in layers:
                    shares[start:end] = (shares[start:end] + of_head(weights, None) @ shares[start:end]) / 2
            for index, weights in enumerate(cross_weights):  # in any order: they change class tokens, and read patches
                next_index = (index + 1) % len(starts)
                class_shares = shares[starts[index]]
                visited = np.vstack((class_shares, shares[starts[next_index] + 1 : ends[next_index]]))
                shares[starts[index]] = (class_shares + of_head(weights, None)[0] @ visited) / 2

        result = shares[starts].mean(axis=0) if branch is None else shares[pick("branch", branch, starts)]
        branches = list(enumerate(zip(starts, ends, self.grid_sizes)))
        return AttentionMap(
            {index: float(result[start]) for index, (start, _, _) in branches},
            {index: result[start + 1 : end].reshape(grid) for index, (start, end, grid) in branches},
            self.region,
        )

    def _map(self, class_branch: int, patch_branch: int, shares: np.ndarray) -> AttentionMap:
        """The map of a token that attends to a class token and to the patches of a branch."""
        class_branch, patch_branch = (index % len(self.grid_sizes) for index in (class_branch, patch_branch))
        patches = shares[1:].reshape(self.grid_sizes[patch_branch])
        return AttentionMap({class_branch: float(shares[0])}, {patch_branch: patches}, self.region)


@contextmanager
def attending_eagerly(model: Any) -> Iterator[None]:
    """With eager attention and without dropout; then as before."""
    implementation, training = model.config._attn_implementation, model.training
    try:
        if implementation != "eager":
            model.set_attn_implementation("eager")
        if training:
            model.eval()
        yield
    finally:
        if implementation != "eager":
            model.set_attn_implementation(implementation)
        if training:
            model.train()


def to_array(weights: torch.Tensor) -> np.ndarray:
    """(1, heads, queries, keys) -> (heads, queries, keys)"""
    return weights[0].float().cpu().numpy()


def of_head(weights: np.ndarray, head: int | None) -> np.ndarray:
    """(heads, queries, keys) -> (queries, keys)"""
    return weights.mean(axis=0, dtype=np.float64) if head is None else pick("head", head, weights)


def pick(name: str, index: int, entries: Any, where: str = "") -> Any:
    if not -len(entries) <= index < len(entries):
        raise ValueError(f"`{name}` must be one of the {len(entries)}{where}, from 0, got {index}.")
    return entries[index]


__all__ = ["AttentionMap", "AttentionMaps", "SeenRegion"]
