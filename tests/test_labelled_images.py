"""Images and labels are found wherever they are kept, none is lost without a word, and what is wrong is named."""

import itertools
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.features
import PIL.Image
import pytest
from common.data_sources import ImageSource
from common.errors import CommandError
from common.images import decode_image
from common.labelled_images import LabelledImages
from common.workflow import transformed
from image_folders import CLASSES, encoded, image_bytes, image_rows, write_files, write_images, write_pairs, write_rows
from torch.utils.data import DataLoader

from crossvit import CrossViTImageProcessor
from crossvit.training.augmentation import AugmentationArguments, EvaluationTransform, TrainingTransform


LABELS = [0, 1, 2] * 4
STRING, INTEGER = datasets.Value("string"), datasets.Value("int64")
SOME_OF = datasets.List(datasets.ClassLabel(names=CLASSES))


@pytest.fixture
def source(tmp_path):
    return tmp_path / "data"


def load(source, mask_column=None, **options) -> LabelledImages:
    return LabelledImages.load(ImageSource(str(source), **options), mask_column)


def prepare(source, fraction: float = 0.25, seed: int = 0, **options) -> LabelledImages:
    images = load(source, **options).for_training(fraction, seed)
    images.check_images()
    return images


def refused(source, **options) -> str:
    with pytest.raises(CommandError) as caught:
        prepare(source, **options)
    return str(caught.value)


def save(folder, **splits) -> None:
    datasets.DatasetDict(splits).save_to_disk(folder)


def save_all_ways(splits: datasets.DatasetDict, folder) -> list[Path]:
    """Saves splits with `save_to_disk` and as parquet files; returns the folders."""
    splits.save_to_disk(folder / "saved")
    (folder / "parquet").mkdir()
    for name, split in splits.items():
        split.to_parquet(folder / "parquet" / f"{name}-00000-of-00001.parquet")
    return [folder / "saved", folder / "parquet"]


def contents(split, column: str = "image") -> list[tuple]:
    """The color and label of each image."""
    return sorted((decode_image(row[column]).getpixel((0, 0)), row["labels"]) for row in split)


def test_folders_saved_data_sets_parquet_and_streams_hold_the_same_images(source, tmp_path):
    write_images(source, ["train", "val"])
    images = load(source)
    assert images.class_names == CLASSES and not images.multi_label
    assert images.summary() == "Images: 12 train, 12 validation; 3 classes: ant, bee, cow"
    expected = {
        name: sorted(((50 * label, number, 100 * part), label) for label in range(3) for number in range(4))
        for part, name in enumerate(("train", "validation"))
    }
    loaded = datasets.load_dataset("imagefolder", data_dir=str(source))
    for place, streaming in itertools.product((source, *save_all_ways(loaded, tmp_path)), (False, True)):
        found = load(place, streaming=streaming)
        assert {name: contents(split) for name, split in found.splits.items()} == expected, (place, streaming)
        assert isinstance(found.splits["train"], datasets.IterableDataset) == streaming


def test_file_names_make_no_splits(source):
    names = ("toy_train.png", "unit-test.png", "dev.png", "Test (1).PNG", "validation[2].png")
    write_files(write_images(source), {f"bee/{name}": image_bytes() for name in names})
    found = load(source).splits
    assert found.keys() == {"train"} and len(found["train"]) == 17


def test_names_of_folders_are_not_patterns(tmp_path):
    write_images(tmp_path / "photos [1]*", classes=["ant [2]", "bee?"])
    assert load(tmp_path / "photos [1]*").class_names == ["ant [2]", "bee?"]


@pytest.mark.skipif(not PIL.features.check("avif"), reason="a version of Pillow without this format")
@pytest.mark.parametrize("streaming", [False, True])
def test_avif_images_are_read(source, streaming):
    files = {f"{name}/{number}.avif": image_bytes(format="AVIF") for name in CLASSES for number in range(3)}
    write_images(write_files(source, files), images=1)
    assert len(list(load(source, streaming=streaming).splits["train"])) == 12


def test_a_class_may_be_called_like_a_split(source):
    write_images(source, classes=["bus", "train", "tram"])
    assert load(source).class_names == ["bus", "train", "tram"]


