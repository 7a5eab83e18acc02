"""Images and labels are found wherever they are kept, and what is wrong with them is said in one line."""

import contextlib
import io
import json
import os
import re
import shutil
import struct
import tempfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
from datasets.table import InMemoryTable
from image_folders import (
    CLASSES,
    color_of,
    encoded,
    image_bytes,
    image_rows,
    labelled_rows,
    save_parquet,
    save_splits,
    write_files,
    write_images,
)

from crossvit.training.errors import CommandError, ImageDatasetError
from crossvit.training.image_datasets import ImageSource, LabelledImages
from crossvit.training.image_files import read_image


assert issubclass(ImageDatasetError, CommandError)

STRING, INTEGER = datasets.Value("string"), datasets.Value("int64")
NAMED = datasets.ClassLabel(names=list(CLASSES))
SOME_OF = datasets.List(NAMED)
LABELS = [0, 1, 2] * 4


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def source(tmp_path):
    return tmp_path / "source"


def load(source, **options) -> LabelledImages:
    return LabelledImages.load(ImageSource(str(source), **options))


def prepare(source, fraction=0.25, seed=0, images=True, **options) -> LabelledImages:
    loaded = load(source, **options).on_disk(Path(tempfile.mkdtemp(dir=source.parent)))
    loaded.check_labels()
    if images:
        loaded.check_images()
    return loaded.for_training(fraction, seed)


def refused(source, **options) -> str:
    with pytest.raises(ImageDatasetError) as caught:
        prepare(source, **options)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def images_by_color(images: LabelledImages, split: str) -> dict[tuple[int, int, int], str]:
    rows = list(images.splits[split])
    found = {read_image(row["image"]).getpixel((0, 0)): images.class_names[row["labels"]] for row in rows}
    assert len(found) == len(rows) and all(set(row) == {"image", "labels"} for row in rows)
    return found


def expected_images(split: int = 0) -> dict[tuple[int, int, int], str]:
    return {color_of(label, number, split): name for label, name in enumerate(CLASSES) for number in range(4)}


WRITERS = {
    "folder": lambda folder: write_images(folder, ["train", "validation"]),
    "saved": lambda folder: save_splits(folder, train=labelled_rows(), validation=labelled_rows(split=1)),
    "parquet": lambda folder: save_parquet(folder, train=labelled_rows(), validation=labelled_rows(split=1)),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["disk", "stream"])
@pytest.mark.parametrize("kind", WRITERS)
def test_sources_with_a_validation_split(source, kind, streaming):
    WRITERS[kind](source)
    images = prepare(source, streaming=streaming)
    assert images.class_names == list(CLASSES) and not images.multi_label
    assert set(images.splits) == {"train", "validation"}
    assert images_by_color(images, "train") == expected_images()
    assert images_by_color(images, "validation") == expected_images(1)
    assert isinstance(images.splits["train"], datasets.IterableDataset) == streaming
    assert isinstance(images.splits["validation"], datasets.Dataset)


@pytest.mark.parametrize(
    "write",
    [
        write_images,
        lambda folder: labelled_rows().save_to_disk(folder),
        lambda folder: save_parquet(folder, train=labelled_rows()),
    ],
    ids=["folder", "saved", "parquet"],
)
def test_sources_without_a_validation_split(source, write):
    write(source)
    images = prepare(source)
    held_out = images_by_color(images, "validation")
    assert len(held_out) == 3 and images_by_color(images, "train") | held_out == expected_images()
    assert "split 'validation'" in refused(source, streaming=True)


def test_streams_see_validation_images_that_have_changed(source):
    save_parquet(source, train=labelled_rows(), validation=labelled_rows(split=1))
    prepare(source, streaming=True)
    shutil.rmtree(source)
    save_parquet(source, train=labelled_rows(), validation=labelled_rows(split=2))
    assert images_by_color(prepare(source, streaming=True), "validation") == expected_images(2)


