"""WebDataset shards and Parquet files, in folders and at URLs, hold the same images and labels, streamed or not."""

import functools
import http.server
import threading
from pathlib import Path

import datasets
import fsspec
import PIL.features
import pytest
from common.errors import CommandError
from examples_in_process import results
from image_folders import CLASSES, image_bytes, image_rows, samples, write_files, write_images, write_shard
from test_labelled_images import SOME_OF, STRING, contents, load, refused, save
from transformers import AutoConfig


SPLITS = {"train": [0, 1, 2, 2, 1, 0, 1], "validation": [2, 1, 0]}
EXPECTED = {
    split: [((0, 0, number), label) for number, label in enumerate(labels)] for split, labels in SPLITS.items()
}


@pytest.fixture
def source(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def class_names(tmp_path) -> str:
    return write_names(tmp_path / "names.txt")


def write_names(path: Path, names=CLASSES) -> str:
    path.write_text("\n".join(names) + "\n", encoding="utf-8")
    return str(path)


def write_tars(folder: Path, pattern: str = "{split}-{part}.tar") -> Path:
    """Two WebDataset shards of each split."""
    for split, labels in SPLITS.items():
        for part, first in enumerate((0, len(labels) // 2)):
            part_labels = labels[first:] if part else labels[: len(labels) // 2]
            write_shard(folder / pattern.format(split=split, part=part), samples(part_labels, first=first))
    return folder


def write_parquet(folder: Path) -> Path:
    """Two Parquet files of each split, whose labels are numbers without names."""
    for split, labels in SPLITS.items():
        rows = image_rows(labels, datasets.Value("int64"))
        (folder / split).mkdir(parents=True)
        for part in range(2):
            rows.shard(2, part).to_parquet(folder / split / f"{part}.parquet")
    return folder


@pytest.fixture
def server(source):
    """The URL of an HTTP server that lists and serves the folder."""

    class QuietHandler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    source.mkdir(exist_ok=True)
    handler = functools.partial(QuietHandler, directory=str(source))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def memory(source):
    """The URL of a copy of the folder in a file system of `fsspec`."""
    system = fsspec.filesystem("memory")
    yield lambda: system.put(f"{source}/", "/shards/", recursive=True) or "memory://shards"
    system.rm("/shards", recursive=True)


@pytest.fixture
def online(monkeypatch, tmp_path):
    """Lets `datasets` download from this machine, which it does not do while the Hub is offline."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "downloads")


@pytest.mark.parametrize("streaming", [False, True], ids=["disk", "stream"])
@pytest.mark.parametrize("place", ["names", "folders", "parquet", "glob", "file", "memory", "http", "http folder"])
def test_shards_are_found_wherever_they_are(source, class_names, server, memory, online, place, streaming):
    if place == "parquet":
        write_parquet(source)
    else:
        names = {"folders": "{split}/{part}.tar", "glob": "zoo-{split}-[{part}].tar"}
        write_tars(source, names.get(place, "zoo-{split}-{part:05}-of-00002.tar"))
    places = {
        "glob": f"{source}/zoo-*.tar",
        "file": f"file://{source}/*.tar",
        "http": f"{server}/*.tar",
        "http folder": server,
        "memory": f"{memory()}/zoo-*.tar",
    }
    images = load(places.get(place, source), class_names=class_names, streaming=streaming)
    assert images.class_names == CLASSES and not images.multi_label
    column = images.image_columns[0]
    assert {name: contents(split, column) for name, split in images.splits.items()} == EXPECTED
    if streaming:  # so that each of two processes reads its own files
        assert [split.num_shards for split in images.splits.values()] == [2, 2]


def test_urls_can_be_read_while_the_hub_is_offline_but_not_downloaded(source, class_names, server):
    write_tars(source)
    assert len(list(load(f"{server}/*.tar", streaming=True, class_names=class_names).splits["train"])) == 7
    message = refused(f"{server}/*.tar")
    assert message.startswith(f"{server}/*.tar: cannot be read as webdataset (Offline mode is enabled.")


@pytest.mark.parametrize("streaming", [False, True], ids=["disk", "stream"])
@pytest.mark.parametrize(
    "files, splits",
    [
        (["0.tar", "1.tar"], {"train": 2}),
        (["trainval-0.tar"], {"train": 1}),
        (["imagenet1k-Train-000.tar", "imagenet1k_val003.tar"], {"train": 1, "validation": 1}),
        (["eval/a/0.tar", "testing/0.tar", "training/0.tar"], {"train": 1, "validation": 1, "test": 1}),
        (["test/0.tar", ".train/1.tar", "__train/2.tar", "test/._1.tar", "test/0.txt"], {"test": 1}),
    ],
    ids=lambda value: " ".join(value),
)
def test_names_of_files_and_folders_make_splits(tmp_path, class_names, streaming, files, splits):
    source = tmp_path / "dev [1]*"  # neither a pattern nor the name of a split
    for file in files:
        write_shard(source / file, samples([0, 1, 2]))
    found = load(source, streaming=streaming, class_names=class_names).splits
    assert {name: len(list(split)) for name, split in found.items()} == {name: 3 * n for name, n in splits.items()}


@pytest.mark.parametrize(
    "files, message",
    [
        (["train-0.tar", "extra-0.tar"], "of which split are {source}/extra-0.tar? Their names have no word such as"),
        (["train/val-0.tar"], "{source}/train/val-0.tar: of which split? Its name has the words train, val"),
        (
            ["a.tar", "b.parquet"],
            "shards, Parquet files and images must be in separate folders, found a.tar, b.parquet",
        ),
        (["a.tar", "c/b.png"], "shards, Parquet files and images must be in separate folders, found c/b.png, a.tar"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_files_that_would_be_left_out_are_named(source, files, message):
    write_files(source, dict.fromkeys(files, b""))
    assert message.format(source=source) in refused(source)


def test_a_folder_of_images_may_be_a_url(source):
    assert len(load(f"file://{write_images(source)}").splits["train"]) == 12


def test_a_folder_of_images_may_have_its_metadata_in_parquet(source):
    write_files(source, {f"{number}.png": image_bytes() for number in range(4)})
    rows = {"file_name": [f"{number}.png" for number in range(4)], "label": ["ant", "bee"] * 2}
    datasets.Dataset.from_dict(rows).to_parquet(source / "metadata.parquet")
    assert load(source).splits["train"]["labels"][:] == [0, 1, 0, 1]


@pytest.mark.parametrize("streaming", [False, True], ids=["disk", "stream"])
def test_the_card_of_a_copy_from_the_hub_names_files_and_classes(source, streaming):
    write_tars(source)
    card = """---
    configs:
    - config_name: default
      data_files: [{split: train, path: validation-*.tar}]
    dataset_info:
      features:
      - {name: png, dtype: image}
      - {name: cls, dtype: {class_label: {names: {"0": ant, "1": bee, "2": cow}}}}
    ---"""
    write_files(source, {"README.md": card.replace("\n    ", "\n").encode(), "assets/preview.png": image_bytes()})
    images = load(source, streaming=streaming)
    assert images.class_names == CLASSES
    assert {name: contents(split, "png") for name, split in images.splits.items()} == {"train": EXPECTED["validation"]}


@pytest.mark.parametrize("streaming", [False, True], ids=["disk", "stream"])
def test_labels_may_be_names_in_text_files(source, class_names, streaming):
    write_shard(source / "0.tar", samples(["cow\n", "ant", "cow"], "txt"))
    options = {"streaming": streaming, "label_column": "txt"}
    assert [row["labels"] for row in load(source, class_names=class_names, **options).splits["train"]] == [2, 0, 2]
    if not streaming:
        assert load(source, **options).class_names == ["ant", "cow"]


def test_columns_of_samples_are_found_or_named(source):
    write_shard(source / "other" / "train.tar", samples([1, 2]))
    write_shard(
        source / "other" / "test.tar", {"0.png": image_bytes()}
    )  # which does not hide the labels of the others
    assert "'test' has no column cls, only __key__, __url__, png" in refused(source / "other")
    write_shard(source / "json" / "0.tar", samples(['{"label": 1}', '{"label": 2}'], "json"))
    assert "ambiguous label column, candidates: png, json, __key__, __url__; name it" in refused(source / "json")
    message = refused(source / "json", label_column="json")
    assert "labels must be names of classes or whole numbers, got {'label': Value('int64')}" in message


@pytest.mark.skipif(not PIL.features.check("avif"), reason="a version of Pillow without this format")
@pytest.mark.parametrize("streaming", [False, True], ids=["disk", "stream"])
def test_avif_images_of_shards_need_the_name_of_their_column(source, class_names, streaming):
    files = {f"{number}.avif": image_bytes((0, 0, 0), format="AVIF") for number in range(3)}
    write_shard(source / "0.tar", dict(sorted((files | {f"{number}.cls": b"1" for number in range(3)}).items())))
    options = {"streaming": streaming, "class_names": class_names}
    assert "ambiguous image column, candidates: avif, cls, __key__, __url__" in refused(source, **options)
    found = load(source, image_columns=["avif"], **options).splits["train"]
    assert contents(found, "avif") == [((0, 0, 0), 1)] * 3


@pytest.mark.parametrize("streaming", [False, True], ids=["disk", "stream"])
def test_images_of_one_set_must_have_the_same_suffix(source, class_names, streaming):
    files = {name.replace("6.png", "6.jpg"): content for name, content in samples([0, 1, 2] * 3).items()}
    write_shard(source / "train-0.tar", files)  # `datasets` looks at the first five samples
    write_shard(source / "val-0.tar", samples([0, 1, 2]))
    if not streaming:
        assert "1 of 9 images of 'train' cannot be read: row 6, an image is missing" in refused(source)
    else:
        images = load(source, streaming=True, class_names=class_names)
        with pytest.raises(CommandError, match="a row of 'train' with the label 0 has no image; in WebDataset shards"):
            list(images.splits["train"])
    files = {name.replace("1.png", "1.jpg"): content for name, content in samples([0, 1, 2]).items()}
    write_shard(source / "val-0.tar", files)
    assert "cannot be read as webdataset (" in refused(source, streaming=streaming)


@pytest.mark.parametrize(
    "labels, suffix, wrong",
    [
        ([0, 1, 2, 1, 0, 2, 3], "cls", "3"),
        ([0, 1, 2, 1, 0, 2, -1], "cls", "-1"),
        (["ant", "bee", "cow", "ant", "ant", "bee", "dog"], "txt", "'dog'"),
        (["ant", "bee", "cow", "ant", "ant", "bee", "1"], "txt", "'1'"),  # no index of a class
    ],
    ids=["number", "negative number", "name", "number as name"],
)
def test_labels_that_are_not_among_the_class_names_are_named(source, class_names, labels, suffix, wrong):
    write_shard(source / "train-0.tar", samples(labels, suffix))
    write_shard(source / "val-0.tar", samples(labels[:3], suffix))
    options = {"class_names": class_names, "label_column": suffix}
    message = refused(source, **options)
    assert message == f"labels of 'train' that --class_names {class_names} does not have: row 6: {wrong}"
    rows = iter(load(source, streaming=True, **options).splits["train"])
    assert [next(rows)["labels"] for _ in range(6)] == [0, 1, 2, *([1, 0, 2] if suffix == "cls" else [0, 0, 1])]
    known = "0, 1, 2" if suffix == "cls" else "'ant', 'bee', 'cow'"
    with pytest.raises(CommandError, match=f"^006.png of 'train': the label {wrong} is not one of {known}$"):
        next(rows)


@pytest.mark.parametrize("streaming", [False, True], ids=["disk", "stream"])
@pytest.mark.parametrize("feature, values", [(STRING, CLASSES), (datasets.Value("int32"), [0, 1, 2])], ids=str)
def test_class_names_of_several_labels(source, class_names, feature, values, streaming):
    labels = [[], [0], [2, 1], [0, 1, 2]]
    rows = image_rows([[values[label] for label in row] for row in labels], datasets.List(feature))
    save(source, train=rows)
    images = load(source, streaming=streaming, class_names=class_names)
    assert images.multi_label and images.class_names == CLASSES
    assert [row["labels"] for row in images.splits["train"]] == labels
    wrong = [values[0], values[2], "dog" if feature == STRING else 3]
    save(source.with_name("wrong"), train=image_rows([*[wrong[:1]] * 3, wrong], datasets.List(feature)))
    options = {"streaming": streaming, "class_names": class_names}
    with pytest.raises(CommandError, match="3.png of 'train': the label" if streaming else f"row 3: {wrong[2]!r}$"):
        list(load(source.with_name("wrong"), **options).splits["train"])


@pytest.mark.parametrize("streaming", [False, True], ids=["disk", "stream"])
def test_streams_of_named_classes_are_checked_too(source, streaming):
    for number, (feature, wrong) in enumerate([(None, -1), (None, None), (SOME_OF, [0, -1]), (SOME_OF, None)]):
        right = 0 if feature is None else [0]
        save(source / str(number), train=image_rows([right, right, wrong], feature))
        with pytest.raises(CommandError, match="row 2: " if not streaming else "2.png of 'train': the label"):
            list(load(source / str(number), streaming=streaming).splits["train"])


@pytest.mark.parametrize("streaming", [False, True], ids=["disk", "stream"])
def test_class_names_replace_those_of_the_data(source, tmp_path, streaming):
    write_images(source, ["train", "val"])
    names = ["Ameise", "Biene", "Kuh"]
    images = load(source, streaming=streaming, class_names=write_names(tmp_path / "names.txt", names))
    expected = load(source, streaming=streaming)
    assert images.class_names == names
    for name, split in images.splits.items():
        assert contents(split) == contents(expected.splits[name])
        assert split.features["labels"].names == names
    for others, message in (
        (["Ameise", "Biene"], "must rename the 3 classes ant, bee, cow, in this order, got 2: Ameise, Biene"),
        (["bee", "ant", "cow"], "must rename the 3 classes ant, bee, cow, in this order, got 3: bee, ant, cow"),
    ):
        file = write_names(tmp_path / "others.txt", others)
        assert f"--class_names {file}: {message}" in refused(source, streaming=streaming, class_names=file)
    assert load(source, class_names=write_names(tmp_path / "same.txt")).class_names == CLASSES


def test_missing_labels_are_named_where_class_names_replace_others(source, tmp_path):
    save(source, train=image_rows([0, 1, 2, -1, None]))
    message = refused(source, class_names=write_names(tmp_path / "names.txt", ["Ameise", "Biene", "Kuh"]))
    assert message.endswith("missing or not in the range from 0 to 2: row 3: -1, row 4: None")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"ant\n\nbee\n", "each line must name a different class, got line 2: ''"),
        (b"ant\nbee\nant", "each line must name a different class, got line 1: 'ant', line 3: 'ant'"),
        (b"", "each line must name a different class, got no line"),
        ("K\u00fche".encode("latin-1"), "not a text file in UTF-8"),
        (None, "not a text file in UTF-8"),
    ],
    ids=["empty line", "same names", "empty file", "encoding", "missing"],
)
def test_files_of_class_names_are_checked(source, tmp_path, content, message):
    write_images(source)
    if content is not None:
        (tmp_path / "names.txt").write_bytes(content)
    assert f"--class_names {tmp_path}/names.txt: {message}" in refused(source, class_names=f"{tmp_path}/names.txt")


def test_names_of_classes_are_unicode_without_a_byte_order_mark(source, tmp_path):
    write_images(source)
    (tmp_path / "names.txt").write_bytes("K\u00fche\r\nant\r\nbee".encode("utf-8-sig"))
    assert load(source, class_names=f"{tmp_path}/names.txt").class_names == ["K\u00fche", "ant", "bee"]


def test_images_of_a_stream_are_not_decoded_for_their_labels(source, class_names):
    write_shard(source / "0.tar", samples([0, 1, 2]) | {"9.png": b"no image", "9.cls": b"1"})
    images = load(source, streaming=True, class_names=class_names)
    assert [row["png"]["bytes"] for row in images.splits["train"]][3] == b"no image"


def test_a_place_without_shards_is_named(source):
    source.mkdir()
    assert f"{source}/*.tar: not a dataset" in refused(f"{source}/*.tar")
    assert "memory://nothing: not a dataset" in refused("memory://nothing")
    assert "unknown://x/*.tar: cannot be read (Protocol not known: unknown)" in refused("unknown://x/*.tar")
    write_shard(source / "0.tar", {"0.png": image_bytes(), "0.cls": b"ant"})
    assert "cannot be read as webdataset (invalid literal for int()" in refused(source)


def test_a_stream_of_shards_teaches_and_a_wrong_label_ends_it(finetune, finetune_options, failure, zoo, class_names):
    shards = zoo.with_name("shards")
    for split in ("train", "validation"):
        files = {}
        for number, path in enumerate(sorted(zoo.glob(f"{split}/*/*.png"), key=lambda path: path.name)):
            files[f"{number:02}.png"] = path.read_bytes()
            files[f"{number:02}.cls"] = str(CLASSES.index(path.parent.name)).encode()
        write_shard(shards / f"{split}.tar", files)
    options = ["--streaming", "--max_steps", "18", "--class_names", class_names]
    folder = finetune(*options, data=shards)
    assert results(folder)["eval_accuracy"] >= 0.75
    assert AutoConfig.from_pretrained(folder).id2label == dict(enumerate(CLASSES))

    write_shard(shards / "validation.tar", files | {"08.cls": b"3"})
    message = failure("finetune", *finetune_options(*options, data=shards, output="other"))
    assert "08.png of 'validation': the label 3 is not one of 0, 1, 2" in message
