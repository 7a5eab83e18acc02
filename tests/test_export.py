"""Exports from the command line: what is kept, what it computes, and what is said about it."""

import importlib
import importlib.util
import inspect
import itertools
import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from examples_in_process import EXAMPLES, write_zoo
from timm_reference import perturb

from crossvit import CrossViTForImageClassification, CrossViTImageProcessor
from crossvit.training.errors import CommandError


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
QUICK = ["--rounds", "1", "--batch_size", "2", "--threads", "1"]
PACKAGES = {
    "torch": [],
    "onnx": ["onnxscript", "onnxruntime"],
    "onnx-int8": ["onnxscript", "onnxruntime"],
    "openvino": ["openvino"],
    "openvino-bf16": ["openvino"],
    "openvino-int8": ["openvino", "nncf"],
    "torchao-int8": ["torchao"],
    "executorch": ["executorch"],
}


@pytest.fixture
def checkpoint(small_config, tmp_path):
    small_config.depth = ((1, 1, 0),)  # an export takes as long as there are layers
    small_config.id2label = dict(enumerate(["cow", "dog", "ant", "bee", "elk"]))
    perturb(CrossViTForImageClassification(small_config)).save_pretrained(tmp_path / "model")
    processor = CrossViTImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 36, "width": 36})
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def export(example, checkpoint, zoo, tmp_path):
    """Exports the small model with further options: the results and what is printed, or else what is wrong."""

    def run_export(*options, status=0):
        arguments = ["--model", checkpoint, "--data", zoo, "--output_dir", tmp_path / "export", *QUICK]
        threads = torch.get_num_threads()
        code, output, errors = example("export", *arguments, *options)
        torch.set_num_threads(threads)
        assert code == status, errors
        if status:
            assert "Traceback" not in errors
            return output, errors.strip().splitlines()[-1]
        assert not list((tmp_path / "export").glob(".*"))
        return json.loads((tmp_path / "export" / "export.json").read_text()), output

    return run_export


@pytest.fixture
def command():
    """What the script defines."""
    return runpy.run_path(str(EXAMPLES / "export.py"))


def pixel_values(checkpoint, files) -> torch.Tensor:
    processor = CrossViTImageProcessor.from_pretrained(checkpoint)
    return processor([PIL.Image.open(file) for file in files], return_tensors="pt")["pixel_values"]


def logits(checkpoint, batch) -> torch.Tensor:
    with torch.no_grad():
        return CrossViTForImageClassification.from_pretrained(checkpoint).eval()(batch).logits


@pytest.fixture
def calibrated_with(monkeypatch) -> list[torch.Tensor]:
    """The images that int8 was calibrated with."""
    seen: list[torch.Tensor] = []
    original = CalibrationSet.__iter__

    def iterate(self):
        seen.extend(sample["pixel_values"][0] for sample in self.calibration_dataset)
        return original(self)

    monkeypatch.setattr(CalibrationSet, "__iter__", iterate)
    return seen


@pytest.mark.parametrize("name", PACKAGES)
def test_program_has_the_logits_of_the_model_for_any_number_of_images(
    export, calibrated_with, checkpoint, zoo, tmp_path, name
):
    for package in PACKAGES[name]:
        pytest.importorskip(package)
    results, output = export("--formats", name, "--calibration_images", "10")
    *_, row = results["programs"]
    folder = tmp_path / "export" / row["folder"]
    options = {}
    if name.startswith("openvino"):
        options["config"] = {"INFERENCE_PRECISION_HINT": "bf16" if name == "openvino-bf16" else "f32"}
    if (
        name == "torch"
        and "trust_remote_code" in inspect.signature(exporters.ExportedModel.from_pretrained).parameters
    ):
        options["trust_remote_code"] = True  # transformers 5.24 asks, as torch unpickles its programs
    if name == "torchao-int8":
        program = CrossViTForImageClassification.from_pretrained(folder).eval()
        cast = torch.bfloat16
    else:
        program = exporters.ExportedModel.from_pretrained(folder, device="cpu", **options)
        cast = torch.float32
    batch = pixel_values(checkpoint, sorted(zoo.glob("validation/*/*.png")))
    expected = logits(checkpoint, batch)
    # 2e-6 were measured in float32, 0.01 to 0.06 in lower precisions of logits up to 2
    tolerance = 1e-4 if row["format"] in ("torch", "onnx", "openvino", "executorch") else 0.3
    for size in (1,) if name == "executorch" else (1, 3, 8, 9):
        with torch.no_grad():
            answer = program(pixel_values=batch[:size].to(cast)).logits.float()
        assert answer.shape == (size, 5)
        torch.testing.assert_close(answer, expected[:size], atol=tolerance, rtol=0)
        if tolerance > 1e-4 and size == 9:  # it is quantized indeed
            assert (answer - expected).abs().max() > 1e-4
    if name not in ("torchao-int8", "executorch"):
        with pytest.raises((AssertionError, RuntimeError)):  # other sizes of images are not what it was made for
            program(pixel_values=torch.zeros(1, 3, 44, 36))

    assert row["largest_difference"] == pytest.approx((answer - expected).abs().max().item(), abs=2e-2)
    assert row["format"] == name and name in output and (folder / "preprocessor_config.json").is_file()
    assert row["megabytes"] == pytest.approx(sum(file.stat().st_size for file in folder.iterdir()) / 1e6)
    assert min(row["milliseconds"]) > 0 and row["batches"] == [1, 2]

    # Calibrated with training images alone, of all classes, though they come in the order of their folders
    assert bool(calibrated_with) == (name in ("onnx-int8", "openvino-int8"))
    training = pixel_values(checkpoint, zoo.glob("train/*/*.png"))
    assert all(any(torch.equal(seen, image) for image in training) for seen in calibrated_with)
    if calibrated_with:
        assert len({seen.sum().item() for seen in calibrated_with}) == 10
        assert {seen.mean(dim=(1, 2)).argmax().item() for seen in calibrated_with} == {0, 1, 2}