def test_files_that_are_no_images_of_a_class_do_not_matter(source):
    write_files(
        write_images(source), {"README.md": b"x", ".git/a/b": b"x", "__MACOSX/ant": b"x", "ant/Thumbs.db": b"x"}
    )
    assert prepare(source).class_names == list(CLASSES)


@pytest.mark.parametrize(
    "values, feature, names",
    [
        (["bee", "ant", "cow"], STRING, ["ant", "bee", "cow"]),
        ([10, 9, 101], INTEGER, ["9", "10", "101"]),
        ([True, False, True], datasets.Value("bool"), ["False", "True"]),
        ([2, 0, 1], NAMED, ["ant", "bee", "cow"]),
    ],
    ids=["string", "int", "bool", "ClassLabel"],
)
def test_kinds_of_labels(source, values, feature, names):
    save_splits(source, train=image_rows(values * 4, feature), validation=image_rows(values, feature))
    images = prepare(source)
    assert images.class_names == names and not images.multi_label
    said = [names[value] for value in values] if feature is NAMED else [str(value) for value in values]
    for split, times in (("train", 4), ("validation", 1)):
        assert [names[label] for label in images.splits[split]["labels"]] == said * times


def test_metadata_names_the_label_of_each_file(source):
    rows = [{"file_name": f"{number}.png", "label": CLASSES[number % 3]} for number in range(12)]
    files = {row["file_name"]: image_bytes(color_of(number % 3, number)) for number, row in enumerate(rows)}
    write_files(source, {**files, "metadata.jsonl": "\n".join(map(json.dumps, rows)).encode()})
    images = prepare(source)
    found = images_by_color(images, "train") | images_by_color(images, "validation")
    assert found == {color_of(number % 3, number): CLASSES[number % 3] for number in range(12)}


NAME_LISTS = [["owl", "ant"], ["bee"], [], ["ant"]] * 3


def test_metadata_with_lists_of_labels(source):
    rows = [{"file_name": f"{number}.png", "labels": names} for number, names in enumerate(NAME_LISTS)]
    files = {row["file_name"]: image_bytes((0, number, 0)) for number, row in enumerate(rows)}
    write_files(source, {**files, "metadata.jsonl": "\n".join(map(json.dumps, rows)).encode()})
    images = prepare(source)
    assert images.multi_label and images.class_names == ["ant", "bee", "owl"]
    assert (len(images.splits["train"]), len(images.splits["validation"])) == (9, 3)
    for split in images.splits.values():
        for row in split:
            number = read_image(row["image"]).getpixel((0, 0))[1]
            assert [images.class_names[index] for index in row["labels"]] == NAME_LISTS[number]


@pytest.mark.parametrize("streaming", [False, True], ids=["disk", "stream"])
@pytest.mark.parametrize("kind", [datasets.List, datasets.LargeList])
def test_lists_of_named_labels(source, kind, streaming):
    lists = [[0, 2], [], [1]]
    save_splits(source, train=image_rows(lists * 4, kind(NAMED)), validation=image_rows(lists, kind(NAMED)))
    images = prepare(source, streaming=streaming)
    assert images.multi_label and images.class_names == list(CLASSES)
    assert [row["labels"] for row in images.splits["train"]] == lists * 4


def test_columns_are_recognized_or_named(source):
    picture, other = datasets.Image(), {"bytes": image_bytes(), "path": None}
    features = datasets.Features(
        {"photo": picture, "sketch": picture, "kind": NAMED, "place": STRING, "size": INTEGER}
    )
    columns = {
        "photo": [other] * 6,
        "sketch": [other] * 6,
        "kind": [0, 1] * 3,
        "place": ["a", "b"] * 3,
        "size": [1] * 6,
    }
    datasets.Dataset.from_dict(columns, features).save_to_disk(source)
    assert "photo, sketch, kind, place, size" in refused(source) and "--image_column" in refused(source)
    images = prepare(source, image_column="sketch")
    assert images.class_names == list(CLASSES)
    assert prepare(source, image_column="photo", label_column="place").class_names == ["a", "b"]
    assert "--image_column pohto" in refused(source, image_column="pohto")
    assert "--label_column king" in refused(source, image_column="photo", label_column="king")
    assert "'kind' holds no images" in refused(source, image_column="kind")
    assert "photo" in refused(source, image_column="photo", label_column="photo")


