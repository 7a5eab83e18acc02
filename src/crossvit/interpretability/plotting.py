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
"""Pictures of attention maps and predictions, in colors that color-blind readers can distinguish. Matplotlib is loaded
when something is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from .attention_maps import AttentionMap


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure


BLUE, ORANGE, GRAY = "#0072B2", "#D55E00", "#BBBBBB"
MAX_HEAT = 16  # times uniform attention, where the colors end
CELL = 2.1  # inches, the width of a picture in a row


def display_size(image: PIL.Image.Image, side: int = 480) -> tuple[int, int]:
    """The (height, width) in pixels of the image scaled to `side` pixels on its longer side."""
    scale = side / max(image.size)
    return max(1, round(scale * image.height)), max(1, round(scale * image.width))


def shorten(text: str, length: int = 24) -> str:
    """The beginning and the end of a text that is longer, with an ellipsis between them."""
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-(length - length // 2 - 1) :]}"


def heat_colors() -> "ListedColormap":
    """The colors of an [`overlay`], from transparent at 1x uniform attention to almost opaque at `MAX_HEAT`."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    strength = np.linspace(0, 1, 256)
    colors = colormaps["plasma"](strength)
    colors[:, 3] = 0.9 * strength
    return ListedColormap(colors)


def overlay(image: PIL.Image.Image, values: np.ndarray) -> PIL.Image.Image:
    """
    A heat map over the image. What has no more than uniform attention stays as it is, so that the map of a model that
    attends to everything alike shows only the image. The scale is logarithmic, up to 16 times uniform attention, and
    the same for all maps, so that pictures can be compared.

    Args:
        image (`PIL.Image.Image`): is resized to the shape of the values.
        values (`np.ndarray`): (height, width) in multiples of uniform attention, as from
            `AttentionMap.on_image(relative=True)`.
    """
    height, width = values.shape
    pixels = np.asarray(image.convert("RGB").resize((width, height)), dtype=np.float32)
    strength = np.log(np.clip(values, 1, MAX_HEAT)) / np.log(MAX_HEAT)
    colors = heat_colors()(strength)
    opacity = colors[..., 3:]
    return PIL.Image.fromarray((opacity * 255 * colors[..., :3] + (1 - opacity) * pixels).round().astype(np.uint8))


def draw_attention(
    image: PIL.Image.Image, attention: AttentionMap, branch: int | None = None
) -> tuple[PIL.Image.Image, str]:
    """
    The [`overlay`] of an attention map over its image, and the peak of the map as text, such as "max 7.1x".

    Args:
        image (`PIL.Image.Image`): or a scaled copy; is resized to 480 pixels on its longer side.
        attention (`AttentionMap`): the map.
        branch (`int`, *optional*): as in [`AttentionMap.on_image`].
    """
    size = display_size(image)
    # Smoothing lowers peaks
    peak = attention.on_image(image_size=size, branch=branch, relative=True).max()
    heat = attention.on_image(smooth=True, image_size=size, branch=branch, relative=True)
    return overlay(image, heat), f"max {peak:.1f}x"


@dataclass(frozen=True)
class ImageCell:
    """
    A cell of [`draw_rows`] with an image.

    Args:
        image (`PIL.Image.Image`): the image.
        title (`str`, *optional*): above it.
        label (`str`, *optional*): beside it, for its row.
        color (`str`, *optional*): of its label and of a frame.
    """

    image: PIL.Image.Image
    title: str = ""
    label: str = ""
    color: str | None = None

    def draw(self, axis: "Axes") -> None:
        axis.imshow(self.image.convert("RGB"))
        axis.set_title(self.title, fontsize=10, parse_math=False)
        axis.set_ylabel(self.label, fontsize=11, parse_math=False, color=self.color or "black")
        axis.spines[:].set(color=self.color or "black", linewidth=3 if self.color else 0.5)


@dataclass(frozen=True)
class ScoreCell:
    """
    A cell of [`draw_rows`] with a bar for each of the top labels.

    Args:
        scores (`list[dict[str, Any]]`): "label" and "score" of each, as pipelines return them.
        title (`str`, *optional*): above them.
        correct (`bool`, *optional*, defaults to `True`): whether the first label is correct, as far as is known.
    """

    scores: list[dict[str, Any]]
    title: str = ""
    correct: bool = True

    def draw(self, axis: "Axes") -> None:
        places = range(len(self.scores))
        colors = [BLUE if self.correct else ORANGE] + [GRAY] * len(self.scores)
        axis.barh(places, [entry["score"] for entry in self.scores], height=0.3, color=colors[: len(self.scores)])
        for place, entry in enumerate(self.scores):
            label = f"{shorten(entry['label'].split(',')[0])}  {entry['score']:.1%}"
            axis.text(0.01, place - 0.2, label, va="bottom", fontsize=10, parse_math=False)
        axis.set_title(self.title, fontsize=10)
        axis.set(xlim=(0, 1), ylim=(len(self.scores) - 0.6, -0.7))
        axis.spines[["top", "right", "bottom"]].set_visible(False)


def draw_rows(rows: Sequence[Sequence[ImageCell | ScoreCell | None]], heat: bool = False) -> "Figure":
    """
    Draws rows of pictures and scores.

    Args:
        rows (`Sequence[Sequence[ImageCell | ScoreCell | None]]`): the cells, the same number in each row; `None`
            extends the cell before it.
        heat (`bool`, *optional*, defaults to `False`): whether to add the color bar of an [`overlay`].
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    # Rows are as high as their highest picture and its title
    aspects = [
        max(cell.image.height / cell.image.width for cell in row if isinstance(cell, ImageCell)) for row in rows
    ]
    aspects = [min(max(aspect, 0.5), 3) for aspect in aspects]
    titles = [max((f"{cell.title}\n".count("\n") for cell in row if cell and cell.title), default=0) for row in rows]
    heights = [CELL * aspect + 0.2 * lines for aspect, lines in zip(aspects, titles)]
    figure_size = (CELL * len(rows[0]), sum(heights) + 0.15 * len(rows) + 0.7 * heat)
    figure = Figure(figsize=figure_size, dpi=120, layout="constrained")
    grid = figure.add_gridspec(len(rows), len(rows[0]), height_ratios=heights)
    axes = []
    for number, row in enumerate(rows):
        starts = [column for column, cell in enumerate(row) if cell is not None]
        for start, end in zip(starts, [*starts[1:], len(row)]):
            axes.append(figure.add_subplot(grid[number, start:end], xticks=[], yticks=[]))
            axes[-1].set_box_aspect(aspects[number] / (end - start) if isinstance(row[start], ScoreCell) else None)
            row[start].draw(axes[-1])
    if heat:
        colors = ScalarMappable(LogNorm(1, MAX_HEAT), heat_colors())
        bar = figure.colorbar(colors, ax=axes, location="bottom", aspect=50, shrink=0.6, pad=0.02)
        ticks = [2**power for power in range(MAX_HEAT.bit_length())]
        bar.set_ticks(ticks, labels=[f"{tick}x" for tick in ticks], minor=False)
        bar.minorticks_off()
        bar.set_label("attention to a place, relative to uniform attention")
    return figure
