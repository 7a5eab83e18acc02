"""Small images, folders of them and data sets: every image has one color, which tells it from all others."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import PIL.Image


CLASSES = ("ant", "bee", "cow")


def color_of(label: int, number: int, split: int = 0) -> tuple[int, int, int]:
    return 50 * label, number, 100 * split


def image_bytes(
    color: Any = (200, 100, 50), size: tuple[int, int] = (8, 8), mode: str = "RGB", format: str = "PNG", **options
) -> bytes:
    return encoded(PIL.Image.new(mode, size, color), format, **options)


def encoded(image: PIL.Image.Image, format: str = "PNG", **options) -> bytes:
    content = io.BytesIO()
    image.save(content, format, **options)
    return content.getvalue()


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    """Writes files by their paths in a folder; returns the folder."""
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return Path(folder)


def write_images(
    folder: Path,
    splits: Iterable[str] = (".",),
    classes: Iterable[str] = CLASSES,
    images: int = 4,
    size: tuple[int, int] = (8, 8),
) -> Path:
    """Writes `split/class/0.png` and so on."""
    return write_files(
        folder,
        {
            f"{split}/{name}/{number}.png": image_bytes(color_of(label, number, part), size)
            for part, split in enumerate(splits)
            for label, name in enumerate(classes)
            for number in range(images)
        },
    )


def image_rows(labels: list[Any], feature: Any = None, images: list[Any] | None = None) -> datasets.Dataset:
    """Rows of "image" and "label", in memory; by default `labels` are indices of `CLASSES`."""
    feature = feature or datasets.ClassLabel(names=list(CLASSES))
    images = images or [
        {"bytes": image_bytes((0, number // 256, number % 256)), "path": f"{number}.png"}
        for number in range(len(labels))
    ]
    return datasets.Dataset.from_dict(
        {"image": images, "label": labels}, datasets.Features({"image": datasets.Image(), "label": feature})
    )


def labelled_rows(images: int = 4, split: int = 0) -> datasets.Dataset:
    """The rows of a folder that `write_images` writes."""
    draws = [(label, number) for label in range(len(CLASSES)) for number in range(images)]
    contents = [{"bytes": image_bytes(color_of(*draw, split)), "path": None} for draw in draws]
    return image_rows([label for label, _ in draws], images=contents)


def save_splits(folder: Path, **splits: datasets.Dataset) -> Path:
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


def save_parquet(folder: Path, **splits: datasets.Dataset) -> Path:
    folder.mkdir()
    for name, split in splits.items():
        split.to_parquet(folder / f"{name}.parquet")
    return folder
