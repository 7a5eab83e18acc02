"""Accuracy from the command line: which images count, and what it is compared with."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from image_folders import CLASSES, image_bytes, write_files
from transformers import pipeline

from crossvit import CrossViTForImageClassification


@pytest.fixture
def small_config(small_config):
    small_config.id2label = dict(enumerate(["cow", "dog", "ant", "bee", "elk", "fox"]))
    return small_config


@pytest.fixture
def options(checkpoint, zoo, tmp_path):
    return ["--model", checkpoint, "--data", zoo, "--cpu", "--output", tmp_path / "results.json"]


@pytest.fixture
def measure(example, options, tmp_path):
    """Measures the accuracy with further options: the results, and what is printed."""

    def run(*others) -> tuple[dict, str]:
        output, _ = example("evaluate_checkpoint", *options, *others)
        return json.loads((tmp_path / "results.json").read_text()), output

    return run


@pytest.fixture
def refusal(failure, options):
    return lambda *others: failure("evaluate_checkpoint", *options, *others)


def test_it_is_the_accuracy_of_the_pipeline_by_the_names_of_the_classes(
    measure, checkpoint, zoo, tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    classifier = pipeline("image-classification", str(checkpoint))
    hits = []
    for file in sorted(zoo.glob("validation/*/*.png")):
        ranking = [answer["label"] for answer in classifier(str(file), top_k=5)]
        hits.append((ranking[0] == file.parent.name, file.parent.name in ranking))
    results, output = measure("--batch_size", "4")
    assert (results["top1"], results["top5"]) == pytest.approx(tuple(np.mean(hits, axis=0)))
    assert results["images"] == 9 and results["split"] == "validation" and results["published"] is None
    assert f"{results['top1']:.2%}" in output and "paper" not in output
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # without the minute for C++
    for options in (["--streaming"], ["--num_workers", "2"], ["--batch_size", "1"], ["--compile"]):
        other, _ = measure(*options)
        assert {**other, "seconds": 0} == {**results, "seconds": 0}
    assert measure("--split", "train")[0]["images"] == 24
    assert not any((tmp_path / "here").iterdir())


def test_half_precision_is_measured_in_half_precision(measure, monkeypatch):
    dtypes = []
    forward = CrossViTForImageClassification.forward

    def spy(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        dtypes.append(outputs.logits.dtype)
        return outputs

    monkeypatch.setattr(CrossViTForImageClassification, "forward", spy)
    assert measure("--dtype", "bfloat16")[0]["dtype"] == "bfloat16" and set(dtypes) == {torch.bfloat16}


def test_images_that_cannot_be_read_are_named(measure, refusal, zoo):
    (zoo / "train" / "cow" / "2.png").write_text("no image")
    assert measure()[0]["images"] == 9  # of another split
    (zoo / "validation" / "cow" / "2.png").write_text("no image")
    message = refusal()
    assert "1 of 9 images of 'validation' cannot be read" in message and "validation/cow/2.png" in message


def test_published_figures_stand_beside_those_of_a_converted_checkpoint(measure, checkpoint):
    (checkpoint / "conversion.json").write_text(json.dumps({"variant": "crossvit_15"}))
    results, output = measure()
    assert results["published"]["top1"]["paper"] == 81.5
    assert "81.50%" in output and "ImageNet, paper" in output and "ImageNet, timm" in output
    (checkpoint / "conversion.json").write_text(json.dumps({"variant": None}))
    assert measure()[0]["published"] is None


def test_other_names_of_classes_are_never_guessed(measure, refusal, zoo):
    for split in ("train", "validation"):
        for name in CLASSES:
            (zoo / split / name).rename(zoo / split / f"{name}s")
    assert "the model has 6 classes ('cow', ...), the data has 3 others ('ants', ...)" in refusal()
    write_files(zoo / "validation", {f"{name}/0.png": image_bytes() for name in ("dogs", "elks", "foxes")})
    assert "the model has no class 'ants'" in refusal()
    results, output = measure("--by_order")
    assert "'ants' is 'cow'" in output and results["images"] == 12


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--split", "tset"], "--split is one of"),
        (["--data", "missing"], "missing: not a dataset"),
        (["--model", "missing"], "missing: not a CrossViT checkpoint"),
        (["--data", ""], "give --data"),
    ],
)
def test_what_is_wrong_is_named(refusal, wrong, message):
    assert message in refusal(*wrong)
