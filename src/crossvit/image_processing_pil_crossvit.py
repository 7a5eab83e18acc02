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
"""Image processor class for CrossViT, PIL backend: equal to timm's evaluation transform."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    get_image_size_for_max_height_width,
    is_valid_image,
)

from .remote_code import RemoteCodeMixin
from .timm_checkpoints import is_timm_config, read_image_processor_config


def get_output_size(height: int, width: int, size: Any) -> tuple[int, int]:
    """The (height, width) of an image of `height` x `width` pixels after resizing to `size`."""
    if size.shortest_edge and size.longest_edge:
        return get_size_with_aspect_ratio((height, width), size.shortest_edge, size.longest_edge)
    if size.shortest_edge:
        shorter = min(height, width)
        return int(size.shortest_edge * height / shorter), int(size.shortest_edge * width / shorter)
    if size.max_height and size.max_width:
        return get_image_size_for_max_height_width((height, width), size.max_height, size.max_width)
    return size.height, size.width


def get_crop_offset(side: int, cropped_side: int) -> int:
    """
    The pixels before a center crop, or minus those of padding. As in torchvision, half of an odd margin is rounded to
    an even number, and half of an odd padding is rounded down; the stock processor differs by one pixel in both.
    """
    return round((side - cropped_side) / 2) if side >= cropped_side else -((cropped_side - side) // 2)


class CrossViTBaseImageProcessor(RemoteCodeMixin, BaseImageProcessor):
    """
    What both backends share: the defaults, how images are read, and timm's configurations. The defaults are those of
    the checkpoints for 240 pixels; the ones for 408 pixels have `size={"shortest_edge": 408}` and
    `crop_size={"height": 408, "width": 408}`.
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
    resize: Any  # of the backend

    def get_resized_size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) of an image of `height` x `width` pixels after resizing, before the crop."""
        return get_output_size(height, width, self.size) if self.do_resize else (height, width)

    def get_crop_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """
        The (top, left, height, width) of what `pixel_values` show of an image of `height` x `width` pixels, in its own
        pixels. The origin is negative where the image is padded.
        """
        resized, crop_size = self.get_resized_size(height, width), self.crop_size
        cropped = (crop_size["height"], crop_size["width"]) if self.do_center_crop else resized
        scales = height / resized[0], width / resized[1]
        top, left = (get_crop_offset(*sides) * scale for *sides, scale in zip(resized, cropped, scales))
        return top, left, cropped[0] * scales[0], cropped[1] * scales[1]

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """
        Opens paths, URLs and base64 strings with PIL in both backends: torchvision's decoder reads neither BMP nor
        TIFF files.

        Raises:
            `ValueError`: for images and arrays with anything but 8 bits or floats per channel, which PIL would clip.
                (Images from URLs and base64 strings are RGB already: Transformers converts them.)
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(entry) for entry in image_url_or_urls]
        image = image_url_or_urls
        if isinstance(image, str) and os.path.isfile(image):
            with PIL.Image.open(image) as opened:
                check_bit_depth(opened)
        elif is_valid_image(image):
            check_bit_depth(image)
        return BaseImageProcessor.fetch_images(self, image)

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs,
    ) -> Any:
        """
        Converts one image to channels-first format. RGB is what `image.convert("RGB")` makes of it, as in timm's data
        loader: alpha is dropped rather than blended onto white. Arrays follow the same rule: 1 channel is gray, 4 are
        RGBA. Without `do_convert_rgb`, arrays have a channel for each value of `image_mean`, and if it has one value,
        images are converted to gray by `image.convert("L")`, as timm does for `in_chans=1`.

        Raises:
            `ValueError`: if an array has another number of channels.
        """
        if isinstance(image, PIL.Image.Image):
            image = np.atleast_3d(np.array(convert_mode(image, do_convert_rgb, self.image_mean)))
            input_data_format = ChannelDimension.LAST
        elif image.ndim == 3 and (do_convert_rgb or input_data_format is None):
            accepted = (1, 3, 4) if do_convert_rgb else (np.size(self.image_mean),)
            input_data_format = find_channels(image.shape, accepted, input_data_format)
        image = super().process_image(image, do_convert_rgb=False, input_data_format=input_data_format, **kwargs)
        if do_convert_rgb:
            image = image[[0, 0, 0]] if image.shape[0] == 1 else image[:3]
        return image

    def _preprocess(
        self,
        images: list[Any],
        do_rescale: bool,
        do_normalize: bool,
        image_mean: Any,
        images_per_entry: int = 1,
        **kwargs,
    ) -> BatchFeature:
        """
        As in every image processor. `images_per_entry` is the number of branches if each has its own image.

        Raises:
            `ValueError`: if there are more or fewer channels than means, or floats are neither in [0, 1] nor in
                [0, 255].
        """
        for image in images:
            check_range(image, do_rescale)
            channels = 3 if isinstance(image, PIL.Image.Image) else image.shape[0]
            if do_normalize and np.size(image_mean) not in (1, channels):
                raise ValueError(
                    f"`image_mean` and `image_std` have {np.size(image_mean)} values, and an image has {channels}"
                    " channels: give a value for each channel."
                )
        if images_per_entry > 1:
            entries = [images[start : start + images_per_entry] for start in range(0, len(images), images_per_entry)]
            images = [image for entry in entries for image in self.match_first(entry)]
        return super()._preprocess(
            images, do_rescale=do_rescale, do_normalize=do_normalize, image_mean=image_mean, **kwargs
        )

    def match_first(self, images: list[Any]) -> list[Any]:
        """
        The images of all branches (channels, height, width), in the size of the first. Every crop of them, in training
        and in evaluation, then shows the same part of each.
        """
        first, *others = images
        height, width = get_size(first)
        size = SizeDict(height=height, width=width)
        resized = [
            image if get_size(image) == (height, width) else self.resize(image, size, resample=self.resample)
            for image in others
        ]
        return [first, *resized]

    def _preprocess_image_like_inputs(self, images: Any, *args, **kwargs) -> BatchFeature:
        """
        As in every image processor. In tuples of images, one for each branch, the later images take the size of the
        first, so that all are cropped alike; the result is stacked.

        Raises:
            `ValueError`: if the tuples are empty, differ in length or contain anything but single images.
        """
        if not isinstance(images, (list, tuple)) or not any(isinstance(entry, (list, tuple)) for entry in images):
            return super()._preprocess_image_like_inputs(images, *args, **kwargs)

        lengths = dict.fromkeys(len(entry) if isinstance(entry, (list, tuple)) else None for entry in images)
        if len(lengths) > 1 or 0 in lengths:
            received = ", ".join("a single image" if length is None else f"a tuple of {length}" for length in lengths)
            raise ValueError(
                "`images` must be a list of images, or a list of tuples of images that all have one image for each"
                f" branch, got {received}."
            )
        flat_images = [image for entry in images for image in entry]
        return_tensors = kwargs.pop("return_tensors", None)
        array_type = "np" if isinstance(self, PilBackend) else "pt"
        kwargs |= {"return_tensors": array_type, "images_per_entry": len(images[0])}
        batch = super()._preprocess_image_like_inputs(flat_images, *args, **kwargs)
        pixel_values = batch["pixel_values"]
        if len(pixel_values) != len(flat_images):
            raise ValueError("The tuples of `images` must contain single images, got batches of images.")
        # (batch * branches, channels, height, width) -> (batch, branches, channels, height, width)
        pixel_values = pixel_values.reshape(len(images), -1, *pixel_values.shape[1:])
        batch["pixel_values"] = pixel_values if return_tensors else list(pixel_values)
        return batch.convert_to_tensors(return_tensors)

    @classmethod
    def get_image_processor_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in every image processor, and from the config.json of a timm checkpoint, which has no other file."""
        try:
            config, kwargs = super().get_image_processor_dict(*args, **kwargs)
        except OSError as error:
            config, kwargs = super().get_image_processor_dict(
                *args, **{**kwargs, "image_processor_filename": "config.json"}
            )
            if not is_timm_config(config):
                raise error
        return (read_image_processor_config(config) if is_timm_config(config) else config), kwargs


def check_bit_depth(image: Any) -> None:
    """A `ValueError` refuses an image of PIL, NumPy or PyTorch whose channels are neither bytes nor floats."""
    if isinstance(image, PIL.Image.Image):
        is_wrong, kind = image.mode.startswith(("I", "F")), f"mode {image.mode}"
    else:
        kind = str(image.dtype).removeprefix("torch.")
        is_wrong = "float" not in kind and kind != "uint8"
    if is_wrong:
        raise ValueError(
            f"An image has {kind} instead of 8 bits per channel. Scale the values that matter to bytes first:"
            " `np.uint8(255 * np.clip((np.float32(image) - low) / (high - low), 0, 1))`."
        )


def check_range(image: Any, do_rescale: bool) -> None:
    """A `ValueError` refuses floats that are not an image, or that rescaling would make black."""
    if isinstance(image, PIL.Image.Image) or "float" not in str(image.dtype):
        return
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 255):  # NaN, too
        raise ValueError(
            "The floats of an image must be in [0, 1] with `do_rescale=False`, or in [0, 255], got"
            f" [{low:g}, {high:g}]: scale and clip those that matter, `np.clip((image - low) / (high - low), 0, 1)`."
        )
    if do_rescale and 0 < high <= 1:
        raise ValueError(
            f"The floats of an image are in [{low:g}, {high:g}], which `do_rescale` would divide by 255: pass"
            " `do_rescale=False`."
        )


def convert_mode(image: PIL.Image.Image, do_convert_rgb: bool | None, image_mean: Any) -> PIL.Image.Image:
    """The image in RGB, in gray if there is one mean, or as it is."""
    mode = "RGB" if do_convert_rgb else "L" if np.size(image_mean) == 1 else image.mode
    return image if image.mode == mode else image.convert(mode)


def find_channels(
    shape: Sequence[int], accepted: tuple[int, ...], input_data_format: str | ChannelDimension | None
) -> ChannelDimension:
    """Where an array of that shape has one of the accepted numbers of channels; `ValueError` if nowhere."""
    for data_format, channels in ((ChannelDimension.FIRST, shape[0]), (ChannelDimension.LAST, shape[-1])):
        if channels in accepted and input_data_format in (None, data_format):
            return data_format
    numbers = "1 (gray), 3 (RGB) or 4 (RGBA)" if len(accepted) > 1 else accepted[0]
    raise ValueError(
        f"An image must have {numbers} channels, first or last, got an array of shape"
        f" {tuple(shape)}. Others need `do_convert_rgb=False` and a value for each channel in `image_mean` and"
        " `image_std`."
    )


def get_size(image: Any) -> tuple[int, int]:
    """The (height, width) of an image of PIL or of an array (channels, height, width)."""
    return image.size[::-1] if isinstance(image, PIL.Image.Image) else tuple(image.shape[-2:])


def to_array(image: Any) -> np.ndarray:
    """(channels, height, width) of an RGB image of PIL; arrays are returned as they are."""
    return np.moveaxis(np.array(image), -1, 0) if isinstance(image, PIL.Image.Image) else image


class CrossViTImageProcessorPil(CrossViTBaseImageProcessor, PilBackend):
    """
    Image processor of CrossViT on PIL and NumPy. Its `pixel_values` of shape (batch, 3, height, width) equal those of
    timm's evaluation transform: the shortest edge is resized to 274 pixels (bicubic), the central 240x240 pixels are
    cropped, bytes are rescaled to [0, 1] and normalized with the mean and standard deviation of ImageNet. It has the
    options of every image processor (see `ImagesKwargs`); sizes are in pixels. A list of tuples of images, one for
    each branch, becomes `pixel_values` of shape (batch, branches, 3, height, width).
    """

    def process_image(self, image: Any, do_convert_rgb: bool | None = None, **kwargs) -> Any:
        """As in the base class, but PIL images are not turned into arrays yet, since PIL resizes them."""
        if do_convert_rgb and isinstance(image, PIL.Image.Image):
            return convert_mode(image, do_convert_rgb, self.image_mean)
        return super().process_image(image, do_convert_rgb, **kwargs)

    def _preprocess(self, images: list[Any], do_resize: bool, **kwargs) -> BatchFeature:
        if not do_resize:
            images = [to_array(image) for image in images]
        return super()._preprocess(images, do_resize=do_resize, **kwargs)

    def resize(self, image: Any, size: SizeDict, **kwargs) -> np.ndarray:
        """
        Resizes a PIL image or an array (channels, height, width) to (channels, size.height, size.width), or its
        shorter edge to `size.shortest_edge` pixels and the longer one in proportion, rounded down.
        """
        height, width = get_output_size(*get_size(image), size)
        resize: Any = super().resize
        options = {"size": SizeDict(height=height, width=width), **kwargs}
        if isinstance(image, PIL.Image.Image):
            return resize(image, **options)
        # Each channel by itself: PIL has neither colors in floats nor other numbers of channels
        channels = image if image.dtype == np.uint8 else image.astype(np.float32)
        return np.concatenate([resize(PIL.Image.fromarray(channel), **options) for channel in channels])

    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs) -> np.ndarray:
        """
        Crops (channels, height, width) to its central (channels, size.height, size.width) and pads smaller images with
        zeros, as `get_crop_offset` says.
        """
        top = max(0, get_crop_offset(image.shape[-2], size.height))
        left = max(0, get_crop_offset(image.shape[-1], size.width))
        image = image[..., top : top + size.height, left : left + size.width]
        pad_height, pad_width = size.height - image.shape[-2], size.width - image.shape[-1]
        if pad_height == pad_width == 0:
            return np.ascontiguousarray(image)  # which is rescaled and normalized faster than interleaved channels
        padding = [(pad_height // 2, (pad_height + 1) // 2), (pad_width // 2, (pad_width + 1) // 2)]
        return np.pad(image, [(0, 0), *padding])


__all__ = ["CrossViTImageProcessorPil"]
