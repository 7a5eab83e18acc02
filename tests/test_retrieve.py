"""The command that finds similar images."""

import os
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from image_folders import encoded, write_files

from crossvit import CrossViTForImageClassification, CrossViTImageProcessor, CrossViTModel


@pytest.fixture
def photos(tmp_path):
    """Twelve images of one color each with noise, in two folders."""
    generator = np.random.default_rng(0)
    for name, color in (("red", (220, 20, 20)), ("blue", (20, 20, 220))):
        for number in range(6):
            pixels = np.clip(np.array(color) + generator.normal(0, 10, (40, 44, 3)), 0, 255).astype(np.uint8)
            write_files(tmp_path / "photos" / name, {f"{number}.png": encoded(PIL.Image.fromarray(pixels))})
    return tmp_path / "photos"


@pytest.fixture
def options(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return ["--model", checkpoint, "--output", tmp_path / "found.png"]


@pytest.fixture
def retrieve(example, options):
    return lambda *others: example("retrieve", *options, *others)[0]


@pytest.fixture
def nearest(retrieve):
    """The images that are found for a query, the nearest first."""
    return lambda *others: retrieve(*others).splitlines()[0].split("  ")[1:]


def test_images_of_one_folder_are_nearest(retrieve, photos, tmp_path):
    output = retrieve("--data", photos)
    assert "Precision@5 over 12 images: 100.0%" in output
    with PIL.Image.open(tmp_path / "found.png") as picture:
        assert min(picture.size) > 500
    # Five of the eleven other images: a query is not its own nearest
    assert "Precision@11 over 12 images: 45.5%" in retrieve("--data", photos, "--nearest", 20)


def test_nearest_images_are_those_of_the_cosine(nearest, photos, checkpoint):
    query = photos / "red" / "3.png"
    found = nearest("--data", photos, "--query", query, "--nearest", 12)
    model = CrossViTForImageClassification.from_pretrained(checkpoint).eval()
    processor = CrossViTImageProcessor.from_pretrained(checkpoint)
    files = sorted(photos.rglob("*.png"))
    images = [PIL.Image.open(file) for file in (query, *files)]
    with torch.no_grad():
        pooled = model.crossvit(**processor(images, return_tensors="pt")).pooler_output
    order = torch.cosine_similarity(pooled[:1], pooled[1:]).argsort(descending=True).tolist()
    assert found == [str(files[number]) for number in order if files[number] != query]


def test_query_in_the_folder_is_not_its_own_nearest(nearest, photos, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(photos)
    (tmp_path / "one.png").symlink_to(photos / "red" / "3.png")
    monkeypatch.chdir(photos / "red")
    for query, data in (("3.png", photos), ("../blue/../red/3.png", tmp_path / "link"), (tmp_path / "one.png", "..")):
        found = nearest("--data", data, "--query", query, "--nearest", 12)
        assert len(found) == 11 and not any(path.endswith("red/3.png") for path in found)
    # An image from elsewhere is compared with all of them, even if it is the same
    shutil.copy(photos / "red" / "3.png", tmp_path / "copy.png")
    found = nearest("--data", photos, "--query", tmp_path / "copy.png", "--nearest", 12)
    assert len(found) == 12 and found[0] == str(photos / "red" / "3.png")


def test_titles_show_labels(retrieve, photos, tmp_path, drawn_rows):
    for part in ("train", "test"):  # the name of the class counts, wherever its folder is
        shutil.copytree(photos, tmp_path / "parts" / part)
    output = retrieve("--data", tmp_path / "parts", "--nearest", 11)
    assert "Precision@11 over 24 images: 100.0%" in output
    assert [cell.title.splitlines()[0] for cell in drawn_rows[0]] == ["blue"] * 12
    (tmp_path / "query.png").symlink_to(photos / "red" / "3.png")
    retrieve("--data", photos, "--query", tmp_path / "query.png", "--nearest", 1)
    assert drawn_rows[0][0].title == "red\nquery.png" and drawn_rows[0][1].title.startswith("red\n")


def test_folder_without_subfolders_has_no_labels(retrieve, photos, drawn_rows):
    output = retrieve("--data", photos / "red")
    assert "same label" not in output and "Drew 6 images" in output and drawn_rows[0][0].title == "0.png"


def test_links_are_the_same_image_and_what_cannot_be_read_is_left_out(example, options, photos):
    (photos / "red" / "link.png").symlink_to(photos / "red" / "0.png")
    (photos / "red" / "cut.png").write_bytes((photos / "red" / "0.png").read_bytes()[:300])
    output, errors = example("retrieve", *options, "--data", photos)
    assert errors.count("left out") == 1 and "cut.png" in errors and "over 12 images" in output


def test_only_changed_images_or_weights_are_embedded_again(nearest, photos, checkpoint, monkeypatch):
    query = photos / "red" / "3.png"
    options = ("--data", photos, "--query", query, "--nearest", 3)
    first = nearest(*options)
    calls = []
    forward = CrossViTModel.forward
    monkeypatch.setattr(CrossViTModel, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    assert nearest(*options) == first
    assert len(calls) == 1  # for the query
    shutil.copy(photos / "blue" / "0.png", query)
    os.utime(query, (1, 1))  # a clock may be too coarse to show the change
    assert "blue" in nearest(*options)[0]
    assert len(calls) == 3  # for the query and the folder
    model = CrossViTForImageClassification.from_pretrained(checkpoint)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    model.save_pretrained(checkpoint)
    nearest(*options)
    assert len(calls) == 5


def test_what_is_wrong_is_named(failure, options, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (("--data", tmp_path / "typo"), "typo: must hold at least two images"),
        (("--data", tmp_path / "empty"), "empty: must hold at least two images"),
        (("--data", photos, "--query", tmp_path / "typo.png"), "typo.png"),
        (("--data", photos, "--model", tmp_path / "typo"), "typo: not a CrossViT checkpoint"),
    ):
        assert message in failure("retrieve", *options, *arguments)
