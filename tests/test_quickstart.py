"""The README's main job: a small model that is trained, loaded in a new process and looked at."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from examples_in_process import EXAMPLES, save_checkpoint

from crossvit.interpretability.plotting import ORANGE


@pytest.fixture
def photo(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def small_config(small_config):
    small_config.depth = ((1, 2, 0), (0, 1, 0))  # the first branch has no layers in the last stage
    return small_config


def start(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, EXAMPLES / "quickstart.py"],
        cwd=folder,
        env={**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_quickstart_learns_digits_and_loads_them_back_in_a_new_process(tmp_path):
    process = start(tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    folder = tmp_path / "outputs" / "quickstart"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["eval_accuracy"] >= 0.95  # 98.9 to 99.2 % were measured with three seeds
    # The new process agrees with the Trainer about every digit
    assert "knows only handwritten digits of 8x8 pixels, not photos" in output
    assert f"new process: {round(360 * metrics['eval_accuracy'])} of 360 held-out digits" in output
    assert len(json.loads((folder / "predictions.json").read_text())) == 360
    assert "100%" in errors  # a progress bar
    with PIL.Image.open(folder / "quickstart.png") as picture:
        assert min(picture.size) > 1000


def test_interrupted_training_ends_without_a_trace(tmp_path):
    process = start(tmp_path)
    assert "Training" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and "Interrupted." in errors and "Traceback" not in errors


def test_own_image_and_model(example, photo, checkpoint, tmp_path):
    folder = tmp_path / "out"
    output, _ = example("quickstart", "--image", photo, photo, "--model", checkpoint, "--output", folder)
    assert output.count("photo.png") == 2 and "LABEL_" in output
    first, second = json.loads((folder / "predictions.json").read_text())
    assert first == second and len(first) == 3
    assert sum(label["score"] for label in first) <= 1 + 1e-6
    assert (folder / "quickstart.png").stat().st_size > 10_000
    assert not (folder / "model.safetensors").exists()


def test_unreadable_image_is_named_before_the_training(failure, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    for name in ("typo.png", "text.png"):
        assert name in failure("quickstart", "--image", tmp_path / name, "--output", tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("config", [None, '{"model_type": "vit"}', "{"], ids=["missing", "other", "damaged"])
def test_other_models_are_refused(failure, photo, checkpoint, tmp_path, config):
    (checkpoint / "config.json").unlink()
    if config:
        (checkpoint / "config.json").write_text(config)
    message = failure("quickstart", "--image", photo, "--model", checkpoint, "--output", tmp_path)
    assert f"--model {checkpoint}: not a CrossViT checkpoint" in message


def test_model_without_the_labels_of_digits_needs_images(failure, checkpoint, tmp_path):
    assert "--image" in failure("quickstart", "--model", checkpoint, "--output", tmp_path)


def test_wrong_predictions_are_shown_first(example, small_config, drawn_rows, tmp_path):
    small_config.id2label = {digit: str(digit) for digit in range(10)}
    model = save_checkpoint(small_config, tmp_path / "model")
    output, _ = example("quickstart", "--model", model, "--output", tmp_path)
    correct = int(re.search(r"(\d+) of 360 held-out digits are correct", output)[1])
    assert 0 < correct < 358
    assert f"First rows (orange): 2 of the {360 - correct} misclassified digits" in output
    wrong, right = drawn_rows[:2], drawn_rows[2:]
    assert len(right) == 6
    for row in wrong:
        predicted = row[1].scores[0]["label"]
        assert re.fullmatch(rf"is (?!{predicted})\d,\npredicted {predicted}", row[0].label) and row[0].color == ORANGE
    for row in right:
        assert row[0].label == f"is {row[1].scores[0]['label']}" and row[0].color is None


def test_digits_are_written_as_images(example, tmp_path):
    output, _ = example("quickstart", "--write_digits", tmp_path)
    assert str(tmp_path / "digits") in output and str(tmp_path / "parity") in output
    for kind, classes in (("digits", 10), ("parity", 2)):
        for split, number in (("train", 1437), ("test", 360)):
            assert len(list((tmp_path / kind / split).iterdir())) == classes
            assert len(list((tmp_path / kind / split).glob("*/*.png"))) == number