def test_usual_names_decide_between_columns(source):
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image(), "labels": STRING, "id": STRING})
    picture, mask = {"bytes": image_bytes((1, 2, 3)), "path": None}, {"bytes": image_bytes((9, 9, 9)), "path": None}
    columns = {"image": [picture] * 4, "mask": [mask] * 4, "labels": ["a", "b"] * 2, "id": list("wxyz")}
    datasets.Dataset.from_dict(columns, features).save_to_disk(source)
    images = prepare(source)
    assert images.class_names == ["a", "b"]
    assert read_image(images.splits["train"][0]["image"]).getpixel((0, 0)) == (1, 2, 3)


def test_hold_out_takes_its_part_of_each_class(source):
    save_splits(source, train=image_rows([0] * 40 + [1] * 20 + [2] * 10))
    images = load(source)
    parts = images.for_training(0.2, seed=1).splits
    assert Counter(parts["validation"]["labels"]) == {0: 8, 1: 4, 2: 2}
    names = {name: [image["path"] for image in split["image"]] for name, split in parts.items()}
    assert sorted(names["train"] + names["validation"]) == sorted(f"{number}.png" for number in range(70))
    again = load(source).for_training(0.2, seed=1).splits
    assert all([image["path"] for image in again[name]["image"]] == names[name] for name in names)
    other = load(source).for_training(0.2, seed=2).splits["validation"]
    assert {image["path"] for image in other["image"]} != set(names["validation"])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, 0.01, 0.99])
def test_hold_out_leaves_something_of_both(source, fraction):
    save_splits(source, train=image_rows(LABELS))
    assert f"--validation_fraction {fraction}" in refused(source, fraction=fraction)


def test_hold_out_of_most_images(source):
    save_splits(source, train=image_rows([0, 1, 2] * 2))
    with contextlib.suppress(ImageDatasetError):
        prepare(source, fraction=0.8)


def test_classes_of_one_image_stay_in_the_training(source):
    save_splits(source, train=image_rows([0, 1] * 10 + [2]))
    for seed in range(8):
        assert 2 in prepare(source, seed=seed, images=False).splits["train"]["labels"]


def test_data_of_the_user_stays_as_it_is(source):
    save_splits(source, train=image_rows(LABELS))
    before = sorted(source.rglob("*"))
    prepare(source)
    assert sorted(source.rglob("*")) == before


def test_test_splits_without_labels_are_left_out(source):
    splits = {"train": image_rows(LABELS), "validation": image_rows(LABELS)}
    save_splits(source, **splits, test=image_rows([-1, -1]))
    assert set(prepare(source).splits) == {"train", "validation"}
    assert set(prepare(source, streaming=True).splits) == {"train", "validation"}
    shutil.rmtree(source)
    save_splits(source, **splits, test=image_rows([1, 0]))
    assert prepare(source).splits["test"]["labels"][:] == [1, 0]
    shutil.rmtree(source)
    save_splits(source, **splits, test=image_rows([-1, 0]))
    assert "0.png: -1" in refused(source)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not an image"),
        (b"no image", "not an image"),
        (encoded(PIL.Image.effect_noise((64, 64), 90))[:-2000], "truncated"),
        (encoded(PIL.Image.effect_noise((64, 64), 90), "JPEG")[:-500], "truncated"),
        (image_bytes(size=(64, 64))[:40] + b"\xff" * 60, ""),
    ],
    ids=["empty", "text", "truncated png", "truncated jpeg", "corrupt"],
)
def test_damaged_images_are_named(source, content, message):
    write_files(write_images(source), {"bee/broken.png": content})
    found = refused(source)
    assert f"{source}/bee/broken.png: " in found and message in found and "1 of " in found
    assert len(prepare(source, images=False).splits["train"]) == 10


