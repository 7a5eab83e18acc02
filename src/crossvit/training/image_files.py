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
"""Rows of image data sets: encoded images, which are read and decoded here, and labels."""

import io
from typing import Any

import fsspec
import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from .errors import ImageDatasetError


def read_bytes(image: dict[str, Any]) -> bytes:
    """The encoded image, from a row or from where its path points, on this machine or elsewhere."""
    if image is None:
        raise ImageDatasetError("a row without an image")
    if image["bytes"] is not None:
        return image["bytes"]
    try:
        with fsspec.open(image["path"], "rb") if "://" in image["path"] else open(image["path"], "rb") as file:
            return file.read()
    except OSError as error:
        raise ImageDatasetError(f"{image['path']}: {error.strerror or error}") from error


def read_image(image: dict[str, Any], content: bytes | None = None) -> PIL.Image.Image:
    """
    Decodes an image, upright and in RGB.

    Raises:
        `ImageDatasetError`: if it is no image, damaged or too large to be one.
    """
    try:
        with PIL.Image.open(io.BytesIO(read_bytes(image) if content is None else content)) as file:
            if file.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits per channel, which would be cut off; convert it to 8 bits")
            # Looked up first, since turning an image writes its EXIF anew, which fails where that is damaged
            if file.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:
                return PIL.ImageOps.exif_transpose(file).convert("RGB")
            return file.convert("RGB")
    except ImageDatasetError:
        raise
    except Exception as error:  # formats raise errors of many types
        reason = "not an image" if isinstance(error, PIL.UnidentifiedImageError) else error
        raise ImageDatasetError(f"{(image or {}).get('path') or 'an image without a name'}: {reason}") from error


def labels_fit(label: Any, num_classes: int) -> bool:
    return all(isinstance(index, int) and 0 <= index < num_classes for index in np.atleast_1d(label).tolist())


def check_labels(label: Any, num_classes: int, name: str) -> None:
    if not labels_fit(label, num_classes):
        raise ImageDatasetError(f"{name}: label {label} is outside the range of {num_classes} classes")


def name_of(row: dict[str, Any], otherwise: str) -> str:
    return (row["image"] or {}).get("path") or otherwise


__all__ = ["read_image"]
