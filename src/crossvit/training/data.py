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
"""Image datasets for training and evaluation: loaded and split by `datasets`, and checked here."""

import glob
import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets

from .errors import CommandError
from .images import decode_image
from .photo_folder import PhotoFolder


# The usual names of splits and of their folders, and the names used here
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass
class ImageSource:
    """The source of images and labels, as options of a command."""

    data: str = field(
        default="",
        metadata={
            "help": "Folder of images (with a folder per class or metadata.jsonl; in train/, validation/ and test/, if"
            " it has these), folder of `Dataset.save_to_disk`, or data set on the Hub."
        },
    )
    data_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    data_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of it on the Hub."})
    image_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns of images, one for all branches or one for each; default: the only one (but for masks)."
        },
    )
    label_column: str | None = field(default=None, metadata={"help": "Default: the only column of class labels."})
    streaming: bool = field(default=False, metadata={"help": "Read images only when they are needed."})


@dataclass
class DataArguments(ImageSource):
    """Images to train with, as options of a command."""

    shuffle_buffer_size: int = field(
        default=10_000, metadata={"help": "Number of images of a stream that are shuffled at a time."}
    )
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Fraction of the training images to hold out if there is no validation split."}
    )
    check_images: bool = field(
        default=True, metadata={"help": "Decode each image before the training to find the damaged ones."}
    )


