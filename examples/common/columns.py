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
"""The columns of images and labels of a dataset, and the names of its classes."""

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets

from .data_sources import ImageSource, columns_of_images
from .errors import CommandError, shorten_list


def select_columns(
    source: ImageSource, splits: dict[str, Any], mask_column: str | None
) -> tuple[dict[str, Any], list[str]]:
    """The splits with the columns of images and masks, not decoded, and "labels"; and the columns of images."""
    # Some streams know their columns only after a look at the first row
    splits = {name: split if split.features else split._resolve_features() for name, split in splits.items()}
    features = next(iter(splits.values())).features
    others = datasets.Features({name: feature for name, feature in features.items() if name != mask_column})
    image_columns = source.image_columns or [only_column(source.data, "image", others)]
    label_column = source.label_column or only_column(source.data, "label", features)
    columns = dict.fromkeys([*image_columns, *([mask_column] if mask_column else [])])
    for name, split in splits.items():
        if missing := {*columns, label_column} - set(split.features):
            raise CommandError(
                f"{source.data}: {name!r} has no column {shorten_list(sorted(missing))}, only"
                f" {', '.join(split.features)}; name the columns with --image_columns and --label_column"
            )
        for column in columns:
            split = split.cast_column(column, datasets.Image(decode=False))
        split = split.select_columns([*columns, label_column])
        # After the casts, as renaming a column of a stream would decode its images
        splits[name] = split if label_column == "labels" else split.rename_column(label_column, "labels")
    return splits, image_columns


def only_column(source: str, kind: str, features: datasets.Features) -> str:
    """The only column of that kind, "image" or "label", or else the one with a usual name: "cls" in WebDataset."""
    columns = columns_of_images(features)
    if kind == "label":
        classes = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
        columns = [name for name, feature in classes.items() if isinstance(feature, datasets.ClassLabel)]
    usual_names = ("label", "labels", "cls") if kind == "label" else ("image", "images")
    columns = columns if len(columns) == 1 else [name for name in usual_names if name in features]
    if len(columns) != 1:
        remedy = "name it with --label_column, or put the images of each class, two or more, into a separate folder"
        if kind == "image":
            remedy = "name one with --image_columns, or one for each branch"
        raise CommandError(f"{source}: ambiguous {kind} column, candidates: {', '.join(features)}; {remedy}")
    return columns[0]


def with_class_labels(source: ImageSource, splits: dict[str, Any], image_columns: list[str]) -> dict[str, Any]:
    """
    The splits with labels that are indices of classes: those of `--class_names`, or else of the data. On disk, labels
    without names become classes: the values that occur in the first split.

    Raises:
        `CommandError`: for labels of another type, names that do not fit, and unknown labels; for those of a stream,
            when it is read.
    """
    first = next(iter(splits))
    feature = splits[first].features["labels"]
    for name, split in splits.items():
        if split.features["labels"] != feature:
            raise CommandError(f"{source.data}: the classes of {name!r} differ from those of the other splits")
    multi_label, kind = hasattr(feature, "feature"), getattr(feature, "feature", feature)
    dtype = str(getattr(kind, "dtype", None))
    is_text = dtype in ("string", "large_string")
    if not (is_text or dtype == "bool" or "int" in dtype):
        raise CommandError(f"{source.data}: labels must be names of classes or whole numbers, got {feature}")
    is_stream = any(isinstance(split, datasets.IterableDataset) for split in splits.values())
    own_names = kind.names if isinstance(kind, datasets.ClassLabel) else None
    names = read_class_names(source.class_names, own_names) if source.class_names else own_names
    if own_names and names == own_names and not is_stream:
        return splits
    values: Iterable[Any]  # the label of each class
    if names:
        values = names if is_text else range(len(names))
    elif is_stream:
        raise CommandError(
            f"{source.data}: the classes of a stream need names, and its labels have none ({feature}); give"
            " --class_names, a text file with one name per line"
        )
    else:
        values = sorted(set(itertools.chain(*labels_of(splits[first]))) - {None})
        names = [str(value) for value in values]
    indices = {value: index for index, value in enumerate(values)}
    column: Any = datasets.ClassLabel(names=names)
    column = datasets.List(column) if multi_label else column
    if is_stream:
        return {
            name: split.map(
                index_row,
                input_columns=["labels", *image_columns],
                fn_kwargs={"indices": indices, "split": name},
                features=datasets.Features({**split.features, "labels": column}),
            )
            for name, split in splits.items()
        }
    indices |= {None: None, -1: -1} if own_names else {None: None}  # missing labels, which `check_labels` names
    known = f"--class_names {source.class_names}" if source.class_names else repr(first)
    for name, split in splits.items():
        rows = list(labels_of(split))
        wrong = [
            f"row {row}: {label!r}" for row, labels in enumerate(rows) for label in labels if label not in indices
        ]
        if wrong:
            raise CommandError(f"labels of {name!r} that {known} does not have: {shorten_list(wrong)}")
        labels: list[Any] = [[indices[label] for label in row] for row in rows]
        labels = labels if multi_label else [label for (label,) in labels]
        # Instead of a cast, which would copy the images
        splits[name] = split.remove_columns("labels").add_column("labels", labels, feature=column)
    return splits


def read_class_names(path: str, own_names: list[str] | None = None) -> list[str]:
    """
    The lines of a text file. Raises a `CommandError` if they are not the names of different classes, or cannot replace
    the names that the classes of the data have.
    """
    try:
        names = [line.strip() for line in Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise CommandError(f"--class_names {path}: not a text file in UTF-8 ({error})") from error
    counts = Counter(names)
    wrong = [f"line {line}: {name!r}" for line, name in enumerate(names, 1) if not name or counts[name] > 1]
    if wrong or not names:
        raise CommandError(
            f"--class_names {path}: each line must name a different class, got {shorten_list(wrong) or 'no line'}"
        )
    if own_names and (len(names) != len(own_names) or (names != own_names and set(names) == set(own_names))):
        raise CommandError(
            f"--class_names {path}: must rename the {len(own_names)} classes {shorten_list(own_names)}, in this order,"
            f" got {len(names)}: {shorten_list(names)}"
        )
    return names


def index_row(labels: Any, *images: dict[str, Any] | None, indices: dict[Any, int], split: str) -> dict[str, Any]:
    """The indices of the labels of a row. Raises a `CommandError` for a wrong label or a missing image."""
    if None in images:
        raise CommandError(
            f"a row of {split!r} with the label {labels!r} has no image; in WebDataset shards, all images must have"
            " the same suffix"
        )
    found = [indices.get(label) for label in as_list(labels)]
    if None in found:
        path = images[0]["path"] or "an image"
        raise CommandError(
            f"{path} of {split!r}: the label {labels!r} is not one of {shorten_list(map(repr, indices))}"
        )
    return {"labels": found if isinstance(labels, list) else found[0]}


def is_unlabelled(split: Any) -> bool:
    """Whether all labels of a split are -1, or the first one of a stream."""
    if isinstance(split, datasets.IterableDataset):
        return [row["labels"] for row in split.select_columns("labels").take(1)] == [-1]
    return {label for labels in labels_of(split) for label in labels} == {-1}


def labels_of(split: datasets.Dataset) -> Iterable[list[Any]]:
    """The labels of each image; `[None]` if they are missing."""
    return map(as_list, split["labels"][:])


def as_list(labels: Any) -> list[Any]:
    """The labels of an image, which may be a single one. Texts in WebDataset shards may end with a newline."""
    labels = labels if isinstance(labels, list) else [labels]
    return [label.strip() if isinstance(label, str) else label for label in labels]
