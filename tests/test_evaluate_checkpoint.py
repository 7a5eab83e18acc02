"""Accuracy from the command line: which images count, and what it is compared with."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from examples_in_process import CLASSES
from timm_reference import perturb
from transformers import pipeline

from crossvit import CrossViTForImageClassification, CrossViTImageProcessor


@pytest.fixture
def checkpoint(small_config, tmp_path):
    small_config.id2label = dict(enumerate(["cow", "dog", "ant", "bee", "elk", "fox"]))
    perturb(CrossViTForImageClassification(small_config)).save_pretrained(tmp_path / "model")
    processor = CrossViTImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 36, "width": 36})
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def measure(example, checkpoint, zoo, tmp_path):
    def run(*options, data=None, status=0) -> tuple[dict, str]:
        arguments = ["--model", checkpoint, "--data", data or zoo, "--cpu", "--output", tmp_path / "results.json"]
        code, output, errors = example("evaluate_checkpoint", *arguments, *options)
        assert code == status, errors
        if status:
            assert output == "" and "Traceback" not in errors
            return {}, errors.strip().splitlines()[-1]
        return json.loads((tmp_path / "results.json").read_text()), output

    return run


def by_hand(checkpoint, files) -> tuple[float, float]:
    """Top-1 and top-5 of files in folders of their class, by the pipeline."""
    hits = []
    for file in files:
        ranking = [answer["label"] for answer in pipeline("image-classification", str(checkpoint))(str(file), top_k=5)]
        hits.append((ranking[0] == file.parent.name, file.parent.name in ranking))
    return tuple(np.mean(hits, axis=0))


def test_it_is_the_accuracy_of_the_pipeline_by_the_names_of_the_classes(measure, checkpoint, zoo):
    files = sorted(zoo.glob("validation/*/*.png"))
    results, output = measure("--batch_size", "4")
    assert (results["top1"], results["top5"]) == pytest.approx(by_hand(checkpoint, files))
    assert results["images"] == 9 and results["split"] == "validation" and results["published"] is None
    assert f"{results['top1']:.2%}" in output and "paper" not in output
    for options in (["--streaming"], ["--num_workers", "2"], ["--batch_size", "1"]):
        other, _ = measure(*options)
        assert {**other, "seconds": 0} == {**results, "seconds": 0}
    assert measure("--split", "train")[0]["images"] == 24


def test_bfloat16_is_measured_in_bfloat16(measure, checkpoint, zoo):
    results, _ = measure("--dtype", "bfloat16")
    model = CrossViTForImageClassification.from_pretrained(checkpoint, dtype=torch.bfloat16)
    processor = CrossViTImageProcessor.from_pretrained(checkpoint)
    hits = []
    for file in zoo.glob("validation/*/*.png"):
        pixel_values = processor(PIL.Image.open(file), return_tensors="pt")["pixel_values"].bfloat16()
        hits.append(model.config.id2label[model(pixel_values).logits.argmax(-1).item()] == file.parent.name)
    assert results["top1"] == pytest.approx(np.mean(hits)) and results["dtype"] == "bfloat16"


@pytest.mark.parametrize("options", [[], ["--streaming"], ["--num_workers", "1"]], ids=str)
def test_images_that_cannot_be_read_are_named_and_left_out(measure, checkpoint, zoo, options):
    broken = [zoo / "validation" / "ant" / "1.png", zoo / "validation" / "cow" / "2.png"]
    broken[0].write_bytes(broken[0].read_bytes()[:300])
    broken[1].write_text("no image")
    results, output = measure("--batch_size", "2", *options)
    files = [file for file in zoo.glob("validation/*/*.png") if file not in broken]
    assert (results["top1"], results["top5"]) == pytest.approx(by_hand(checkpoint, files))
    assert results["images"] == 9 and "7 images, 2 unreadable" in output
    for file, message in zip(broken, results["unreadable"], strict=True):
        assert message.startswith(str(file)) and f"left out: {file}" in output


def test_only_unreadable_images_have_no_accuracy(measure, zoo):
    for file in zoo.glob("validation/*/*.png"):
        file.write_text("no image")
    assert "none of 9 images can be read" in measure(status=1)[1]


def test_published_figures_stand_beside_those_of_a_converted_checkpoint(measure, checkpoint):
    (checkpoint / "conversion.json").write_text(json.dumps({"variant": "crossvit_15"}))
    results, output = measure()
    assert results["published"]["top1"]["paper"] == 81.5
    assert "81.50%" in output and "ImageNet, paper" in output and "ImageNet, timm" in output
    (checkpoint / "conversion.json").write_text(json.dumps({"variant": None}))
    assert measure()[0]["published"] is None


def test_other_names_of_classes_are_never_guessed(measure, checkpoint, zoo, tmp_path):
    for split in ("train", "validation"):
        for name in CLASSES:
            (zoo / split / name).rename(zoo / split / f"{name}s")
    assert "tells 6 classes apart ('cow', ...), the data has 3 others ('ants', ...)" in measure(status=1)[1]
    for name in ("dogs", "elks", "foxes"):
        (zoo / "validation" / name).mkdir()
        PIL.Image.new("RGB", (40, 40)).save(zoo / "validation" / name / "0.png")
    assert "the model knows no class 'ants'" in measure(status=1)[1]
    results, output = measure("--by_order")
    assert "'ants' is 'cow'" in output and results["images"] == 12


@pytest.mark.parametrize(
    "options, message",
    [
        (["--split", "tset"], "--split is one of"),
        (["--data", "missing"], "missing: no data set"),
        (["--model", "missing"], "missing: no CrossViT"),
        (["--data", ""], "give --model"),
    ],
)
def test_what_is_wrong_is_named(measure, options, message):
    assert message in measure(*options, status=1)[1]
