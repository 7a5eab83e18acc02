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
"""Image processor class for CrossViT, torchvision backend: timm's evaluation transform on tensors, on any device."""

import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import SizeDict
from transformers.utils import is_torchvision_available, requires_backends

# Remote code finds both classes in this file
from .image_processing_pil_crossvit import CrossViTBaseImageProcessor, CrossViTImageProcessorPil  # noqa: F401


if is_torchvision_available():
    from torchvision.transforms.v2 import functional as tvF


class CrossViTImageProcessor(CrossViTBaseImageProcessor, TorchvisionBackend):  # type: ignore[misc]
    """
    Image processor of CrossViT on torchvision. Options, defaults and geometry are those of
    [`CrossViTImageProcessorPil`]; only the bicubic filter rounds differently. For bytes on the CPU it is off by 2 of
    255 at most, 0.036 in `pixel_values`, and mostly not at all. For floats and on a GPU torchvision filters in float32
    and does not clip between rows and columns as PIL does, so that hard edges differ by more: use the PIL
    backend to reproduce published accuracy exactly.

    Raises:
        `ImportError`: if torchvision is not installed. [`AutoImageProcessor`] chooses the PIL backend then.
    """

    def __init__(self, **kwargs):
        requires_backends(self, "torchvision")
        super().__init__(**kwargs)

    def center_crop(self, image: torch.Tensor, size: SizeDict, **kwargs) -> torch.Tensor:
        """
        Crops (batch, channels, height, width) to its central (batch, channels, size.height, size.width) and pads
        smaller images with zeros. Half of an odd margin is rounded to an even number of pixels, as in torchvision and
        timm; the stock processor rounds it down.
        """
        return tvF.center_crop(image, [size.height, size.width])


__all__ = ["CrossViTImageProcessor"]
