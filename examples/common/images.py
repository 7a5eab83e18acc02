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
"""Finds and opens image files: only formats of photos, upright and in RGB, with errors that name the file."""

import glob
import io
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import PIL.Image
import PIL.ImageOps

from .errors import CommandError, one_line


# Formats of photos. Pillow opens files of others too, whatever their names: for EPS it starts Ghostscript
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "JPEG2000", "TIFF", "BMP", "GIF", "PPM")


def image_formats() -> list[str]:
    """Those of `IMAGE_FORMATS` that the installed Pillow has."""
    PIL.Image.init()
    return [name for name in IMAGE_FORMATS if name in PIL.Image.OPEN]


def image_suffixes() -> set[str]:
    """The suffixes of the [`image_formats`], in lower case."""
    formats = image_formats()
    return {suffix for suffix, name in PIL.Image.registered_extensions().items() if name in formats}


def find_images(folder: Path, suffixes: Collection[str] | None = None) -> list[Path]:
    """
    The image files in a folder and its subfolders, in order; hidden ones are left out. They have the
    [`image_suffixes`] or, in lower case, the given ones.
    """
    suffixes = image_suffixes() if suffixes is None else suffixes
    found = []
    for path, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__")) and not is_ancestor(path, name)]
        files = (Path(path, name) for name in names if not name.startswith("."))
        found += [file for file in files if file.suffix.lower() in suffixes and file.is_file()]
    return sorted(found)


def find_files(source: str, suffixes: Collection[str]) -> list[str]:
    """The absolute paths or URLs of the files with these suffixes in a folder, glob or URL of `fsspec`, in order."""
    if os.path.isdir(source):
        return [str(path.absolute()) for path in find_images(Path(source), suffixes)]
    system, pattern = fsspec.core.url_to_fs(source)
    found = system.glob(pattern) if glob.has_magic(pattern) else system.find(pattern)
    paths = (system.unstrip_protocol(path).removeprefix("file://") for path in found)
    return sorted(path for path in paths if os.path.splitext(path)[1].lower() in suffixes)


def is_ancestor(folder: str, name: str) -> bool:
    """Whether a folder in another one is a link that leads back to that one or to a folder that contains it."""
    return Path(folder).resolve().is_relative_to(Path(folder, name).resolve())


def open_image(file: str | Path | BinaryIO, name: str | None = None, mode: str | None = "RGB") -> PIL.Image.Image:
    """
    Decodes an image file of the [`image_formats`], and rotates the image as its EXIF orientation says.

    Args:
        file (`str`, `Path` or `BinaryIO`): a path or an open file.
        name (`str`, *optional*): of the file in errors; default: the path.
        mode (`str`, *optional*, defaults to `"RGB"`): Pillow's mode of the image; `None` for that of the file.

    Raises:
        `CommandError`: names a file that is not such an image, or has more than 8 bits per channel.
    """
    from crossvit.image_processing_pil_crossvit import check_bit_depth  # takes seconds the first time

    formats = image_formats()
    if isinstance(file, (str, Path)) and os.path.exists(file) and not os.path.isfile(file):
        raise CommandError(f"{name or file}: not a file")  # reading a named pipe would wait for ever
    try:
        with PIL.Image.open(file, formats=formats) as image:
            check_bit_depth(image)
            image.load()
            # In place, since otherwise it copies upright images too
            PIL.ImageOps.exif_transpose(image, in_place=True)
            return image if mode in (None, image.mode) else image.convert(mode)
    except PIL.UnidentifiedImageError as error:
        raise CommandError(f"{name or file}: not an image of the formats {', '.join(formats)}") from error
    except Exception as error:  # of many types, by format
        raise CommandError(f"{name or file}: cannot be read as an image ({one_line(error)})") from error


def decode_image(image: dict[str, Any] | None, mode: str | None = "RGB") -> PIL.Image.Image:
    """
    As [`open_image`], of an image in a row of `datasets` that is not decoded: the "bytes" of a file, or else its
    "path", which may be a URL of `fsspec`, such as that of a file on the Hub or in an archive.
    """
    content, path = (image["bytes"], image["path"]) if image else (None, None)
    if content is None and path is None:
        raise CommandError("an image is missing")
    if content is None and "://" in path:
        try:
            with fsspec.open(path, "rb") as file:
                content = file.read()
        except Exception as error:  # of many types, by filesystem
            raise CommandError(f"{path}: cannot be read ({one_line(error)})") from error
    return open_image(path if content is None else io.BytesIO(content), path or "an image", mode)


class DecodedImages:
    """
    A [`~crossvit.training.augmentation.TrainingTransform`] or another one, for rows of `datasets` whose images are not
    decoded: [`decode_image`] decodes each when the transform comes to it.
    """

    def __init__(self, transform: Any):
        self.transform = transform
        self.columns = [column for column in (*transform.image_columns, transform.mask_column) if column]

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        return self.transform({**rows, **{column: map(decode_image, rows[column]) for column in self.columns}})
