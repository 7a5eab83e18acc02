"""The command that finds similar images."""

import os
import shutil

import numpy as np
import PIL.Image
import pytest
import torch

from crossvit import CrossViTForImageClassification, CrossViTImageProcessor, CrossViTModel


@pytest.fixture
def checkpoint(small_config, tmp_path):
    model = CrossViTForImageClassification(small_config)
    with torch.no_grad():  # With larger random weights, the class tokens depend on the colors of the image
        for parameter in model.parameters():
            parameter.mul_(5)
    model.save_pretrained(tmp_path / "checkpoint")
    size = {"height": 36, "width": 36}
    CrossViTImageProcessor(size={"shortest_edge": 36}, crop_size=size).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def photos(tmp_path):
    """Twelve images of one color each with noise, in two folders."""
    generator = np.random.default_rng(0)
    for name, color in (("red", (220, 20, 20)), ("blue", (20, 20, 220))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(6):
            pixels = np.clip(np.array(color) + generator.normal(0, 10, (40, 44, 3)), 0, 255).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def retrieve(example, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def run(*arguments, status=0):
        options = ("--model", checkpoint, "--output", tmp_path / "found.png", *arguments)
        found, output, errors = example("retrieve", *options)
        assert found == status, errors
        return output if status == 0 else errors

    return run


def test_images_of_one_folder_are_nearest(retrieve, photos, tmp_path):
    output = retrieve("--data", photos)
    assert "100.0% of the 5 nearest of 12 images have the same label" in output
    with PIL.Image.open(tmp_path / "found.png") as picture:
        assert min(picture.size) > 500
    # Five of the eleven other images: a query is not its own nearest
    assert "45.5% of the 11 nearest of 12 images" in retrieve("--data", photos, "--nearest", 20)


def test_nearest_images_are_those_of_the_cosine(retrieve, photos, checkpoint):
    query = photos / "red" / "3.png"
    output = retrieve("--data", photos, "--query", query, "--nearest", 12)
    found = output.splitlines()[0].split("  ")[1:]
    model = CrossViTForImageClassification.from_pretrained(checkpoint).eval()
    processor = CrossViTImageProcessor.from_pretrained(checkpoint)
    files = sorted(photos.rglob("*.png"))
    images = [PIL.Image.open(file) for file in (query, *files)]
    with torch.no_grad():
        pooled = model.crossvit(**processor(images, return_tensors="pt")).pooler_output
    order = torch.cosine_similarity(pooled[:1], pooled[1:]).argsort(descending=True).tolist()
    assert found == [str(files[number]) for number in order if files[number] != query]


def test_query_in_the_folder_is_not_its_own_nearest(retrieve, photos, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(photos)
    (tmp_path / "one.png").symlink_to(photos / "red" / "3.png")
    monkeypatch.chdir(photos / "red")
    for query in ("3.png", "../blue/../red/3.png", tmp_path / "link" / "red" / "3.png", tmp_path / "one.png"):
        for data in (photos, "..", tmp_path / "link"):
            found = retrieve("--data", data, "--query", query, "--nearest", 12).splitlines()[0].split("  ")[1:]
            assert len(found) == 11 and not any(path.endswith("red/3.png") for path in found)
    # An image from elsewhere is compared with all of them, even if it is the same
    (tmp_path / "copy.png").write_bytes((photos / "red" / "3.png").read_bytes())
    found = retrieve("--data", photos, "--query", tmp_path / "copy.png", "--nearest", 12).splitlines()[0].split("  ")
    assert len(found) == 13 and found[1] == str(photos / "red" / "3.png")


def test_links_in_the_folder_are_the_same_image(retrieve, photos):
    (photos / "red" / "link.png").symlink_to(photos / "red" / "0.png")
    assert "of 12 images" in retrieve("--data", photos)


def test_titles_show_labels(retrieve, photos, tmp_path, drawn_rows):
    for part in ("train", "test"):  # the name of the class counts, wherever its folder is
        shutil.copytree(photos, tmp_path / "parts" / part)
    output = retrieve("--data", tmp_path / "parts", "--nearest", 11)
    assert "100.0% of the 11 nearest of 24 images have the same label" in output
    assert [cell.title.splitlines()[0] for cell in drawn_rows[0]] == ["blue"] * 12
    (tmp_path / "query.png").symlink_to(photos / "red" / "3.png")
    retrieve("--data", photos, "--query", tmp_path / "query.png", "--nearest", 1)
    assert drawn_rows[0][0].title == "red\nquery.png" and drawn_rows[0][1].title.startswith("red\n")
    # In a single folder there are no labels
    retrieve("--data", photos / "red", "--query", photos / "red" / "3.png", "--nearest", 1)
    assert drawn_rows[0][0].title == "3.png"


def test_unreadable_image_is_named_and_left_out(retrieve, photos):
    (photos / "red" / "cut.png").write_bytes((photos / "red" / "0.png").read_bytes()[:300])
    output = retrieve("--data", photos)
    assert output.count("left out") == 1 and "cut.png" in output and "nearest of 12 images" in output


def test_only_changed_images_or_weights_are_embedded_again(retrieve, photos, checkpoint, monkeypatch):
    query = photos / "red" / "3.png"
    options = ("--data", photos, "--query", query, "--nearest", 3)
    first = retrieve(*options)
    calls = []
    forward = CrossViTModel.forward
    monkeypatch.setattr(CrossViTModel, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    assert retrieve(*options) == first
    assert len(calls) == 1  # for the query
    (photos / "red" / "3.png").write_bytes((photos / "blue" / "0.png").read_bytes())
    os.utime(photos / "red" / "3.png", (1, 1))  # a clock may be too coarse to show the change
    changed = retrieve(*options)
    assert "blue" in changed.splitlines()[0].split("  ")[1]
    assert len(calls) == 3  # for the query and the folder
    model = CrossViTForImageClassification.from_pretrained(checkpoint)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    model.save_pretrained(checkpoint)
    retrieve(*options)
    assert len(calls) == 5


def test_user_errors_end_with_one_line(retrieve, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (("--data", tmp_path / "typo"), "typo: must hold at least two images"),
        (("--data", tmp_path / "empty"), "empty: must hold at least two images"),
        (("--data", photos, "--query", tmp_path / "typo.png"), "typo.png"),
        (("--data", photos, "--model", tmp_path / "typo"), "typo: no CrossViT"),
    ):
        errors = retrieve(*arguments, status=1)
        assert message in errors and len(errors.splitlines()) == 1, errors


def test_folder_without_subfolders(retrieve, photos):
    output = retrieve("--data", photos / "red")
    assert "same label" not in output and "Drew 6 images" in output
