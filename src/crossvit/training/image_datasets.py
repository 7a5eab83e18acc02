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
"""
Image data sets for training and evaluation: where they are read from, and what is wrong with them.

Images stay encoded until an [`ImageCollator`] needs them, so that a data set on disk and a
stream hold the same rows, and a process decodes its own part of a batch alone.
"""

import contextlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from .errors import ImageDatasetError
from .image_files import check_labels, labels_fit, name_of, read_bytes, read_image


ARCHIVES = (".gz", ".tar", ".tgz", ".zip")
# Other names that data sets give to the split for validation
SPLIT_NAMES = dict.fromkeys(("dev", "eval", "val", "valid"), "validation")


@dataclass
class ImageSource:
    """Where images and labels are read from, as options of a command."""

    data: str = field(
        default="",
        metadata={
            "help": "Folder of images (with a folder per class or metadata.jsonl; in train/, validation/ and test/, if"
            " it has these), folder of `Dataset.save_to_disk`, or data set on the Hub."
        },
    )
    data_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    data_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of it on the Hub."})
    image_column: str | None = field(default=None, metadata={"help": "Default: the one column of images."})
    label_column: str | None = field(default=None, metadata={"help": "Default: the one column of class labels."})
    streaming: bool = field(default=False, metadata={"help": "Read images when they are needed, not beforehand."})


@dataclass
class DataArguments(ImageSource):
    """Images to train with, as options of a command."""

    shuffle_buffer_size: int = field(
        default=10_000, metadata={"help": "Images of a stream among which the next one is drawn."}
    )
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Part of the training images held out where there is no validation split."}
    )
    check_images: bool = field(
        default=True, metadata={"help": "Decode each image before the training to find the damaged ones."}
    )


def load_splits(args: ImageSource) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    """
    Reads the splits of a data set by name, their images encoded in a column "image" and their labels in "labels".

    Raises:
        `ImageDatasetError`: if there is no such data set, or no images or labels are found in it.
    """
    folder = Path(args.data).expanduser()
    splits: Any
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            splits = datasets.load_from_disk(str(folder))
            if isinstance(splits, datasets.Dataset):
                splits = {"train": splits}
            if args.streaming:
                splits = {name: split.to_iterable_dataset() for name, split in splits.items()}
        elif folder.is_dir() and not any(folder.rglob("*.parquet")):
            check_folders(folder)
            splits = datasets.load_dataset("imagefolder", data_dir=str(folder), streaming=args.streaming)
        elif folder.is_file():
            raise ImageDatasetError(f"{args.data}: a file, not a folder of images")
        else:
            splits = datasets.load_dataset(
                args.data, args.data_config, revision=args.data_revision, streaming=args.streaming
            )
    # Of many types: a typo, no network, a broken file
    except Exception as error:
        if isinstance(error, ImageDatasetError):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ImageDatasetError(f"{args.data}: no data set in such a folder or on the Hub ({reason[0]})") from error

    if not splits or any(isinstance(split, datasets.Dataset) and not len(split) for split in splits.values()):
        raise ImageDatasetError(f"{args.data}: a data set, or a split of it, without images")
    splits = {SPLIT_NAMES.get(name, name): split for name, split in splits.items()}
    first = splits.get("train", next(iter(splits.values())))
    features = first.features or first._resolve_features().features
    image_column = args.image_column or only_column(args.data, "image", "image_column", features, is_image)
    label_column = args.label_column or only_column(args.data, "label", "label_column", features, is_label)
    for option, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in features:
            raise ImageDatasetError(f"--{option} {column}: {args.data} has the columns {', '.join(features)}")
    if not is_image(features[image_column]) or image_column == label_column:
        raise ImageDatasetError(f"{args.data}: the column {image_column!r} holds no images, or no labels")
    for name, split in splits.items():
        if split.features and not {image_column, label_column} <= set(split.features):
            raise ImageDatasetError(f"{args.data}: {name!r} lacks the column {image_column!r} or {label_column!r}")
        # First of all, since streams decode images in order to rename their column
        split = split.cast_column(image_column, datasets.Image(decode=False))
        split = split.select_columns([image_column, label_column])
        for column, new_name in ((image_column, "image"), (label_column, "labels")):
            if column != new_name:
                split = split.rename_column(column, new_name)
        splits[name] = split
    return splits


