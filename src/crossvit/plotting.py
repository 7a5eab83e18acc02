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
"""Pictures, in colors that are different to color-blind eyes too."""

import numpy as np
from matplotlib.figure import Figure


MAX_NAMES = 40  # more do not fit beside the rows


def draw_confusion_matrix(matrix: np.ndarray, class_names: list[str]) -> Figure:
    """
    A confusion matrix as a picture: the share of the images of a class, the row, by what they were taken for.

    Args:
        matrix (`np.ndarray`): counts (classes, classes), of [`~crossvit.metrics.confusion_matrix`].
        class_names (`list[str]`): of the rows and columns.
    """
    classes = len(class_names)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(4 + 0.35 * classes, 16)
    figure = Figure(figsize=(side + 1.2, side), dpi=120, layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    if classes <= MAX_NAMES:
        names = [name.split(",")[0][:24] for name in class_names]
        axis.set_xticks(range(classes), names, rotation=90, parse_math=False)
        axis.set_yticks(range(classes), names, parse_math=False)
        for row, column in zip(*np.nonzero(matrix)):
            color = "black" if shares[row, column] > 0.5 else "white"
            axis.text(column, row, str(matrix[row, column]), ha="center", va="center", color=color, fontsize=9)
    what = "class" if classes <= MAX_NAMES else "class (its index)"
    size = 8 + side / 2  # of letters, in points
    axis.set_xlabel(f"predicted {what}", fontsize=size)
    axis.set_ylabel(what, fontsize=size)
    axis.set_title(f"{np.trace(matrix):,} of {matrix.sum():,} images are right", fontsize=size)
    figure.colorbar(image, ax=axis, shrink=0.8).set_label("share of the images of the class", fontsize=size)
    return figure


__all__ = ["draw_confusion_matrix"]