def test_many_damaged_images_are_counted(source):
    write_files(write_images(source, ["train", "val"]), {f"train/bee/broken{number}.png": b"" for number in range(9)})
    found = refused(source)
    assert "9 of 21 images of 'train'" in found and found.count("broken") == 5 and "4 more" in found


def test_images_of_processes_keep_their_row(source, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    processes, map_rows = [], datasets.Dataset.map

    def spy(self, *args, **kwargs):
        processes.append(kwargs.get("num_proc"))
        return map_rows(self, *args, **kwargs)

    monkeypatch.setattr(datasets.Dataset, "map", spy)
    contents = [{"bytes": image_bytes(), "path": None}] * 1100
    contents[3] = contents[1003] = {"bytes": b"x", "path": None}
    save_splits(source, train=image_rows([0, 1] * 550, images=contents), validation=image_rows([0, 1]))
    found = refused(source)
    assert "2 of 1100" in found and "(row 3)" in found and "(row 1003)" in found
    assert 2 in processes


def test_rows_are_those_of_the_user(source):
    contents = [{"bytes": image_bytes(), "path": None}] * 12
    contents[7] = {"bytes": b"x", "path": None}
    save_splits(source, train=image_rows(LABELS, images=contents))
    assert "row 7)" in refused(source)


def test_processes_share_the_check(source):
    save_splits(source, train=image_rows(LABELS), validation=image_rows([0]))
    images = load(source)
    for process in range(5):  # most have no image of the validation to look at
        images.check_images(process, 5)
    broken = [{"bytes": b"x", "path": f"{number}.png"} for number in range(12)]
    shutil.rmtree(source)
    save_splits(source, train=image_rows(LABELS, images=broken), validation=image_rows([0]))
    images, named = load(source), []
    for process in range(5):
        with pytest.raises(ImageDatasetError) as caught:
            images.check_images(process, 5)
        named += re.findall(r"\(row (\d+)\)", str(caught.value))
    assert named == list(map(str, range(12)))


def test_images_that_are_not_there(source, tmp_path):
    rows = [{"file_name": f"{number}.png", "label": CLASSES[number % 3]} for number in range(12)]
    files = {row["file_name"]: image_bytes() for row in rows[:-1]}
    write_files(source, {**files, "metadata.jsonl": "\n".join(map(json.dumps, rows)).encode()})
    assert f"{source}/11.png: No such file" in refused(source)
    shutil.rmtree(source)
    save_splits(source, train=image_rows(LABELS, images=[None, *[{"bytes": image_bytes(), "path": None}] * 11]))
    assert "row" in refused(source)


def saved_with(labels: list, feature=NAMED) -> datasets.Dataset:
    """Rows whose labels the library would not let pass."""
    rows = image_rows([0] * len(labels))
    table = rows.data.table.set_column(1, "label", [labels]).replace_schema_metadata(None)
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    return datasets.Dataset(InMemoryTable(table), datasets.DatasetInfo(features=features))


@pytest.mark.parametrize("wrong", [-1, 3, None])
def test_labels_outside_the_range(source, wrong):
    save_splits(source, train=saved_with([0, 1, 2, wrong] * 3), validation=image_rows([0, 1]))
    found = refused(source)
    assert "'train'" in found and "0 to 2" in found
    shown = "no label" if wrong is None else wrong
    assert found.endswith(f": 3.png: {shown}; 7.png: {shown}; 11.png: {shown}")
    shutil.rmtree(source)
    save_splits(source, train=saved_with([0, 1, 2, wrong] * 3))
    found = refused(source)
    assert "png: " in found


@pytest.mark.parametrize("wrong", [[0, -1], [5], None])
def test_lists_of_labels_outside_the_range(source, wrong):
    save_splits(source, train=saved_with([[0, 1], [2], wrong] * 2, SOME_OF), validation=image_rows([[0]], SOME_OF))
    shown = "no label" if wrong is None else wrong
    assert refused(source).endswith(f": 2.png: {shown}; 5.png: {shown}")


def test_lists_of_names_that_are_missing(source):
    save_splits(source, train=image_rows([["ant"], None, ["bee"]] * 4, datasets.List(STRING)))
    found = refused(source)
    assert re.search(r"\b[147]\.png: ", found) and not re.search(r"\b[0235]\.png: ", found)


def test_classes_that_only_validation_shows(source):
    write_images(source, ["train"], CLASSES)
    write_images(source, ["validation"], [*CLASSES, "dog", "elk"])
    found = refused(source)
    assert "'validation'" in found and f"dog ({source}/validation/dog/" in found and "elk (" in found
    shutil.rmtree(source)
    save_splits(source, train=image_rows([0, 1] * 3), validation=image_rows([0, 2]))
    assert "'validation'" in refused(source) and "cow" in refused(source)
    shutil.rmtree(source)
    save_splits(source, train=image_rows([[0], [1]], SOME_OF), validation=image_rows([[0, 2]], SOME_OF))
    assert "'validation'" in refused(source) and "cow" in refused(source)


@pytest.mark.parametrize(
    "feature, values", [(STRING, ["ant", "bee", "cow"]), (INTEGER, [4, 9, 17])], ids=["str", "int"]
)
def test_values_that_only_validation_shows(source, feature, values):
    save_splits(source, train=image_rows(values[:2] * 3, feature), validation=image_rows(values, feature))
    found = refused(source)
    assert "'validation'" in found and "2.png" in found and "1.png" not in found
    assert str(values[2]) in found


def test_splits_that_number_their_classes_differently(source):
    reordered = datasets.ClassLabel(names=["cow", "bee", "ant"])
    save_splits(source, train=image_rows(LABELS), validation=image_rows([0, 1], reordered))
    with contextlib.suppress(ImageDatasetError):
        images = prepare(source)
        assert [images.class_names[label] for label in images.splits["validation"]["labels"]] == ["cow", "bee"]


def test_splits_with_other_columns(source):
    save_splits(source, train=image_rows(LABELS), validation=image_rows(LABELS).rename_column("label", "kind"))
    assert "validation" in refused(source)


@pytest.mark.parametrize(
    "feature, value",
    [
        (datasets.Value("float32"), 0.5),
        (datasets.List(datasets.List(INTEGER)), [[1]]),
        ({"name": STRING}, {"name": "ant"}),
    ],
    ids=["float", "nested", "struct"],
)
def test_labels_that_are_no_classes(source, feature, value):
    save_splits(source, train=image_rows([value] * 4, feature))
    assert "labels must be" in refused(source) and str(source) in refused(source)


def test_streams_need_named_labels(source):
    save_splits(source, train=image_rows(list("abc"), STRING), validation=image_rows(list("abc"), STRING))
    assert "labels of a stream need names" in refused(source, streaming=True)


@pytest.mark.parametrize(
    "content, label, message", [(b"x", 1, "broken.png: not an image"), (None, -1, "broken.png: label -1")]
)
def test_first_rows_of_streams_are_looked_at(source, content, label, message):
    rows = image_rows(
        [label, 1], images=[{"bytes": content or image_bytes(), "path": name} for name in ("broken.png", "b")]
    )
    save_splits(source, train=rows, validation=image_rows([0, 1]))
    assert message in refused(source, streaming=True)


def test_empty_classes_are_named(source):
    (write_images(source, ["train"]) / "train" / "dog").mkdir()
    assert f"{source}/train/dog: " in refused(source)
    write_files(source, {"train/dog/notes.txt": b"x"})
    assert f"{source}/train/dog: " in refused(source)


def test_places_that_hold_no_images_with_labels(source, tmp_path):
    assert str(source) in refused(source)
    source.mkdir()
    assert str(source) in refused(source)
    (tmp_path / "image.png").write_bytes(image_bytes())
    assert f"{tmp_path}/image.png: a file" in refused(tmp_path / "image.png")
    write_images(source, classes=["."])
    assert f"{source}: which column has the labels?" in refused(source)
    shutil.rmtree(source)
    write_images(source, ["test"])
    assert "no split 'train', but 'test'" in refused(source)
    shutil.rmtree(source)
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(source)
    assert f"{source}: which column has the images? It has text, label" in refused(source)
    shutil.rmtree(source)
    write_files(source, {"train.parquet": b"PAR1"})
    assert str(source) in refused(source)
    shutil.rmtree(source)
    save_splits(source, train=image_rows(LABELS), validation=image_rows(LABELS).select([]))
    assert str(source) in refused(source)


def decoded(content: bytes) -> np.ndarray:
    image = read_image({"bytes": content, "path": None})
    assert image.mode == "RGB"
    return np.asarray(image)


def test_single_pixels_are_images(source):
    save_splits(source, train=image_rows(LABELS, images=[{"bytes": image_bytes(size=(1, 1)), "path": None}] * 12))
    assert read_image(prepare(source).splits["train"][0]["image"]).size == (1, 1)


@pytest.mark.parametrize(
    "content, color, tolerance",
    [
        (image_bytes((0, 255, 255, 0), mode="CMYK", format="JPEG", quality=100), (255, 0, 0), 3),
        (image_bytes((255, 0, 0, 0), mode="CMYK", format="TIFF"), (0, 255, 255), 0),
        (encoded(PIL.Image.new("RGB", (8, 8), (10, 20, 30)).quantize(4)), (10, 20, 30), 0),
        (image_bytes((10, 20, 30, 5), mode="RGBA"), (10, 20, 30), 0),
        (image_bytes((77, 5), mode="LA"), (77, 77, 77), 0),
        (image_bytes(77, mode="L"), (77, 77, 77), 0),
        (image_bytes(1, mode="1"), (255, 255, 255), 0),
        (image_bytes((10, 20, 30), format="WEBP", lossless=True), (10, 20, 30), 0),
        (image_bytes((10, 20, 30), format="GIF"), (10, 20, 30), 0),
    ],
    ids=[
        "cmyk",
        "cmyk tiff",
        "palette",
        "alpha",
        "grey alpha",
        "grey",
        "bits",
        "webp",
        "gif",
    ],
)
def test_images_of_all_modes_become_rgb(content, color, tolerance):
    pixels = decoded(content)
    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels.astype(int) - color).max() <= tolerance


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_images_that_would_be_cut_off_at_8_bits_are_refused(format):
    content = encoded(PIL.Image.fromarray(np.full((8, 8), 32768, np.uint16)), format)
    with pytest.raises(ImageDatasetError, match=r"more than 8 bits"):
        decoded(content)


