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
"""Image processor class for CrossViT, PIL backend: bitwise equal to timm's evaluation transform."""

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
    is_valid_image,
)

from .timm_checkpoints import is_timm_config, read_image_processor_config


if TYPE_CHECKING:
    # A checkpoint with its own code carries the files that relative imports name: with this line, both backends.
    from .image_processing_crossvit import CrossViTImageProcessor  # noqa: F401


# Where `AutoImageProcessor` finds the class of each backend in a checkpoint with its own code.
REMOTE_CODE_CLASSES = {
    "torchvision": "image_processing_crossvit.CrossViTImageProcessor",
    "pil": "image_processing_pil_crossvit.CrossViTImageProcessorPil",
}


class CrossViTBaseImageProcessor(BaseImageProcessor):
    """
    What both backends share: the defaults (those of the checkpoints at 240 pixels; the ones at 408 pixels carry
    `size={"shortest_edge": 408}` and `crop_size={"height": 408, "width": 408}`), the reading of the input, and the
    names under which remote code is found.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 274}
    default_to_square = False
    crop_size = {"height": 240, "width": 240}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def _validate_preprocess_kwargs(self, **kwargs) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        if kwargs["do_normalize"] and not np.all(kwargs["image_std"]):
            raise ValueError(f"`image_std` divides the pixels and must not hold 0, got {kwargs['image_std']}.")
        if kwargs["do_center_crop"] and not (kwargs["crop_size"].height and kwargs["crop_size"].width):
            raise ValueError(f"`crop_size` must give a 'height' and a 'width', got {dict(kwargs['crop_size'])}.")

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """
        Opens paths, URLs and base64 strings, alone or in lists, with `load_image`, hence turned upright by their EXIF
        orientation; returns images as they are. Both backends read files with PIL: torchvision's decoder knows neither
        BMP nor TIFF, and returns 16-bit images unscaled.

        Raises:
            OSError: a file that PIL cannot read.
            TypeError: an entry that is neither an image nor a string.
            ValueError: a string that names no image, or an array without 3 (one image) or 4 (a batch) dimensions.
        """
        if isinstance(image_url_or_urls, str):
            try:
                return BaseImageProcessor.fetch_images(self, image_url_or_urls)
            except (OSError, SyntaxError) as error:  # PIL's for a broken file, which it does not name
                raise OSError(f"Cannot read an image from {image_url_or_urls!r}: {error}") from error
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(entry) for entry in image_url_or_urls]
        if not is_valid_image(image_url_or_urls):
            raise TypeError(
                "An image is a PIL image, a NumPy array, a PyTorch tensor, or a string with a path, a URL or base64 "
                f"data, got {image_url_or_urls!r}."
            )
        if getattr(image_url_or_urls, "ndim", 3) not in (3, 4):
            raise ValueError(
                "An image is (channels, height, width) or (height, width, channels), a batch has one more dimension "
                f"in front, got an array of shape {tuple(image_url_or_urls.shape)}."
            )
        return image_url_or_urls

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs,
    ) -> Any:
        """
        Brings one image into the layout (channels, height, width). The conversion to RGB is `image.convert("RGB")`,
        as in timm's data loader: alpha is dropped, not blended onto white. Arrays follow the same rule: 1 channel is
        grey, 4 are RGBA.

        Raises:
            ValueError: an array to convert that has not 1, 3 or 4 channels, or an image without pixels.
        """
        if do_convert_rgb:
            if isinstance(image, PIL.Image.Image):
                image, input_data_format = np.array(image.convert("RGB")), ChannelDimension.LAST
            elif input_data_format is None and {1, 3, 4} & {image.shape[0], image.shape[-1]}:
                input_data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
            if image.shape[-1 if input_data_format == ChannelDimension.LAST else 0] not in (1, 3, 4):
                raise ValueError(
                    "An image has 1 (grey), 3 (RGB) or 4 (RGBA) channels as its first or last dimension, "
                    f"got an array of shape {tuple(image.shape)}."
                )
        image = super().process_image(image, do_convert_rgb=False, input_data_format=input_data_format, **kwargs)

        if 0 in image.shape:
            raise ValueError(f"An image needs at least one pixel, got (channels, height, width) {tuple(image.shape)}.")
        if do_convert_rgb:
            image = image[[0, 0, 0]] if image.shape[0] == 1 else image[:3]
        return image

    @classmethod
    def get_image_processor_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As every image processor, also from the config.json of a timm checkpoint, which has no file of its own."""
        try:
            config, kwargs = super().get_image_processor_dict(*args, **kwargs)
        except OSError as error:
            config, kwargs = super().get_image_processor_dict(
                *args, **{**kwargs, "image_processor_filename": "config.json"}
            )
            if not is_timm_config(config):
                raise error
        return (read_image_processor_config(config) if is_timm_config(config) else config), kwargs

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """As every image processor; a checkpoint that carries its code keeps it."""
        # Saving replaces the names of both classes by that of one
        code = getattr(self, "auto_map", {}).get("AutoImageProcessor")
        if self._auto_class is not None or code not in (REMOTE_CODE_CLASSES, *REMOTE_CODE_CLASSES.values()):
            return super().save_pretrained(save_directory, **kwargs)
        # For this once, as the classes of that code have it
        self._auto_class = "AutoImageProcessor"  # type: ignore[assignment]
        try:
            return super().save_pretrained(save_directory, **kwargs)
        finally:
            del self._auto_class

    def to_dict(self) -> dict[str, Any]:
        """Serialises the options. Remote code names the classes of both backends, not that of the saved one alone."""
        processor_dict = super().to_dict()
        processor_dict.pop("_auto_class", None)
        auto_map = processor_dict.get("auto_map", {})
        if auto_map.get("AutoImageProcessor") in REMOTE_CODE_CLASSES.values():
            auto_map["AutoImageProcessor"] = dict(REMOTE_CODE_CLASSES)
        return processor_dict


class CrossViTImageProcessorPil(CrossViTBaseImageProcessor, PilBackend):
    """
    Image processor of CrossViT on PIL and NumPy. Its `pixel_values` (batch, 3, height, width) equal those of timm's
    evaluation transform bit by bit: the shortest edge is resized to 274 pixels (bicubic), the centre of 240x240 pixels
    is cut out, bytes are scaled to [0, 1] and normalised with the mean and standard deviation of ImageNet. The options
    are those of every image processor (see `ImagesKwargs`), sizes are in pixels.
    """

    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs) -> np.ndarray:
        """
        Cuts the centre (channels, size.height, size.width) out of (channels, height, width), padding a smaller image
        with zeros. As in torchvision, half of an odd margin is rounded to an even number of pixels, and half of an odd
        padding is rounded down; the stock processor differs by one pixel in both.
        """
        top = max(0, round((image.shape[-2] - size.height) / 2))
        left = max(0, round((image.shape[-1] - size.width) / 2))
        image = image[..., top : top + size.height, left : left + size.width]
        pad_height, pad_width = size.height - image.shape[-2], size.width - image.shape[-1]
        padding = [(pad_height // 2, (pad_height + 1) // 2), (pad_width // 2, (pad_width + 1) // 2)]
        return np.pad(image, [(0, 0), *padding])


__all__ = ["CrossViTImageProcessorPil"]