@dataclass
class LabelledImages:
    """
    Images with labels.

    Args:
        splits (`dict[str, datasets.Dataset | datasets.IterableDataset]`):
            By name ("train", "validation", "test" or others), rows of images in the columns below, not decoded (see
            [`decode_image`]), and "labels": the index of a class, or the list of the indices of several.
        class_names (`list[str]`):
            The name of each class, by its index.
        multi_label (`bool`):
            Whether an image has any number of labels instead of one.
        image_columns (`list[str]`):
            The column of images for all branches, or those of each branch.
        mask_column (`str`, *optional*):
            The column of masks: images, of which the objects are white. It may be one of the above.
    """

    splits: dict[str, Any]
    class_names: list[str]
    multi_label: bool
    image_columns: list[str]
    mask_column: str | None = None

    @classmethod
    def load(cls, source: ImageSource, mask_column: str | None = None) -> "LabelledImages":
        """
        Loads a data set, with masks on request, and checks its labels. A test split whose labels are all -1, as
        competitions publish it, is left out.

        Raises:
            `CommandError`: if images or labels are missing or do not match.
        """
        splits, image_columns = select_columns(source, load_splits(source), mask_column)
        feature = next(iter(splits.values())).features["labels"]
        multi_label = hasattr(feature, "feature")
        for name, split in splits.items():
            if split.features["labels"] != feature:
                raise CommandError(f"{source.data}: the classes of {name!r} differ from those of the other splits")
        if not isinstance(getattr(feature, "feature", feature), datasets.ClassLabel):
            splits = with_class_labels(source, splits, feature)
            feature = next(iter(splits.values())).features["labels"]
        test = splits.get("test")
        if isinstance(test, datasets.Dataset) and not multi_label and set(test["labels"]) == {-1}:
            del splits["test"]
        class_names = list(getattr(feature, "feature", feature).names)
        images = cls(splits, class_names, multi_label, image_columns, mask_column)
        images.check_labels()
        return images

    @property
    def is_stream(self) -> bool:
        return any(isinstance(split, datasets.IterableDataset) for split in self.splits.values())

    def fingerprint(self) -> str | None:
        """A hash of the file names and labels of the images in each split; `None` for streams."""
        if self.is_stream:
            return None
        digest = hashlib.sha256()
        for name, split in self.splits.items():
            # A column of paths can be read without the bytes of the images, which parquet files hold
            rows = split.flatten().with_format(None)
            files = [
                [os.path.basename(path or "") for path in rows[f"{column}.path"]] for column in self.image_columns
            ]
            digest.update(json.dumps([name, files, list(rows["labels"])]).encode())
        return digest.hexdigest()

    def check_labels(self) -> None:
        """Raises a `CommandError` for labels that are not those of a class; a stream is not checked."""
        if self.is_stream:
            return
        valid = range(len(self.class_names))
        for name, split in self.splits.items():
            rows = enumerate(labels_of(split, self.multi_label))
            wrong = [row for row, labels in rows if not all(label in valid for label in labels)]
            if wrong:
                examples = (f"row {row}: {split[row]['labels']}" for row in wrong[:5])
                raise CommandError(
                    f"{len(wrong)} labels of {name!r} are missing or not in the range from 0 to {valid[-1]}:"
                    f" {some(examples)}"
                )

    def for_training(self, validation_fraction: float, seed: int) -> "LabelledImages":
        """
        Only the splits "train", "validation" (if there is none, held out of "train" in the proportions of the classes)
        and "test" (if there is one).

        Raises:
            `CommandError`: if there is no split "train", no validation images can be held out, or they have classes
                that "train" does not have.
        """
        if "train" not in self.splits:
            raise CommandError(f"the data set has no split 'train', only {some(map(repr, self.splits))}")
        splits = {name: split for name, split in self.splits.items() if name in SPLIT_NAMES.values()}
        if "validation" not in splits:
            if self.is_stream:
                raise CommandError("a stream cannot be split: the data set needs a split 'validation'")
            try:
                parts = splits["train"].train_test_split(
                    validation_fraction, stratify_by_column=None if self.multi_label else "labels", seed=seed
                )
            except ValueError as error:  # in scikit-learn's words, such as for a class of one image
                raise CommandError(f"--validation_fraction {validation_fraction}: {error}") from error
            splits |= {"train": parts["train"], "validation": parts["test"]}
        if not self.is_stream:
            classes = {name: set(itertools.chain(*labels_of(splits[name], self.multi_label))) for name in splits}
            for name in splits:
                if unknown := sorted(classes[name] - classes["train"]):
                    names = some(self.class_names[index] for index in unknown)
                    raise CommandError(f"classes with images in {name!r} but none in 'train': {names}")
        return replace(self, splits=splits)

    def check_images(self) -> None:
        """
        Decodes the images on disk once, some milliseconds each, on all cores; `datasets` remembers the result.

        Raises:
            `CommandError`: names the images that cannot be decoded or have more than 8 bits per channel, and the masks
                that are not white anywhere.
        """
        if self.is_stream:
            return
        transparent = 0
        columns = dict.fromkeys(column for column in (*self.image_columns, self.mask_column) if column)
        for (name, split), column in itertools.product(self.splits.items(), columns):
            findings = split.select_columns(column).map(
                inspect_image,
                input_columns=column,
                remove_columns=column,
                fn_kwargs={"is_mask": column == self.mask_column},
                num_proc=min(os.cpu_count() or 1, len(split) // 500) or None,
                desc=f"Checking {column!r} of {name!r}",
            )
            problems = [f"row {row}, {text}" for row, text in enumerate(findings["problem"]) if text]
            if problems:
                raise CommandError(
                    f"{len(problems)} of {len(split)} images of {name!r} cannot be read: {some(problems)}"
                )
            transparent += sum(findings["transparent"])
        if transparent:
            warnings.warn(
                f"{transparent} images have transparent pixels; the model sees the colors beneath. Paint them on a"
                " background if that is not what you want.",
                stacklevel=2,
            )

    def summary(self) -> str:
        """The splits and classes, in one line."""
        sizes = [
            f"{name} (stream)" if self.is_stream else f"{len(split):,} {name}" for name, split in self.splits.items()
        ]
        kind = "labels" if self.multi_label else "classes"
        return f"Images: {', '.join(sizes)}; {len(self.class_names)} {kind}: {some(self.class_names)}"


def load_splits(source: ImageSource) -> dict[str, Any]:
    """The splits of a data set as they are, by their common names; "train" comes first if there is one."""
    folder = Path(source.data).expanduser()
    if not source.data:
        raise CommandError("give --data, a folder of images or a data set of the Hub")
    loaded: Any
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        loaded = datasets.load_from_disk(str(folder))
        loaded = {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded
        if source.streaming:
            loaded = {name: split.to_iterable_dataset() for name, split in loaded.items()}
    elif folder.is_dir() and not any(folder.rglob("*.parquet")):
        loaded = load_image_folder(folder.absolute(), source.streaming)
    else:
        try:
            loaded = datasets.load_dataset(
                source.data, source.data_config, revision=source.data_revision, streaming=source.streaming
            )
        except (OSError, ValueError) as error:  # a typo, no network, a missing configuration
            raise CommandError(f"{source.data}: no data set in such a folder or on the Hub ({error})") from error
    splits = {SPLIT_NAMES.get(name.lower(), name): split for name, split in loaded.items()}
    if len(splits) < len(loaded):
        raise CommandError(f"{source.data}: two of the splits {some(loaded)} mean the same: rename one")
    return dict(sorted(splits.items(), key=lambda item: item[0] != "train"))


def load_image_folder(folder: Path, streaming: bool) -> dict[str, Any]:
    """
    Loads a folder of images. Only top-level folders make splits: from a file name such as `unit-test.png`,
    `datasets` would infer a split "test" and drop all other images.
    """
    on_disk = find_images(folder)
    patterns = {name: f"{glob.escape(str(path))}/**" for name, path in split_folders(folder).items()}
    builder = PhotoFolder(dataset_name="photo_folder", data_files=patterns)
    if streaming:
        return builder.as_streaming_dataset()
    builder.download_and_prepare()
    splits = builder.as_dataset()
    found = set()
    for split in splits.values():
        for column in columns_of_images(split.features):
            rows = split.cast_column(column, datasets.Image(decode=False))[column]
            found |= {os.path.normpath(row["path"]) for row in rows if row}
    if unknown := on_disk - found:
        raise CommandError(
            f"{folder}: {len(unknown)} of {len(on_disk)} image files are not in the data set that `datasets` makes"
            f" of it, such as {some(sorted(unknown))}: put each image into the folder of its class, at the same"
            " depth, or name it in metadata.jsonl"
        )
    if missing := found - on_disk:
        raise CommandError(f"{folder}: the metadata names files that are not there: {some(sorted(missing))}")
    return splits


def find_images(folder: Path) -> set[str]:
    """The paths of the images in a folder. Raises a `CommandError` for a folder in it that has none."""
    images = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        found = [
            name for name in files if not name.startswith(".") and Path(name).suffix.lower() in PhotoFolder.EXTENSIONS
        ]
        if not found and not folders:
            raise CommandError(f"{path}: a folder without images; remove it, or put images into it")
        images |= {os.path.join(path, name) for name in found}
    return images


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of the splits by their names; "train" is the folder itself if it has none."""
    top = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    splits = {path.name: path for path in top if path.name.lower() in SPLIT_NAMES}
    others = [path.name for path in top if path.name not in splits]
    if others and not any(child.is_dir() for path in splits.values() for child in path.iterdir()):
        splits = {}  # the classes of a data set, one of which is called "train"
    if not splits:
        return {"train": folder}
    others += [name for name in PhotoFolder.METADATA_FILENAMES if (folder / name).is_file()]
    if others:
        raise CommandError(
            f"{folder}: beside the splits {some(splits)} there must be no other folders and no metadata, found"
            f" {some(others)}"
        )
    return splits


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
                f"{source.data}: {name!r} has no column {some(sorted(missing))}, only {', '.join(split.features)};"
                " name the columns with --image_columns and --label_column"
            )
        for column in columns:
            split = split.cast_column(column, datasets.Image(decode=False))
        split = split.select_columns([*columns, label_column])
        # After the casts, as renaming a column of a stream would decode its images
        splits[name] = split if label_column == "labels" else split.rename_column(label_column, "labels")
    return splits, image_columns


def columns_of_images(features: datasets.Features) -> list[str]:
    return [name for name, feature in features.items() if isinstance(feature, datasets.Image)]


def only_column(source: str, kind: str, features: datasets.Features) -> str:
    """The only column of that kind, "image" or "label", or else the one with the usual name."""
    columns = columns_of_images(features)
    if kind == "label":
        classes = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
        columns = [name for name, feature in classes.items() if isinstance(feature, datasets.ClassLabel)]
    columns = columns if len(columns) == 1 else [name for name in (kind, f"{kind}s") if name in features]
    if len(columns) != 1:
        remedy = "name it with --label_column, or put the images of each class, two or more, into a separate folder"
        if kind == "image":
            remedy = "name one with --image_columns, or one for each branch"
        raise CommandError(f"{source}: which column has the {kind}s? It has {', '.join(features)}; {remedy}")
    return columns[0]


def with_class_labels(source: ImageSource, splits: dict[str, Any], feature: Any) -> dict[str, Any]:
    """The splits with classes instead of texts or whole numbers: the values that occur in the first split."""
    multi_label = hasattr(feature, "feature")
    dtype = str(getattr(getattr(feature, "feature", feature), "dtype", None))
    if source.streaming or not (dtype in ("string", "large_string", "bool") or "int" in dtype):
        raise CommandError(
            f"{source.data}: labels must be names of classes or whole numbers, those of a stream a ClassLabel column,"
            f" got {feature}"
        )

    def cast(kind: Any) -> dict[str, Any]:
        column = datasets.List(kind) if multi_label else kind
        return {name: split.cast_column("labels", column) for name, split in splits.items()}

    splits = cast(datasets.Value("string"))
    values = {name: set(itertools.chain(*labels_of(split, multi_label))) - {None} for name, split in splits.items()}
    known = next(iter(values.values()))
    for name in splits:
        # `datasets` would read an unknown number as the index of a class
        if unknown := values[name] - known:
            raise CommandError(f"labels of {name!r} that 'train' does not have: {some(sorted(unknown))}")
    return cast(datasets.ClassLabel(names=sorted(known, key=int if "int" in dtype else str)))


def labels_of(split: datasets.Dataset, multi_label: bool) -> Iterable[list[Any]]:
    """The labels of each image; `[None]` if they are missing."""
    return ([None] if label is None else label if multi_label else [label] for label in split["labels"])


def inspect_image(image: dict[str, Any] | None, is_mask: bool) -> dict[str, Any]:
    """Why an image or mask cannot be used, or "", and whether it has transparent pixels."""
    try:
        decoded: Any = decode_image(image, mode=None)
    except CommandError as error:
        return {"problem": str(error), "transparent": False}
    transparent = "A" in decoded.getbands() or "transparency" in decoded.info
    transparent = transparent and decoded.convert("RGBA").getextrema()[3][0] < 255
    brightest = decoded.convert("L").getextrema()[1]
    problem = ""
    if decoded.mode.startswith(("I", "F")):
        problem = "more than 8 bits per channel; convert it to 8"
    elif is_mask and 0 < brightest < 128:
        problem = f"the brightest pixel of the mask is {brightest} of 255; objects must be white"
    return {"problem": problem and f"{image['path'] or 'an image'}: {problem}", "transparent": transparent}


def some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit:,} more" if len(names) > limit else "")


__all__ = ["DataArguments", "ImageSource", "LabelledImages"]
