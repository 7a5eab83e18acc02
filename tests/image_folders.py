"""Small images, folders of them and datasets."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image


CLASSES = ["ant", "bee", "cow"]


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


def write_rows(folder: Path, files: dict[str, bytes], rows: list[dict[str, Any]]) -> Path:
    """Writes files, and the metadata that describe them; returns the folder."""
    return write_files(folder, {**files, "metadata.jsonl": "\n".join(map(json.dumps, rows)).encode()})


def write_shard(path: Path, files: dict[str, bytes]) -> Path:
    """Writes a WebDataset shard, a tar file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path


def samples(labels: Iterable[Any], suffix: str = "cls", first: int = 0) -> dict[str, bytes]:
    """The files of a WebDataset shard: `000.png`, `000.cls`, and so on, every image in a different color."""
    files = {}
    for number, label in enumerate(labels, first):
        files[f"{number:03}.png"] = image_bytes((0, 0, number))
        files[f"{number:03}.{suffix}"] = str(label).encode()
    return files


def write_images(
    folder: Path, splits: Iterable[str] = (".",), classes: Iterable[str] = CLASSES, images: int = 4
) -> Path:
    """Writes `split/class/0.png` and so on, every image in a different color."""
    return write_files(
        folder,
        {
            f"{split}/{name}/{number}.png": image_bytes((50 * label, number, 100 * part))
            for part, split in enumerate(splits)
            for label, name in enumerate(classes)
            for number in range(images)
        },
    )


def write_zoo(root: Path, images: int = 8, splits: Iterable[str] = ("train",)) -> Path:
    """A folder of images whose class is their brightest channel."""
    generator = np.random.default_rng(0)
    for split in splits:
        for channel, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(images):
                pixels = generator.integers(0, 160, (40, 44, 3))
                pixels[..., channel] += 95
                PIL.Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{number}.png")
    return root


def image_rows(labels: list[Any], feature: Any = None) -> datasets.Dataset:
    """Rows of "image" and "label", in memory; by default `labels` are indices of `CLASSES`."""
    images = [{"bytes": image_bytes((0, 0, row)), "path": f"{row}.png"} for row in range(len(labels))]
    feature = feature or datasets.ClassLabel(names=CLASSES)
    return datasets.Dataset.from_dict(
        {"image": images, "label": labels}, datasets.Features({"image": datasets.Image(), "label": feature})
    )


def write_pairs(folder: Path, splits: dict[str, int]) -> Path:
    """
    Writes pairs of noisy images, "photo" and "scan", either of which is light or dark, and the metadata of each split
    with the number of its pairs. Their class, "same" or "different", shows only in both of them together.
    """
    generator = np.random.default_rng(0)
    for split, count in splits.items():
        files, rows = {}, []
        for number in range(count):
            row = {"label": ("same", "different")[number % 2 ^ number // 2 % 2]}
            for column, light in (("photo", number % 2), ("scan", number // 2 % 2)):
                pixels = generator.integers(0, 156, (36, 36, 3)) + 100 * light
                row[f"{column}_file_name"] = f"{column}s/{number}.png"
                files[row[f"{column}_file_name"]] = encoded(PIL.Image.fromarray(pixels.astype(np.uint8)))
            rows.append(row)
        write_rows(folder / split, files, rows)
    return folder