@pytest.mark.parametrize(
    "extra, message",
    [
        ("extras/cow/0.png", "beside the splits train, val there must be no other folders and no metadata"),
        ("metadata.jsonl", "beside the splits train, val there must be no other folders and no metadata"),
        ("Valid/cow/0.png", "two of the splits Valid, train, val map to the same name"),
    ],
    ids=["folder", "metadata", "second split"],
)
def test_what_lies_beside_splits_is_not_left_out_in_silence(source, extra, message):
    write_files(write_images(source, ["train", "val"]), {extra: image_bytes()})
    assert message in refused(source)


def test_images_that_are_not_found_are_an_error(source):
    write_files(write_images(source, ["train", "val"]), {"0.png": image_bytes()})
    message = refused(source)
    assert "1 of 25 image files are skipped" in message and f"{source}/0.png" in message


def test_metadata_may_name_several_images_of_a_row(source, tmp_path):
    write_pairs(source, {"train": 8, "val": 4})
    columns = {"image_columns": ["photo", "scan"], "mask_column": "scan"}
    images = prepare(source, **columns)
    assert (images.image_columns, images.mask_column) == (["photo", "scan"], "scan")
    saved = save_all_ways(
        datasets.DatasetDict(images.splits), tmp_path
    )  # its labels are classes, as a stream needs them
    for place, streaming in ((source, False), *itertools.product(saved, (False, True))):
        found = prepare(place, streaming=streaming, **columns)
        assert {name: len(list(split)) for name, split in found.splits.items()} == {"train": 8, "validation": 4}
        for number, row in enumerate(found.splits["train"]):
            light = [np.asarray(decode_image(row[column])).mean() > 128 for column in ("photo", "scan")]
            assert light == [number % 2 == 1, number // 2 % 2 == 1]
            assert found.class_names[row["labels"]] == ("same" if light[0] == light[1] else "different")


def test_columns_of_images_are_those_of_the_branches(source):
    write_pairs(source, {"train": 4, "val": 4})
    assert load(source, image_columns=["scan"]).splits["train"].column_names == ["scan", "labels"]
    assert load(source, mask_column="scan").image_columns == ["photo"]
    assert load(source, image_columns=["scan", "photo"]).image_columns == ["scan", "photo"]
    assert "has no column depth, only label, photo, scan" in refused(source, image_columns=["photo", "depth"])
    assert "has no column depth" in refused(source, image_columns=["photo"], mask_column="depth")
    assert "ambiguous image column, candidates: label, photo, scan; name one with --image_columns" in refused(source)


def test_all_images_of_a_row_are_checked(source):
    write_pairs(source, {"train": 4, "val": 4})
    columns = {"image_columns": ["photo", "scan"]}
    write_files(source, {"train/scans/2.png": b"no image"})
    message = refused(source, **columns)
    assert message.startswith("1 of 4 images of 'train' cannot be read: row 2") and "scans/2.png" in message
    (source / "train/scans/2.png").unlink()
    message = refused(source, **columns)
    assert message == f"{source}: the metadata names files that are not there: {source}/train/scans/2.png"
    write_files(source, {"train/scans/2.png": image_bytes(), "val/scans/9.png": image_bytes()})
    message = refused(source, **columns)
    assert message.startswith(f"{source}: 1 of 17 image files are skipped") and f"{source}/val/scans/9.png" in message


def test_masks_without_white_are_named(source):
    """Masks of zeros and ones would pass for black ones. A black one has no object."""
    write_pairs(source, {"train": 4, "val": 4})
    write_files(source, {"train/scans/0.png": image_bytes(0, mode="L"), "train/scans/3.png": image_bytes(1, mode="L")})
    prepare(source, image_columns=["photo", "scan"])
    message = refused(source, mask_column="scan")
    assert (
        message.startswith("1 of 4 images of 'train' cannot be read: row 3") and "of the mask is 1 of 255" in message
    )


def test_rows_that_lack_an_image_are_named(source):
    rows = image_rows([0, 1, 2]).add_column("scan", [{"bytes": image_bytes(), "path": None}] * 2 + [None])
    save(
        source, train=rows.cast_column("scan", datasets.Image()), validation=image_rows([0]).add_column("scan", [None])
    )
    message = refused(source, image_columns=["image", "scan"])
    assert message.startswith("1 of 3 images of 'train' cannot be read: row 2, an image is missing")


def test_several_labels_by_metadata(source):
    for split in ("train", "test"):
        rows = [{"file_name": f"{row}.png", "labels": CLASSES[: row % 4]} for row in range(8)]
        write_rows(source / split, {f"{row}.png": image_bytes((row, 0, 0)) for row in range(8)}, rows)
    images = load(source)
    assert images.multi_label and images.class_names == CLASSES
    for split in images.splits.values():
        assert contents(split) == [((row, 0, 0), list(range(row % 4))) for row in range(8)]
    assert images.for_training(0.25, 0).splits.keys() == {"train", "validation", "test"}


@pytest.mark.parametrize(
    "feature, values", [(STRING, ["ant", "bee", "cow"]), (INTEGER, [4, 9, 17])], ids=["texts", "numbers"]
)
def test_labels_without_names_become_classes(source, feature, values):
    save(source, validation=image_rows(values[:0:-1], feature), train=image_rows(values * 4, feature))
    images = load(source)
    assert images.class_names == list(map(str, values))
    assert images.splits["train"]["labels"][:] == LABELS and images.splits["validation"]["labels"][:] == [2, 1]
    assert "give --class_names" in refused(source, streaming=True)
    # The number 1 is not the class of index 1
    save(
        source.with_name("other"),
        train=image_rows(values * 4, feature),
        test=image_rows([type(values[0])(1)], feature),
    )
    assert "labels of 'test' that 'train' does not have: row 0: " in refused(source.with_name("other"))


def test_columns_are_found_or_named(source):
    rows = image_rows(LABELS).rename_columns({"image": "photo", "label": "animal"})
    save(source, train=rows.add_column("id", list(range(12))))
    found = load(source)
    assert found.image_columns == ["photo"] and found.splits["train"].column_names == ["photo", "labels"]
    assert contents(found.splits["train"], "photo") == [((0, 0, row), label) for row, label in enumerate(LABELS)]
    two = source.with_name("two")
    save(two, train=rows.map(lambda row: {"copy": row["photo"]}))
    assert "ambiguous image column, candidates: photo, animal, copy; name one with --image_columns" in refused(two)
    assert len(load(two, image_columns=["copy"]).splits["train"]) == 12
    assert "has no column size, only photo, animal, copy" in refused(two, image_columns=["copy"], label_column="size")


def test_validation_images_are_held_out_in_the_proportions_of_the_classes(source):
    save(source, train=image_rows([0] * 40 + [1] * 20 + [2] * 10))
    images = prepare(source, 0.2)
    assert Counter(images.splits["validation"]["labels"]) == {0: 8, 1: 4, 2: 2}
    assert sorted(contents(images.splits["train"]) + contents(images.splits["validation"])) == contents(
        load(source).splits["train"]
    )
    assert contents(prepare(source, 0.2).splits["validation"]) == contents(images.splits["validation"])
    assert contents(prepare(source, 0.2, seed=1).splits["validation"]) != contents(images.splits["validation"])
    assert "--validation_fraction 0.01: " in refused(source, fraction=0.01)
    assert "a stream cannot be split" in refused(source, streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_test_split_without_labels_is_left_out(source, streaming):
    save(source, train=image_rows(LABELS), test=image_rows([-1, -1]))
    assert load(source, streaming=streaming).splits.keys() == {"train"}


def test_fingerprints_are_those_of_the_images_labels_and_splits(source):
    rows = image_rows([0, 1, 2])
    versions = (
        {"train": rows, "validation": rows},
        {"train": image_rows([0, 1, 2, 0]), "validation": rows},  # another image
        {"train": image_rows([0, 2, 1]), "validation": rows},  # other labels
        {"train": rows, "test": rows},  # another split
    )
    fingerprints = set()
    for number, splits in enumerate(versions):
        save(source / str(number), **splits)
        fingerprints.add(load(source / str(number)).fingerprint())
    assert len(fingerprints) == len(versions)


@pytest.mark.parametrize("wrong", [-1, None])
def test_labels_outside_the_range_are_named(source, wrong):
    save(source, train=image_rows([0, 1, 2, wrong] * 3), validation=image_rows([0, 1]))
    assert refused(source) == (
        "3 labels of 'train' are missing or not in the range from 0 to 2:"
        f" row 3: {wrong}, row 7: {wrong}, row 11: {wrong}"
    )
    lists = source.with_name("lists")
    save(lists, train=image_rows([[0, 1], None if wrong is None else [2, wrong]], SOME_OF))
    assert "row 1: " in refused(lists)


def test_classes_that_only_the_validation_has_are_named(source):
    save(source, train=image_rows([0, 1] * 3), validation=image_rows([0, 2]))
    assert refused(source) == "classes with images in 'validation' but none in 'train': cow"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"no image", "not an image of the formats JPEG, "),
        (encoded(PIL.Image.effect_noise((64, 64), 90))[:-2000], "truncated"),
        (
            encoded(PIL.Image.fromarray(np.full((8, 8), 32768, np.uint16))),
            "instead of 8 bits per channel. Scale the values",
        ),
    ],
    ids=["text", "truncated", "16 bits"],
)
def test_damaged_images_are_named(source, content, message):
    write_files(write_images(source, ["train", "val"]), {f"train/bee/broken{n}.png": content for n in range(6)})
    found = refused(source)
    assert found.startswith("6 of 18 images of 'train' cannot be read: row ") and found.endswith(" and 1 more")
    assert f"{source}/train/bee/broken0.png: " in found and message in found
    # Repaired, they are read again
    write_files(source, {f"train/bee/broken{n}.png": image_bytes() for n in range(6)})
    for n in range(6):
        os.utime(source / f"train/bee/broken{n}.png", (2_000_000_000, 2_000_000_000))
    assert len(prepare(source).splits["train"]) == 18


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("mask_column", [None, "scan"])
@pytest.mark.parametrize("training", [False, True])
def test_images_are_decoded_once_and_not_encoded(monkeypatch, source, tmp_path, streaming, mask_column, training):
    write_pairs(source, {"train": 8, "val": 4})
    columns = {"image_columns": ["photo", "scan"], "mask_column": mask_column}
    # With classes as labels, as a stream needs them
    datasets.DatasetDict(load(source, **columns).splits).save_to_disk(tmp_path / "saved")
    images = load(tmp_path / "saved" if streaming else source, streaming=streaming, **columns)
    processor = CrossViTImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transform: Any = EvaluationTransform(processor, images.image_columns, mask_column)
    if training:
        transform = TrainingTransform(AugmentationArguments(), processor, images.image_columns, mask_column)

    opened, open_file = [], PIL.Image.open
    monkeypatch.setattr(PIL.Image, "open", lambda *args, **options: opened.append(args) or open_file(*args, **options))
    monkeypatch.setattr(PIL.Image.Image, "save", lambda *args, **options: pytest.fail("an image is encoded"))
    split = images.splits["train"]
    shuffled = split.shuffle(0, **({"buffer_size": 4} if streaming else {}))
    rows = list(transformed(shuffled, transform))
    assert len(rows) == 8 and all(row["pixel_values"].shape == (2, 3, 16, 16) for row in rows)
    assert len(opened) == 16


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_was_not_checked_is_named_in_training(source, num_workers):
    write_files(write_images(source), {f"{name}/0.png": b"no image" for name in CLASSES})
    transform = TrainingTransform(AugmentationArguments(), CrossViTImageProcessor())
    rows = transformed(load(source).splits["train"], transform)
    with pytest.raises(CommandError, match=rf"{source}/ant/0\.png: not an image of the formats"):
        list(DataLoader(rows, num_workers=num_workers, batch_size=2))


def test_transparent_images_are_counted(source):
    write_files(write_images(source), {"bee/a.png": image_bytes((1, 2, 3, 4), mode="RGBA")})
    write_files(source, {"bee/b.png": image_bytes((1, 2, 3, 255), mode="RGBA")})
    with pytest.warns(UserWarning, match=r"^1 images have transparent pixels"):
        images = prepare(source)
    colors = [color for split in images.splits.values() for color, _ in contents(split)]
    assert colors.count((1, 2, 3)) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (source / "bee" / "a.png").unlink()
        prepare(source)


def test_places_without_labelled_images_are_named(source, tmp_path):
    assert "give --data" in refused("")
    assert f"{source}: not a dataset, locally or on the Hub" in refused(source)
    assert "not a dataset, locally" in refused(write_files(tmp_path, {"image.png": image_bytes()}) / "image.png")
    (write_images(source) / "dog").mkdir()
    assert f"{source}/dog: a folder without images" in refused(source)
    write_images(tmp_path / "flat", classes=["."])
    assert "ambiguous label column" in refused(tmp_path / "flat")
    write_images(tmp_path / "test-only", ["test"])
    assert "no split 'train', only 'test'" in refused(tmp_path / "test-only")
