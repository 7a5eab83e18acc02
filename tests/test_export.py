"""Exports from the command line: the logits and the accuracy of each program, and what is written about it."""

import importlib
import json
import re
import runpy
import shutil
from argparse import Namespace

import numpy as np
import PIL.Image
import pytest
import torch
from common.images import decode_image
from common.labelled_images import DataArguments, LabelledImages
from examples_in_process import EXAMPLES
from transformers import TrainingArguments

from crossvit import CrossViTConfig, CrossViTForImageClassification, CrossViTImageProcessor


exporters = pytest.importorskip("transformers.exporters")
if not hasattr(exporters, "ExportedModel"):
    pytest.skip("transformers before 5.23", allow_module_level=True)
CalibrationSet = importlib.import_module("transformers.exporters.quantizers.base").CalibrationSet

pytestmark = [
    pytest.mark.export,
    # Of Transformers' and PyTorch's own code, where a test runs exported programs
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
COMMAND = runpy.run_path(str(EXAMPLES / "export.py"))
# Of the packages that tests may lack
PACKAGES = {"onnx": ["onnxscript", "onnxruntime"], "openvino": ["openvino", "nncf"]}


def require_packages(*names):
    for name in names:
        for package in PACKAGES.get(name.removesuffix("-int8"), []):
            pytest.importorskip(package)


@pytest.fixture
def small_config(small_config):
    small_config.depth = ((1, 1, 0),)  # the time of an export grows with the layers
    small_config.id2label = dict(enumerate(["cow", "dog", "ant", "bee", "elk"]))
    return small_config


@pytest.fixture
def options(checkpoint, zoo, tmp_path):
    return ["--model", checkpoint, "--data", zoo, "--output_dir", tmp_path / "export", "--seconds", "0.01"]


@pytest.fixture
def export(example, options, tmp_path):
    """Exports the small model with further options: the results, and what is printed."""

    def run_export(*others):
        output, _ = example("export", *options, *others)
        return json.loads((tmp_path / "export" / "export.json").read_text()), output

    return run_export


@pytest.fixture
def refusal(failure, options):
    return lambda *others: failure("export", *options, *others)


def pixel_values(checkpoint, files) -> torch.Tensor:
    processor = CrossViTImageProcessor.from_pretrained(checkpoint)
    return processor([PIL.Image.open(file) for file in files], return_tensors="pt")["pixel_values"]


def logits(checkpoint, batch) -> torch.Tensor:
    with torch.no_grad():
        return CrossViTForImageClassification.from_pretrained(checkpoint).eval()(batch).logits


@pytest.fixture
def calibration_images(monkeypatch) -> list[torch.Tensor]:
    """The images with which int8 was calibrated."""
    images: list[torch.Tensor] = []
    original = CalibrationSet.__iter__

    def iterate(self):
        images.extend(sample["pixel_values"][0] for sample in self.calibration_dataset)
        return original(self)

    monkeypatch.setattr(CalibrationSet, "__iter__", iterate)
    return images


@pytest.mark.parametrize("name", COMMAND["FORMATS"])
def test_program_has_the_logits_of_the_model_for_batches_of_any_size(
    export, calibration_images, checkpoint, zoo, tmp_path, name
):
    require_packages(name)
    results, output = export("--formats", name, "--calibration_images", "10")
    rows = results["programs"][2:]
    assert [row["format"] for row in rows] == [name] + ["openvino bf16"] * (name == "openvino")
    assert name in output and (tmp_path / "export" / name / "preprocessor_config.json").is_file()

    program = COMMAND["load_program"](name, tmp_path / "export" / name)
    batch = pixel_values(checkpoint, sorted(zoo.glob("validation/*/*.png")))
    expected = logits(checkpoint, batch)
    # 2e-6 were measured in float32, 0.01 to 0.06 in lower precisions of logits up to 2
    tolerance = 0.3 if name.endswith("int8") else 1e-4
    for size in (1, 3, 8, 9):
        found = program(batch[:size])
        assert found.shape == (size, 5)
        torch.testing.assert_close(found, expected[:size], atol=tolerance, rtol=0)
    assert (found - expected).abs().max() > 1e-4 or not name.endswith("int8")  # it is quantized

    for row in rows:
        assert row["largest_difference"] < 0.3 and min(row["milliseconds"].values()) > 0

    # Calibrated only with training images, of all classes although files are listed by class
    assert bool(calibration_images) == (name in ("onnx-int8", "openvino-int8"))
    training = pixel_values(checkpoint, zoo.glob("train/*/*.png"))
    assert all(any(torch.equal(used, image) for image in training) for used in calibration_images)
    if calibration_images:
        assert len({used.sum().item() for used in calibration_images}) == 10
        assert {used.mean(dim=(1, 2)).argmax().item() for used in calibration_images} == {0, 1, 2}


@torch.no_grad()
@pytest.mark.parametrize("name", ["torch", "onnx"])
def test_program_takes_an_image_for_each_branch(checkpoint, tmp_path, name):
    require_packages(name)
    model = CrossViTForImageClassification.from_pretrained(checkpoint).eval()
    COMMAND["save_program"](name, model, torch.randn(3, 2, 3, 36, 36), tmp_path / name)
    program = COMMAND["load_program"](name, tmp_path / name)
    for batch_size in (1, 3):
        pixel_values = torch.randn(batch_size, 2, 3, 36, 36)
        expected = model(pixel_values).logits
        torch.testing.assert_close(program(pixel_values), expected, atol=1e-5, rtol=0)  # 1e-7 was measured


def test_accuracy_is_that_of_the_held_out_images_by_the_names_of_their_classes(export, checkpoint, zoo):
    results, _ = export("--formats", "torch")
    files = sorted(zoo.glob("validation/*/*.png"))
    names = CrossViTForImageClassification.from_pretrained(checkpoint).config.id2label
    predictions = logits(checkpoint, pixel_values(checkpoint, files)).argmax(-1).tolist()
    accuracy = np.mean([names[label] == file.parent.name for file, label in zip(files, predictions)])
    assert results["images"] == 9 and 0 < accuracy < 1
    assert [row["format"] for row in results["programs"]] == ["torch float32", "torch bfloat16", "torch"]
    for row in results["programs"]:
        assert row["accuracy"] == pytest.approx(accuracy, abs=0.12)  # bfloat16 may change one of nine predictions
    assert results["programs"][2]["accuracy"] == pytest.approx(accuracy)


def test_plain_folder_is_divided_as_for_finetuning(checkpoint, zoo):
    args = Namespace(data=str(zoo / "train"), image_columns=None, validation_fraction=0.25)
    args.calibration_images, args.test_images = 300, 1000
    processor = CrossViTImageProcessor.from_pretrained(checkpoint)
    config = CrossViTConfig.from_pretrained(checkpoint)
    calibration, test, labels = COMMAND["load_images"](args, config, processor)
    assert len(calibration) == 18 and len(test) == len(labels) == 6
    assert len({image.sum().item() for image in (*calibration, *test)}) == 24  # no image is in both
    classes = list(config.id2label.values())
    brightest = test.mean(dim=(2, 3)).argmax(-1)
    assert labels.tolist() == [classes.index(("ant", "bee", "cow")[channel]) for channel in brightest]
    held_out = LabelledImages.load(DataArguments(args.data)).for_training(0.25, TrainingArguments.seed).splits
    images = [decode_image(image) for image in held_out["validation"]["image"]]
    expected = processor(images, return_tensors="pt")["pixel_values"]
    assert {image.sum().item() for image in test} == {image.sum().item() for image in expected}
    args.calibration_images, args.test_images = 5, 4
    assert [len(images) for images in COMMAND["load_images"](args, config, processor)] == [5, 4, 4]


def test_images_of_other_classes_measure_the_agreement(export, zoo):
    for split in ("train", "validation"):
        (zoo / split / "ant").rename(zoo / split / "unknown")
    results, output = export("--formats", "torch")
    assert "agreement" in output and "accuracy" not in output
    assert results["programs"][0]["agreement"] == results["programs"][2]["agreement"] == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda logits: logits + 2e-4, "its logits differ by 0.0002 from those of the model, more than 0.0001"),
        (lambda logits: logits * float("nan"), "its logits differ by nan"),
        (lambda logits: logits + (len(logits) > 1), "its logits differ by 1 from those of the model"),
    ],
    ids=["other", "nan", "batch"],
)
def test_wrong_program_is_not_kept(refusal, tmp_path, monkeypatch, change, message):
    original = exporters.ExportedModel.__call__

    def call(self, **kwargs):
        outputs = original(self, **kwargs)
        outputs.logits = change(outputs.logits)
        return outputs

    monkeypatch.setattr(exporters.ExportedModel, "__call__", call)
    error = refusal("--formats", "torch")
    assert error.startswith("export.py: error: torch was not exported: ") and message in error
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["export.json"]


