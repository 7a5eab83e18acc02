"""The command that classifies images."""

import csv

import PIL.Image
import pytest
import torch
from image_folders import image_bytes, write_files

from crossvit import CrossViTForImageClassification, CrossViTImageProcessor


@pytest.fixture
def small_config(small_config):
    small_config.id2label = dict(enumerate(["ant", "bee", "cow, cattle", "dog", "elk", "fox"]))
    return small_config


@pytest.fixture
def photos(tmp_path):
    """Five images, one of which cannot be read, in a folder with subfolders."""
    names = ("a.png", "b/c.png", "b/d/e.png", "f.png")
    images = {name: image_bytes((60 * index, 200, 40), (30 + index, 50)) for index, name in enumerate(names)}
    return write_files(tmp_path / "photos", {**images, "b/cut.png": images["a.png"][:40]})


@pytest.fixture
def classify(example, checkpoint):
    return lambda *arguments: example("classify", "--model", checkpoint, *arguments)


def test_labels_are_those_of_the_model(classify, checkpoint, photos, tmp_path):
    output, errors = classify(photos, "--batch_size", 3, "--output", tmp_path / "new" / "labels.csv")
    with open(tmp_path / "new" / "labels.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", *(f"{name}_{place}" for place in range(1, 6) for name in ("label", "score"))]
    assert [row["file"] for row in rows] == [str(photos / name) for name in ("a.png", "b/c.png", "b/d/e.png", "f.png")]
    model = CrossViTForImageClassification.from_pretrained(checkpoint).eval()
    processor = CrossViTImageProcessor.from_pretrained(checkpoint)
    for row in rows:
        with torch.no_grad():
            logits = model(**processor(PIL.Image.open(row["file"]), return_tensors="pt")).logits[0]
        for place, index in enumerate(logits.argsort(descending=True)[:5].tolist(), start=1):
            assert row[f"label_{place}"] == model.config.id2label[index]
            # Six digits are written
            assert float(row[f"score_{place}"]) == pytest.approx(logits.softmax(0)[index].item(), abs=1e-5)
    assert output == "" and "Classified 4 of 5 images" in errors
    assert errors.count("left out") == 1 and f"left out {photos / 'b' / 'cut.png'}: " in errors
    assert "5/5" in errors  # a progress bar


def test_lines_without_a_table(classify, photos):
    # "b/c.png" is named twice and classified once
    output, _ = classify(photos / "f.png", photos / "b", photos / "b" / "c.png", photos / "typo.png")
    lines = [line.split("  ") for line in output.splitlines()]
    assert [line[0] for line in lines] == [str(photos / name) for name in ("f.png", "b/c.png", "b/d/e.png")]
    assert all(len(line) == 6 and line[1].endswith("%") for line in lines)


def test_fewer_labels_than_five(classify, checkpoint, photos, small_config, tmp_path):
    small_config.num_labels = 2
    CrossViTForImageClassification(small_config).save_pretrained(checkpoint)
    classify(photos / "a.png", "--output", tmp_path / "labels.csv")
    header, row = (tmp_path / "labels.csv").read_text().splitlines()
    assert header == "file,label_1,score_1,label_2,score_2" and len(row.split(",")) == 5


def test_what_is_wrong_is_named(failure, checkpoint, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((photos / "b" / "cut.png",), "no image that can be read in "),
        ((tmp_path / "empty",), "no image that can be read in "),
        ((photos, "--model", tmp_path / "typo"), "typo: not a CrossViT checkpoint"),
        ((photos, "--batch_size", 0), "--batch_size must be at least 1"),
    ):
        assert message in failure("classify", "--model", checkpoint, *arguments)