def test_accuracy_is_that_of_the_held_out_images_by_the_names_of_their_classes(export, checkpoint, zoo):
    results, output = export("--formats", "torch")
    files = sorted(zoo.glob("validation/*/*.png"))
    names = CrossViTForImageClassification.from_pretrained(checkpoint).config.id2label
    answers = logits(checkpoint, pixel_values(checkpoint, files)).argmax(-1).tolist()
    accuracy = np.mean([names[answer] == file.parent.name for file, answer in zip(files, answers)])
    assert results["images"] == 9 and 0 < accuracy < 1
    assert [row["format"] for row in results["programs"]] == ["torch float32", "torch bfloat16", "torch"]
    for row in results["programs"]:
        assert row["accuracy"] == pytest.approx(accuracy, abs=0.12)  # bfloat16 may turn one of nine around
    assert results["programs"][2]["accuracy"] == pytest.approx(accuracy)
    lines = output.splitlines()
    assert re.search(r"^Deploy .*: \d+\.\d times as fast as torch float32, accuracy [\d.]+% \(", lines[-1])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda logits: logits + 2e-4, "its logits differ by 0.0002 from the model's, more than 0.0001"),
        (lambda logits: logits * float("nan"), "its logits differ by nan"),
        (lambda logits: logits[:1], "its logits of 3 images are of shape (1, 5)"),
        (lambda logits: logits + (len(logits) > 3), "its logits differ by 1 from the model's"),
    ],
    ids=["other", "nan", "one", "batch"],
)
def test_check_finds_programs_that_are_not_right(command, change, message):
    def model(pixel_values):
        return pixel_values.flatten(1)[:, :5]

    images = torch.randn(9, 3, 4, 4)
    command["check_program"]("onnx", model, images, model(images))
    with pytest.raises(CommandError, match=re.escape(message)):
        command["check_program"]("onnx", lambda pixel_values: change(model(pixel_values)), images, model(images))


def test_program_that_is_not_right_is_not_kept(export, tmp_path, monkeypatch):
    (tmp_path / "export" / "torch").mkdir(parents=True)  # nor an older one
    original = exporters.ExportedModel.__call__

    def call(self, **kwargs):
        outputs = original(self, **kwargs)
        outputs.logits = outputs.logits + 2e-4
        return outputs

    monkeypatch.setattr(exporters.ExportedModel, "__call__", call)
    output, error = export("--formats", "torch", status=1)
    assert error.startswith("export.py: error: torch was not exported: its logits differ by 0.0002 from the model's")
    assert "not exported: its logits" in output and "Deploy" in output
    assert {path.name for path in (tmp_path / "export").iterdir()} - {"_lock"} == {"README.md", "export.json"}


def test_one_format_that_fails_leaves_the_others(export, tmp_path, monkeypatch):
    pytest.importorskip("torchao")

    def fail(*args):
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr("transformers.exporters.exporter_dynamo.DynamoExporter.save_program", fail)
    _, error = export("--formats", "torch", "torchao-int8", status=1)
    assert error == "export.py: error: torch was not exported: no such operator"
    results = json.loads((tmp_path / "export" / "export.json").read_text())
    assert [row["format"] for row in results["programs"]][2:] == ["torchao-int8"]
    assert results["not_exported"] == {"torch": "not exported: no such operator"}
    assert not (tmp_path / "export" / "torch").exists()


def row(name, accuracy, *times_as_fast):
    return {"format": name, "accuracy": accuracy, "times_as_fast": list(times_as_fast)}


@pytest.mark.parametrize(
    "others, expected",
    [
        ([row("a", 0.9, 2.0, 2.0), row("b", 0.9, 1.0, 3.0)], "b"),  # with more images than one
        ([row("a", 0.89, 2.0, 2.0), row("b", 0.889, 3.0, 3.0)], "a"),  # one point of accuracy, not more
        ([row("a", 0.95, 0.9, 0.9)], "float32"),
    ],
)
def test_choice_is_the_fastest_of_those_nearly_as_right(command, others, expected):
    assert command["choose"]([row("float32", 0.9, 1.0, 1.0), *others])["format"] == expected


