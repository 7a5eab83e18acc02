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
"""Labelled images for training and evaluation: loaded and split by `datasets`, and checked here."""

import hashlib
import itertools
import json
import os
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import datasets

from .columns import is_unlabelled, labels_of, select_columns, with_class_labels
from .data_sources import SPLIT_NAMES, ImageSource, load_splits
from .errors import CommandError, shorten_list
from .images import decode_image


@dataclass
class DataArguments(ImageSource):
    """Images to train with, as options of a command."""

    shuffle_buffer_size: int = field(
        default=10_000, metadata={"help": "Shuffle buffer size in encoded images per process, with --streaming."}
    )
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Fraction of the training images to hold out if there is no validation split."}
    )
    check_images: bool = field(
        default=True, metadata={"help": "Decode all images before training to find corrupt ones."}
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
        Loads a dataset, with masks if there is a column of them, and checks its labels. A test split whose labels are
        all -1, as competitions publish it, is left out.

        Raises:
            `CommandError`: if images or labels are missing or do not match.
        """
        splits, image_columns = select_columns(source, load_splits(source), mask_column)
        if len(splits) > 1 and "test" in splits and is_unlabelled(splits["test"]):
            del splits["test"]
        splits = with_class_labels(source, splits, image_columns)
        feature = next(iter(splits.values())).features["labels"]
        multi_label = hasattr(feature, "feature")
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
        """Raises a `CommandError` for labels that are not those of a class; a stream is checked when it is read."""
        if self.is_stream:
            return
        valid = range(len(self.class_names))
        for name, split in self.splits.items():
            rows = enumerate(labels_of(split))
            wrong = [row for row, labels in rows if not all(label in valid for label in labels)]
            if wrong:
                examples = (f"row {row}: {split[row]['labels']}" for row in wrong[:5])
                raise CommandError(
                    f"{len(wrong)} labels of {name!r} are missing or not in the range from 0 to {valid[-1]}:"
                    f" {shorten_list(examples)}"
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
            raise CommandError(f"the dataset has no split 'train', only {shorten_list(map(repr, self.splits))}")
        splits = {name: split for name, split in self.splits.items() if name in SPLIT_NAMES.values()}
        if "validation" not in splits:
            if self.is_stream:
                raise CommandError("a stream cannot be split: the dataset needs a split 'validation'")
            try:
                parts = splits["train"].train_test_split(
                    validation_fraction, stratify_by_column=None if self.multi_label else "labels", seed=seed
                )
            except ValueError as error:  # in scikit-learn's words, such as for a class of one image
                raise CommandError(f"--validation_fraction {validation_fraction}: {error}") from error
            splits |= {"train": parts["train"], "validation": parts["test"]}
        if not self.is_stream:
            classes = {name: set(itertools.chain(*labels_of(splits[name]))) for name in splits}
            for name in splits:
                if unknown := sorted(classes[name] - classes["train"]):
                    names = shorten_list(self.class_names[index] for index in unknown)
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
                    f"{len(problems)} of {len(split)} images of {name!r} cannot be read: {shorten_list(problems)}"
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
        return f"Images: {', '.join(sizes)}; {len(self.class_names)} {kind}: {shorten_list(self.class_names)}"


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
    if is_mask and 0 < brightest < 128:
        problem = f"the brightest pixel of the mask is {brightest} of 255; objects must be white"
    return {"problem": problem and f"{image['path'] or 'an image'}: {problem}", "transparent": transparent}
