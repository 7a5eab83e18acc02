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
"""The sources of labelled images: folders, shards, saved datasets and the Hub, all read by `datasets`."""

import glob
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import fsspec

from .errors import CommandError, shorten_list
from .image_folder import AvifImageFolder
from .images import find_images


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
            "help": "Columns of images, one for all branches or one for each; default: the only non-mask image column."
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


def load_splits(source: ImageSource) -> dict[str, Any]:
    """The splits of a dataset as they are, by their common names; "train" comes first if there is one."""
    if not source.data:
        raise CommandError("give --data, a folder of images or a dataset of the Hub")
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
            raise CommandError(f"{source.data}: not a dataset, locally or on the Hub ({error})") from error
    splits = {SPLIT_NAMES.get(name.lower(), name): split for name, split in loaded.items()}
    if len(splits) < len(loaded):
        raise CommandError(f"{source.data}: two of the splits {shorten_list(loaded)} map to the same name: rename one")
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
        name
        for name in glob.glob("**", root_dir=data, recursive=True)
        if suffix_of(name) in AvifImageFolder.EXTENSIONS
    ]
    examples = {suffix_of(name): name for name in (*images[:1], *shards)}
    if len(examples) > 1:
        raise CommandError(
            f"{data}: WebDataset shards, Parquet files and images must be in separate folders, found"
            f" {shorten_list(examples.values())}"
        )
    splits: dict[str, list[str]] = {}
    for name, path in shards.items():
        words = re.split(r"[\W\d_]+", name.partition("?")[0].lower())
        found = {SPLIT_NAMES[word]: word for word in words if word in SPLIT_NAMES}
        if len(found) > 1:
            raise CommandError(f"{path}: of which split? Its name has the words {shorten_list(found.values())}")
        splits.setdefault(next(iter(found), ""), []).append(path if "://" in path else glob.escape(path))
    unnamed = splits.pop("", [])
    if unnamed and splits:
        raise CommandError(
            f"{data}: of which split are {shorten_list(unnamed)}? Their names have no word such as 'train'"
        )
    kind = SHARD_FORMATS[suffix_of(name)]
    try:
        return {
            name: datasets.load_dataset(kind, data_files={name: files}, split=name, streaming=streaming)
            for name, files in (splits or {"train": unnamed}).items()
        }
    except (OSError, ValueError) as error:  # no network, corrupt files
        raise CommandError(f"{data}: cannot be read as {kind} ({error})") from error


def is_shard(path: str) -> bool:
    return suffix_of(path) in SHARD_FORMATS and os.path.basename(path) not in AvifImageFolder.METADATA_FILENAMES


def suffix_of(path: str) -> str:
    """In lower case; `path` may be a URL with a query."""
    return os.path.splitext(path.partition("?")[0])[1].lower()


def load_image_folder(folder: Path, streaming: bool) -> dict[str, Any]:
    """
    Loads a folder of images. Only top-level folders make splits: from a file name such as `unit-test.png`,
    `datasets` would infer a split "test" and drop all other images.
    """
    images = find_images(folder, AvifImageFolder.EXTENSIONS)
    check_folders(folder, {path.parent for path in images})
    on_disk = set(map(str, images))
    patterns = {name: f"{glob.escape(str(path))}/**" for name, path in split_folders(folder).items()}
    builder = AvifImageFolder(dataset_name="image_folder", data_files=patterns)
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
            f"{folder}: {len(unknown)} of {len(on_disk)} image files are skipped by `datasets`, such as"
            f" {shorten_list(sorted(unknown))}: put each image into the folder of its class, at the same depth, or"
            " name it in metadata.jsonl"
        )
    if missing := found - on_disk:
        raise CommandError(f"{folder}: the metadata names files that are not there: {shorten_list(sorted(missing))}")
    return splits


def columns_of_images(features: datasets.Features) -> list[str]:
    return [name for name, feature in features.items() if isinstance(feature, datasets.Image)]


def check_folders(folder: Path, with_images: set[Path]) -> None:
    """Raises a `CommandError` for a folder that has neither images nor folders."""
    for path, folders, _ in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        if not folders and Path(path) not in with_images:
            raise CommandError(f"{path}: a folder without images; remove it, or put images into it")


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of the splits by their names; "train" is the folder itself if it has none."""
    top = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    splits = {path.name: path for path in top if path.name.lower() in SPLIT_NAMES}
    others = [path.name for path in top if path.name not in splits]
    if others and not any(child.is_dir() for path in splits.values() for child in path.iterdir()):
        splits = {}  # the classes of a dataset, one of which is called "train"
    if not splits:
        return {"train": folder}
    others += [name for name in AvifImageFolder.METADATA_FILENAMES if (folder / name).is_file()]
    if others:
        raise CommandError(
            f"{folder}: beside the splits {shorten_list(splits)} there must be no other folders and no metadata, found"
            f" {shorten_list(others)}"
        )
    return splits
