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
"""Opens image files: only formats of photos, upright and in RGB, with errors that name the file."""

import io
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import PIL.Image
import PIL.ImageOps

from .errors import CommandError


# Formats of photos. Pillow opens files of others too, whatever their names: for EPS it starts Ghostscript
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "JPEG2000", "TIFF", "BMP", "GIF", "PPM")


def image_formats() -> list[str]:
    """Those of `IMAGE_FORMATS` that the installed Pillow has."""
    PIL.Image.init()
    return [name for name in IMAGE_FORMATS if name in PIL.Image.OPEN]


def open_image(file: str | Path | BinaryIO, name: str | None = None, mode: str | None = "RGB") -> PIL.Image.Image:
    """
    Decodes an image file of the [`image_formats`], and rotates the image as its EXIF orientation says.

    Args:
        file (`str`, `Path` or `BinaryIO`): a path or an open file.
        name (`str`, *optional*): of the file in errors; default: the path.
        mode (`str`, *optional*, defaults to `"RGB"`): Pillow's mode of the image; `None` for that of the file.

    Raises:
        `CommandError`: names a file that is not such an image.
    """
    formats = image_formats()
    try:
        with PIL.Image.open(file, formats=formats) as image:
            image.load()
            # In place, since otherwise it copies upright images too
            PIL.ImageOps.exif_transpose(image, in_place=True)
            return image if mode in (None, image.mode) else image.convert(mode)
    except PIL.UnidentifiedImageError as error:
        raise CommandError(f"{name or file}: not an image of the formats {', '.join(formats)}") from error
    except Exception as error:  # of many types, by format
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CommandError(f"{name or file}: cannot be read as an image ({reason})") from error


def decode_image(image: dict[str, Any] | None, mode: str | None = "RGB") -> PIL.Image.Image:
    """
    As [`open_image`], of an image in a row of `datasets` that is not decoded: the "bytes" of a file, or else its
    "path", which may be a URL of `fsspec`, such as that of a file on the Hub or in an archive.
    """
    content, path = (image["bytes"], image["path"]) if image else (None, None)
    if content is None and path is None:
        raise CommandError("an image is missing")
    if content is None and "://" in path:
        with fsspec.open(path, "rb") as file:
            content = file.read()
    return open_image(path if content is None else io.BytesIO(content), path or "an image", mode)


__all__ = ["decode_image", "image_formats", "open_image"]