def check_folders(root: Path) -> None:
    """Raises an `ImageDatasetError` for a folder of images without a class in it, or for a class without images."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__")))
        suffixes = {Path(name).suffix.lower() for name in files}
        if not subfolders and suffixes.isdisjoint([*ImageFolder.EXTENSIONS, *ARCHIVES]):
            raise ImageDatasetError(
                f"{folder}: a folder without images; remove it, or put the images of its class in it"
            )


def is_image(feature: Any) -> bool:
    return isinstance(feature, datasets.Image)


def is_label(feature: Any) -> bool:
    return isinstance(getattr(feature, "feature", feature), datasets.ClassLabel)


def only_column(source: str, kind: str, option: str, features: datasets.Features, suits: Any) -> str:
    """The one column that suits, or else the one with the usual name."""
    columns = [name for name, feature in features.items() if suits(feature)]
    columns = columns if len(columns) == 1 else [name for name in (kind, f"{kind}s") if name in features]
    if len(columns) != 1:
        hint = "" if kind == "image" else ", or put the images of each class, two or more, in a folder of its own"
        raise ImageDatasetError(
            f"{source}: which column has the {kind}s? It has {', '.join(features)}; name one with --{option}{hint}"
        )
    return columns[0]


@dataclass
class LabelledImages:
    """
    Images with labels that fit together.

    Args:
        splits (`dict[str, datasets.Dataset | datasets.IterableDataset]`):
            By name, rows of "image" (encoded: `{"bytes": ..., "path": ...}`) and "labels": the index of a class, or
            the list of the indices of several.
        class_names (`list[str]`):
            What the indices mean.
        multi_label (`bool`):
            Whether an image has any number of labels instead of one.
    """

    splits: dict[str, Any]
    class_names: list[str]
    multi_label: bool

    @classmethod
    def load(cls, args: ImageSource) -> "LabelledImages":
        """
        Reads a data set, and its class names from the "train" split if it has no names for them.

        Raises:
            `ImageDatasetError`: as in [`load_splits`], and for labels that are no classes.
        """
        splits = load_splits(args)
        reference = splits.get("train", next(iter(splits.values())))
        feature = reference.features["labels"]
        multi_label = hasattr(feature, "feature")
        kind = feature.feature if multi_label else feature
        for name, split in splits.items():
            if split.features["labels"] != feature:
                raise ImageDatasetError(f"{args.data}: labels of {name!r} have other names than the rest")
        if isinstance(kind, datasets.ClassLabel):
            return cls(splits, list(kind.names), multi_label)

        if args.streaming:
            raise ImageDatasetError(
                f"{args.data}: labels of a stream need names, as a ClassLabel column has, got {kind}"
            )
        dtype = str(getattr(kind, "dtype", None))
        if dtype not in ("string", "large_string", "bool") and "int" not in dtype:
            raise ImageDatasetError(f"{args.data}: labels must be whole numbers or names of classes, got {kind}")
        labels = {name: list(split["labels"]) for name, split in splits.items()}
        rows = labels["train" if "train" in splits else next(iter(splits))]
        known = sorted({value for row in rows for value in values_of(row, multi_label)} - {None})
        index = {value: number for number, value in enumerate(known)}
        for name, split in splits.items():
            wrong = [
                f"{name_of(split[row], f'row {row}')}: {'no label' if label is None else label}"
                for row, label in enumerate(labels[name])
                if not index.keys() >= set(values_of(label, multi_label))
            ]
            if wrong:
                raise ImageDatasetError(f"labels of {name!r} that 'train' does not have: {some(wrong)}")
            indices = [[index[value] for value in values_of(label, multi_label)] for label in labels[name]]
            column = indices if multi_label else [row[0] for row in indices]
            splits[name] = split.remove_columns("labels").add_column("labels", column)
        return cls(splits, [str(value) for value in known], multi_label)

    def on_disk(self, folder: Path) -> "LabelledImages":
        """Streams but "train" as copies in a folder, images included: they are looked at again and again."""
        splits: dict[str, Any] = {n: self.splits[n] for n in ("train", "validation", "test") if n in self.splits}
        for name, split in splits.items():
            if name != "train" and isinstance(split, datasets.IterableDataset):
                splits[name] = datasets.Dataset.from_generator(
                    whole_rows,
                    features=split.features,
                    gen_kwargs={"split": split},
                    cache_dir=str(folder),
                    fingerprint=name,  # so that the next start finds it
                )
        return replace(self, splits=splits)

    def for_training(self, validation_fraction: float, seed: int) -> "LabelledImages":
        """
        Splits to train with: "train", "validation", which is held out of "train" if there is none, and "test" if there
        is one with labels.

        Raises:
            `ImageDatasetError`: if a stream has no validation split, nothing is left to train with, or a class has no
            images to train with.
        """
        if "train" not in self.splits:
            raise ImageDatasetError(f"the data set has no split 'train', but {some(map(repr, self.splits))}")
        splits: dict[str, Any] = {n: self.splits[n] for n in ("train", "validation", "test") if n in self.splits}
        if "validation" not in splits:
            if isinstance(splits["train"], datasets.IterableDataset):
                raise ImageDatasetError("a stream cannot be split: the data set needs a split 'validation'")
            splits |= self.hold_out(splits["train"], validation_fraction, seed)
        if "test" in splits and self.is_unlabelled(splits["test"]):
            del splits["test"]
        images = replace(self, splits=splits)
        images.check_classes()
        return images

    def is_unlabelled(self, split: datasets.Dataset) -> bool:
        """Whether it has -1 for labels, as in data sets of competitions, which keep those of their test images."""
        return not self.multi_label and set(split["labels"]) == {-1}

    def hold_out(self, train: datasets.Dataset, fraction: float, seed: int) -> dict[str, datasets.Dataset]:
        """Splits it into a part of each class (of images with several labels: of their rarest) and the rest."""
        number = round(fraction * len(train))
        if not 0 < fraction < 1 or not 0 < number < len(train):
            raise ImageDatasetError(f"--validation_fraction {fraction}: of {len(train)} images none would be left")
        labels = [values_of(label, self.multi_label) for label in train["labels"]]
        counts = Counter(itertools.chain.from_iterable(labels))
        classes = [min(values, key=lambda value: (counts[value], value), default=-1) for values in labels]
        sizes, seen = Counter(classes), Counter[int]()
        # The images of each class, in an order by chance, are spread evenly from 0 to 1; the first stays in any case
        places = []
        for row in np.random.default_rng(seed).permutation(len(train)).tolist():
            seen[classes[row]] += 1
            place = 0 if seen[classes[row]] == 1 else (seen[classes[row]] - 0.5) / sizes[classes[row]]
            places.append((place, row))
        rows = [row for _, row in sorted(places, reverse=True)]
        return {"train": train.select(sorted(rows[number:])), "validation": train.select(sorted(rows[:number]))}

    def check_labels(self) -> None:
        """
        Looks at every label, and at the first image of a stream.

        Raises:
            `ImageDatasetError`: that names the first rows whose labels are outside the range.
        """
        for name, split in self.splits.items():
            if isinstance(split, datasets.IterableDataset):
                for row in split.take(1):
                    check_labels(row["labels"], len(self.class_names), name_of(row, f"row 0 of {name!r}"))
                    read_image(row["image"])
                continue
            wrong = [
                f"{name_of(split[row], f'row {row}')}: {'no label' if label is None else label}"
                for row, label in enumerate(split["labels"])
                if not labels_fit(label, len(self.class_names))
            ]
            if wrong and not (name == "test" and self.is_unlabelled(split)):
                last = len(self.class_names) - 1
                raise ImageDatasetError(
                    f"labels of {name!r} that are not in the range from 0 to {last}: {some(wrong)}"
                )

    def check_classes(self) -> None:
        def rows_of_classes(split: datasets.Dataset) -> dict[int, int]:
            labels = enumerate(split["labels"])
            return {index: row for row, label in labels for index in values_of(label, self.multi_label)}

        if isinstance(self.splits["train"], datasets.IterableDataset):
            return
        shown = rows_of_classes(self.splits["train"])
        for name, split in self.splits.items():
            rows = rows_of_classes(split)
            if rest := sorted(rows.keys() - shown.keys()):
                names = (f"{self.class_names[n]} ({name_of(split[rows[n]], f'row {rows[n]}')})" for n in rest)
                raise ImageDatasetError(f"classes with images in {name!r} but none in 'train': {some(names)}")

    def check_images(self, process: int = 0, processes: int = 1) -> None:
        """
        Decodes the images on disk, on all cores, some milliseconds each.

        Args:
            process (`int`), processes (`int`): each process looks at a part of them.

        Raises:
            `ImageDatasetError`: that names the first ones that cannot be read.
        """
        for name, split in self.splits.items():
            if isinstance(split, datasets.IterableDataset):
                continue
            rows = range(len(split) * process // processes, len(split) * (process + 1) // processes)
            if not rows:  # fewer images than processes
                continue
            problems = split.select(rows).map(
                find_problem,
                input_columns="image",
                remove_columns=split.column_names,
                num_proc=min((os.cpu_count() or 1) // processes, len(rows) // 500) or None,
                keep_in_memory=True,
                load_from_cache_file=False,
                desc=f"Checking the images of {name!r}",
            )["problem"]
            unreadable = [f"{problem} (row {row})" for row, problem in zip(rows, problems) if problem]
            if unreadable:
                raise ImageDatasetError(
                    f"{len(unreadable)} of {len(rows)} images of {name!r} cannot be read: {some(unreadable)}"
                )


def match_classes(config: Any, class_names: list[str], by_order: bool) -> list[int]:
    """
    For each class of the data, its index in the model of a configuration: that of its name, or of its place.

    Raises:
        [`ImageDatasetError`]: if the model does not know a class.
    """
    of_model = [str(config.id2label[index]) for index in range(config.num_labels)]
    if set(class_names) <= set(of_model) and len(set(of_model)) == len(of_model):
        return [of_model.index(name) for name in class_names]
    if len(class_names) != len(of_model):
        raise ImageDatasetError(
            f"the model tells {len(of_model)} classes apart ({of_model[0]!r}, ...), the data has {len(class_names)}"
            f" others ({class_names[0]!r}, ...)"
        )
    # ImageNet's indices are the order of its WordNet ids
    if by_order or (len(class_names) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in class_names)):
        print(f"Classes are taken in their order: {class_names[0]!r} is {of_model[0]!r}, and so on")
        return list(range(len(of_model)))
    unknown = next(name for name in class_names if name not in of_model)
    raise ImageDatasetError(
        f"the model knows no class {unknown!r}; if the classes of the data have other names than the model's"
        f" ({of_model[0]!r}, ...) and the same order, say --by_order"
    )


def whole_rows(split: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
    """Rows with the content of their images; of an image that cannot be read, with its path alone."""
    for row in split:
        content = None
        with contextlib.suppress(ImageDatasetError):
            content = read_bytes(row["image"])
        yield {**row, "image": row["image"] and {"bytes": content, "path": row["image"]["path"]}}


def values_of(label: Any, multi_label: bool) -> list[Any]:
    """The labels of an image; `[None]` if it has none where it should."""
    return list(label) if multi_label and label is not None else [label]


def find_problem(image: dict[str, Any]) -> dict[str, str]:
    try:
        read_image(image)
    except ImageDatasetError as error:
        return {"problem": str(error)}
    return {"problem": ""}


def some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    return "; ".join(names[:limit]) + (f"; and {len(names) - limit} more" if len(names) > limit else "")


__all__ = ["DataArguments", "ImageSource", "LabelledImages"]
