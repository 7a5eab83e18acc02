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
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import fsspec

from .errors import CommandError
from .images import decode_image
from .photo_folder import PhotoFolder


# The usual names of splits and of their folders, and the names used here
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}

SHARD_FORMATS = {".tar": "webdataset", ".parquet": "parquet"}  # by suffix, as `datasets` calls them


@dataclass
class ImageSource:
    """The source of images and labels, as options of a command."""

    data: str = field(
        default="",
        metadata={
            "help": "Folder of images (with a folder per class or metadata.jsonl; in train/, validation/ and test/, if"
            " it has these), folder of WebDataset shards (*.tar) or Parquet files, URL or glob of these"
            " (s3://bucket/train-*.tar), folder of `Dataset.save_to_disk`, or dataset on the Hub."
        },
    )
    data_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    data_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a dataset on the Hub."}
    )
    image_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns of images, one for all branches or one for each; default: the only one but for masks."
        },
    )
    label_column: str | None = field(
        default=None,
        metadata={"help": "Column of labels; default: the only one with named classes, or label, labels or cls."},
    )
    class_names: str | None = field(
        default=None,
        metadata={
            "help": "UTF-8 text file with one class name per line. Line i, counted from 0, names label i; labels that"
            " are text must be among the names. It replaces names that the data has. Streams without such names need"
            " it. Default: the names in the data, or else the labels that occur."
        },
    )
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
            classes = {name: set(itertools.chain(*labels_of(splits[name]))) for name in splits}
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
    if not source.data:
        raise CommandError("give --data, a folder of images or a data set of the Hub")
    data = os.path.expanduser(source.data.removeprefix("file://"))
    folder, shards = Path(data), find_shards(data)
    loaded: Any
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        loaded = datasets.load_from_disk(data)
        loaded = {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded
        if source.streaming:
            loaded = {name: split.to_iterable_dataset() for name, split in loaded.items()}
    elif shards and not (folder / "README.md").is_file():
        loaded = load_shards(data, shards, source.streaming)
    elif folder.is_dir() and not shards:
        loaded = load_image_folder(folder.absolute(), source.streaming)
    else:  # on the Hub, or a copy from there, whose card may name the files of each split
        try:
            loaded = datasets.load_dataset(
                str(folder.absolute()) if folder.is_dir() else source.data,
                source.data_config,
                revision=source.data_revision,
                streaming=source.streaming,
            )
        except (OSError, ValueError) as error:  # a typo, no network, a missing configuration
            raise CommandError(f"{source.data}: no data set in such a folder or on the Hub ({error})") from error
    splits = {SPLIT_NAMES.get(name.lower(), name): split for name, split in loaded.items()}
    if len(splits) < len(loaded):
        raise CommandError(f"{source.data}: two of the splits {some(loaded)} mean the same: rename one")
    return dict(sorted(splits.items(), key=lambda item: item[0] != "train"))


def find_shards(data: str) -> dict[str, str]:
    """
    The WebDataset shards (`*.tar`) and Parquet files in a folder, or those of a path, glob or URL of `fsspec`. The
    keys are paths relative to the folder or, for a glob, to its last folder without a wildcard.
    """
    is_pattern = glob.has_magic(data) or is_shard(data)
    if os.path.isdir(data):
        root = os.path.abspath(data)
        folders = os.walk(root, followlinks=True)
        found = [os.path.join(folder, name) for folder, _, names in folders for name in names if is_shard(name)]
        paths = {os.path.relpath(path, root): path for path in found}
    elif is_pattern or ("://" in data and not data.startswith("hf://")):
        try:
            system, pattern = fsspec.core.url_to_fs(data if is_pattern else f"{data.rstrip('/')}/**")
            found = system.glob(pattern)
        except (ImportError, OSError, ValueError) as error:  # no s3fs for s3://, no network, a typo
            raise CommandError(f"{data}: cannot be read ({error})") from error
        root = re.split(r"[*?[]", pattern)[0].rpartition("/")[0]
        paths = {path.removeprefix(root): system.unstrip_protocol(path).removeprefix("file://") for path in found}
    else:
        return {}
    is_hidden = re.compile(r"(^|/)(\.|__)").search
    return {name: path for name, path in sorted(paths.items()) if is_shard(name) and not is_hidden(name)}


def load_shards(data: str, shards: dict[str, str], streaming: bool) -> dict[str, Any]:
    """
    Loads WebDataset shards or Parquet files. As in `datasets`, a word in the name of a file or its folder selects the
    split: `train/0.tar`, `imagenet-val-0001.tar`. If no name has one, the split is "train"; if only some names have
    one, which `datasets` would load without the others, that is an error.
    """
    images = [
        name for name in glob.glob("**", root_dir=data, recursive=True) if suffix_of(name) in PhotoFolder.EXTENSIONS
    ]
    examples = {suffix_of(name): name for name in (*images[:1], *shards)}
    if len(examples) > 1:
        raise CommandError(
            f"{data}: WebDataset shards, Parquet files and images must be in separate folders, found"
            f" {some(examples.values())}"
        )
    splits: dict[str, list[str]] = {}
    for name, path in shards.items():
        words = re.split(r"[\W\d_]+", name.partition("?")[0].lower())
        found = {SPLIT_NAMES[word]: word for word in words if word in SPLIT_NAMES}
        if len(found) > 1:
            raise CommandError(f"{path}: of which split? Its name has the words {some(found.values())}")
        splits.setdefault(next(iter(found), ""), []).append(path if "://" in path else glob.escape(path))
    unnamed = splits.pop("", [])
    if unnamed and splits:
        raise CommandError(f"{data}: of which split are {some(unnamed)}? Their names have no word such as 'train'")
    kind = SHARD_FORMATS[suffix_of(name)]
    try:
        return {
            name: datasets.load_dataset(kind, data_files={name: files}, split=name, streaming=streaming)
            for name, files in (splits or {"train": unnamed}).items()
        }
    except (OSError, ValueError) as error:  # no network, damaged files
        raise CommandError(f"{data}: cannot be read as {kind} ({error})") from error


def is_shard(path: str) -> bool:
    return suffix_of(path) in SHARD_FORMATS and os.path.basename(path) not in PhotoFolder.METADATA_FILENAMES


def suffix_of(path: str) -> str:
    """In lower case; `path` may be a URL with a query."""
    return os.path.splitext(path.partition("?")[0])[1].lower()


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
        raise CommandError(f"{source}: which column has the {kind}s? It has {', '.join(features)}; {remedy}")
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
            raise CommandError(f"labels of {name!r} that {known} does not have: {some(wrong)}")
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
            f"--class_names {path}: each line must name a different class, got {some(wrong) or 'no line'}"
        )
    if own_names and (len(names) != len(own_names) or (names != own_names and set(names) == set(own_names))):
        raise CommandError(
            f"--class_names {path}: must rename the {len(own_names)} classes {some(own_names)}, in this order, got"
            f" {len(names)}: {some(names)}"
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
        raise CommandError(f"{path} of {split!r}: the label {labels!r} is not one of {some(map(repr, indices))}")
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