TURNS = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels.swapaxes(0, 1), 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNS)
def test_images_are_turned_upright(orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 3), dtype=np.uint8)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    content = encoded(PIL.Image.fromarray(pixels), exif=exif)
    np.testing.assert_array_equal(decoded(content), TURNS[orientation](pixels))


def test_odd_exif_of_a_sound_image():
    entries = [struct.pack(">HHI4s", 0x0101, 2, 3, b"me\0\0"), struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)]
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + b"".join(entries) + bytes(4)
    content = image_bytes(size=(8, 4), format="JPEG", exif=exif)
    assert np.asarray(PIL.Image.open(io.BytesIO(content)).convert("RGB")).shape == (4, 8, 3)
    with contextlib.suppress(ImageDatasetError):
        assert decoded(content).shape == (8, 4, 3)


def test_broken_headers_of_any_format():
    content = image_bytes(format="DDS")
    content = content[:80] + bytes(4) + content[84:]
    with pytest.raises(NotImplementedError):
        PIL.Image.open(io.BytesIO(content))
    with pytest.raises(ImageDatasetError, match=r"some\.dds"):
        read_image({"bytes": content, "path": "some.dds"})


def test_decompression_bombs(source, monkeypatch):
    write_files(write_images(source), {"ant/bomb.png": image_bytes(size=(60, 60))})
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    found = refused(source)
    assert f"{source}/ant/bomb.png: " in found and "3600 pixels" in found
