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
"""The native image sizes of a model and of its image processor, changed together."""

from typing import Any

from ..configuration_crossvit import CrossViTConfig
from ..image_processing_crossvit import CrossViTImageProcessor


PAPER_EDGE, PAPER_CROP = 8, 7  # the evaluation of the paper crops 240 of 274 pixels


def make_image_processor(config: CrossViTConfig) -> CrossViTImageProcessor:
    """An image processor for a model that has none yet."""
    processor = CrossViTImageProcessor()
    set_processor_size(processor, config.image_sizes[0], (PAPER_EDGE, PAPER_CROP))
    return processor


def set_processor_size(processor: Any, image_size: tuple[int, int], share: tuple[int, int] | None) -> None:
    """
    Sets the size of the images that a processor makes. Square ones are cropped to a share of their resized shortest
    edge, the second number of `share` of the first; without it, images are resized without a crop.
    """
    height, width = image_size
    processor.do_resize = processor.do_center_crop = True
    processor.crop_size = {"height": height, "width": width}
    # A center crop to a rectangle would cut off much of most images
    processor.size = dict(processor.crop_size)
    if share and height == width:
        processor.size = {"shortest_edge": height * share[0] // share[1]}


def set_image_size(model: Any, processor: Any, height: int, width: int) -> None:
    """
    Changes the native image size of a model and of its image processor. The first branch takes images of `height` and
    `width` pixels; the others keep their ratio to it, rounded to whole patches.

    The center crop of square images keeps its share of the image. Other images are resized without a crop, and so are
    all images if the processor did that before.

    Args:
        model ([`CrossViTForImageClassification`]): its position embeddings are interpolated.
        processor ([`CrossViTImageProcessor`]): of the model.

    Raises:
        `ValueError`: for a size that the model cannot take.
    """
    if height < 1 or width < 1:
        raise ValueError(f"The image size must be positive, got {height}x{width}.")
    sizes = tuple(embeddings.get_image_size(height, width, True) for embeddings in model.branch_embeddings)
    model.resize_position_embeddings(sizes)
    share = None
    if edge := processor.size.get("shortest_edge"):
        share = (edge, processor.crop_size["height"]) if processor.do_center_crop else (1, 1)
    set_processor_size(processor, sizes[0], share)


__all__ = ["make_image_processor", "set_image_size"]