def test_times_are_taken_in_turns(command):
    calls = []

    def program(pixel_values):
        calls.append("program")
        time.sleep(0.01)

    def baseline(pixel_values):
        calls.append("baseline")
        time.sleep(0.02)

    fast, slow = command["paired_milliseconds"](program, baseline, torch.zeros(1), 2)
    assert 10 <= fast < 15 < 20 <= slow < 30
    assert [name for name, _ in itertools.groupby(calls)] == ["baseline", "program"] * 2


def test_readme_says_how_to_run_each_program(export, checkpoint, zoo, tmp_path, monkeypatch, capsys):
    pytest.importorskip("openvino")
    export("--formats", "openvino", "openvino-bf16")
    guide = (tmp_path / "export" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "export")
    image = zoo / "validation" / "bee" / "0.png"
    shutil.copy(image, "image.png")
    names: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", guide, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    for block in blocks:
        exec(block, names)
        if "logits" in names:
            difference = torch.as_tensor(names.pop("logits")) - logits(checkpoint, names["pixel_values"])
            assert difference.abs().max() < (0.2 if "bf16" in block else 1e-4)
    expected = names["id2label"][logits(checkpoint, pixel_values(checkpoint, [image])).argmax().item()]
    assert capsys.readouterr().out.split() == [expected] * 2


def test_missing_package_is_named_with_its_remedy(export, monkeypatch):
    find_spec = importlib.util.find_spec
    absent = {"onnxscript", "openvino", "nncf", "torchao", "executorch", "onnx", "onnxruntime"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in absent else find_spec(name, *rest)
    )
    results, output = export("--test_images", "4")
    assert results["images"] == 4
    assert [row["format"] for row in results["programs"]][2:] == ["torch"]
    assert results["not_exported"]["openvino-int8"] == "not installed; pip install openvino nncf"
    assert re.search(r"^openvino-int8 +not installed; pip install openvino nncf$", output, re.MULTILINE)
    _, error = export("--formats", "torch", "openvino-int8", status=1)
    assert error == "export.py: error: --formats openvino-int8: not installed; pip install openvino nncf"


def test_older_transformers_is_named(export, monkeypatch):
    monkeypatch.setattr("transformers.exporters", None)
    _, error = export(status=1)
    assert "exports need transformers 5.23 or later" in error


@pytest.mark.parametrize(
    "options, message",
    [
        (["--formats", "onx"], "--formats onx: none of torch, onnx"),
        (["--model", "missing"], "missing: no CrossViT"),
        (["--model", ""], "give both --model"),
        (["--data", ""], "give both --model"),
        (["--data", "missing"], "missing: no data set"),
        (["--split", "train"], "needs images of one label each"),
        (["--split", "tset"], "needs images of one label each"),
        (["--threads", "0"], "--threads 0"),
        (["--output_dir", "/dev/null/export"], "--output_dir /dev/null/export: Not a directory"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(export, tmp_path, options, message):
    output, error = export(*options, status=1)
    assert message in error and "Exporting" not in output
    assert {path.name for path in (tmp_path / "export").glob("*")} <= {"_lock"}


def test_images_to_measure_with_alone_are_not_enough(export, tmp_path):
    write_zoo(tmp_path / "alone", images=1, splits=("validation",))
    assert "in a split 'train' to calibrate with" in export("--data", tmp_path / "alone", status=1)[1]


def test_folder_with_other_things_is_left_alone(export, tmp_path):
    (tmp_path / "export" / "torch").mkdir(parents=True)
    (tmp_path / "export" / "thesis.tex").touch()
    assert "has other things in it, as 'thesis.tex'" in export("--formats", "torch", status=1)[1]
    assert {path.name for path in (tmp_path / "export").iterdir()} == {"torch", "thesis.tex"}


@pytest.mark.parametrize("event", [2, 6, 9])
def test_killed_export_leaves_nothing_half_written(export, checkpoint, zoo, tmp_path, event):
    arguments = ["export", "--model", checkpoint, "--data", zoo, "--output_dir", tmp_path / "export", *QUICK]
    arguments = [*map(str, arguments), "--formats", "torch"]
    command = f"from examples_in_process import run_killed; run_killed({event}, *{arguments!r})"
    process = subprocess.run([sys.executable, "-c", command], cwd=Path(__file__).parent)
    assert process.returncode == -signal.SIGKILL
    assert {path.name for path in (tmp_path / "export").iterdir()} <= {"_lock", ".unfinished"}
    export("--formats", "torch")


def test_quickstart_is_trained_and_exported(tmp_path):
    command = [sys.executable, EXAMPLES / "export.py", "--formats", "torch", "--rounds", "1"]
    for number in range(2):
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        assert ("the quickstart trains it" in process.stdout) == (number == 0)
    results = json.loads((tmp_path / "outputs" / "export" / "export.json").read_text())
    assert results["images"] == 360 and results["programs"][0]["accuracy"] > 0.95
    assert results["programs"][2]["largest_difference"] <= 1e-4