def test_format_that_fails_leaves_the_others(refusal, tmp_path, monkeypatch):
    require_packages("openvino")

    def fail(*args):
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr("transformers.exporters.exporter_dynamo.DynamoExporter.save_program", fail)
    error = refusal("--formats", "torch", "openvino")
    assert error == "export.py: error: torch was not exported: no such operator"
    results = json.loads((tmp_path / "export" / "export.json").read_text())
    assert [row["format"] for row in results["programs"]][2:] == ["openvino", "openvino bf16"]
    assert results["not_exported"] == {"torch": "no such operator"}


def test_readme_says_how_to_run_each_program(export, checkpoint, zoo, tmp_path, monkeypatch, capsys):
    formats = ["torch", "onnx", "openvino"]
    require_packages(*formats)
    export("--formats", *formats)
    guide = (tmp_path / "export" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "export")
    image = zoo / "validation" / "bee" / "0.png"
    shutil.copy(image, "image.png")
    names: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", guide, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1 + len(formats)
    expected = logits(checkpoint, pixel_values(checkpoint, [image]))
    for name, block in zip([None, *formats], blocks):
        exec(block, names)
        if name:
            found = torch.as_tensor(names["logits"]).detach().float()
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)  # as above
    assert capsys.readouterr().out.split() == [names["id2label"][expected.argmax().item()]] * len(formats)


def test_what_is_wrong_is_named(refusal, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "missing: not a CrossViT checkpoint" in refusal("--model", "missing")
    assert "missing" in refusal("--data", "missing")
    assert "empty" in refusal("--data", tmp_path / "empty")


def test_folder_with_files_is_left_as_it_is(refusal, tmp_path):
    (tmp_path / "export" / "torch").mkdir(parents=True)
    (tmp_path / "export" / "thesis.tex").touch()
    assert "not empty" in refusal("--formats", "torch")
    assert {path.name for path in (tmp_path / "export").iterdir()} == {"torch", "thesis.tex"}
