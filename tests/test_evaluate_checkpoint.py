"""Accuracy from the command line: which images count, and what it is compared with."""

import json

import numpy as np
import PIL.Image
import pytest
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
    def run(*options, status=0) -> tuple[dict, str]:
        arguments = ["--model", checkpoint, "--data", zoo, "--cpu", "--output", tmp_path / "results.json"]
        code, output, errors = example("evaluate_checkpoint", *arguments, *options)
        assert code == status, errors
        if status:
            assert "Traceback" not in errors
            return {}, errors.strip().splitlines()[-1]
        return json.loads((tmp_path / "results.json").read_text()), output

    return run


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
    for options in (["--streaming"], ["--num_workers", "2"], ["--batch_size", "1"]):
        other, _ = measure(*options)
        assert {**other, "seconds": 0} == {**results, "seconds": 0}
    assert measure("--split", "train")[0]["images"] == 24
    assert not any((tmp_path / "here").iterdir())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_measured_in_half_precision(measure, dtype, monkeypatch):
    dtypes = []
    forward = CrossViTForImageClassification.forward

    def spy(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        dtypes.append(str(outputs.logits.dtype))
        return outputs

    monkeypatch.setattr(CrossViTForImageClassification, "forward", spy)
    assert measure("--dtype", dtype)[0]["dtype"] == dtype and set(dtypes) == {f"torch.{dtype}"}


def test_images_that_cannot_be_read_are_named(measure, zoo):
    (zoo / "train" / "cow" / "2.png").write_text("no image")
    assert measure()[0]["images"] == 9  # of another split
    (zoo / "validation" / "cow" / "2.png").write_text("no image")
    message = measure(status=1)[1]
    assert "1 of 9 images of 'validation' cannot be read" in message and "validation/cow/2.png" in message


def test_published_figures_stand_beside_those_of_a_converted_checkpoint(measure, checkpoint):
    (checkpoint / "conversion.json").write_text(json.dumps({"variant": "crossvit_15"}))
    results, output = measure()
    assert results["published"]["top1"]["paper"] == 81.5
    assert "81.50%" in output and "ImageNet, paper" in output and "ImageNet, timm" in output
    (checkpoint / "conversion.json").write_text(json.dumps({"variant": None}))
    assert measure()[0]["published"] is None


def test_other_names_of_classes_are_never_guessed(measure, zoo):
    for split in ("train", "validation"):
        for name in CLASSES:
            (zoo / split / name).rename(zoo / split / f"{name}s")
    assert "the model has 6 classes ('cow', ...), the data has 3 others ('ants', ...)" in measure(status=1)[1]
    for name in ("dogs", "elks", "foxes"):
        (zoo / "validation" / name).mkdir()
        PIL.Image.new("RGB", (40, 40)).save(zoo / "validation" / name / "0.png")
    assert "the model has no class 'ants'" in measure(status=1)[1]
    results, output = measure("--by_order")
    assert "'ants' is 'cow'" in output and results["images"] == 12


@pytest.mark.parametrize(
    "options, message",
    [
        (["--split", "tset"], "--split is one of"),
        (["--data", "missing"], "missing: no data set"),
        (["--model", "missing"], "missing: no CrossViT"),
        (["--data", ""], "give --data"),
    ],
)
def test_what_is_wrong_is_named(measure, options, message):
    assert message in measure(*options, status=1)[1]
