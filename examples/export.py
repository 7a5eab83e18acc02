# Copyright 2026 The CrossViT for Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Exports a CrossViT to run on CPUs without its Python code, measures each program and says which one to deploy.

    python examples/export.py                                   # the quickstart's model, which is trained if need be
    python examples/export.py --model my-crossvit --data my-images --formats onnx openvino openvino-int8

`my-images` has images to measure accuracy with (validation/ or test/) and others (train/) to calibrate int8 with. The
programs take images as the image processor makes them, in batches of any size (ExecuTorch's: of one); README.md beside
them says how to run each. A float32 program whose logits are not the model's is not kept.
"""

import signal


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the seconds of imports without a trace

import contextlib
import copy
import importlib.util
import inspect
import io
import json
import logging
import os
import runpy
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import transformers
from command_line import QUICKSTART, load_checkpoint, make_parser, parse, quickstart_model, reason, run

from crossvit import CrossViTForImageClassification
from crossvit.training.errors import CommandError
from crossvit.training.image_datasets import ImageSource, LabelledImages, match_classes
from crossvit.training.image_files import check_labels, name_of, read_image
from crossvit.training.resuming import LOCK_NAME
from crossvit.training.training_run import exclusive


try:
    from transformers import exporters
except ImportError:
    exporters = None

Run = Callable[[torch.Tensor], torch.Tensor]  # pixel values -> logits

SCRIPT = Path(__file__).with_name("quickstart.py")
UNFINISHED = ".unfinished"  # where a program is until it is known to be right
TOLERANCE = 1e-4  # between the logits of a float32 program and of the model
ACCURACY_LOSS = 0.01  # that is worth a faster program
BLOCK_SECONDS = 0.05


@dataclass
class Format:
    """
    A way to run a model.

    Args:
        packages (`tuple[str, ...]`): what it needs beside PyTorch and Transformers.
        folder (`str`): of the program, in the output folder.
        precision (`str`): "float32" if the logits must be those of the model.
    """

    packages: tuple[str, ...]
    folder: str
    precision: str = "float32"


ONNX = ("onnx", "onnxscript", "onnxruntime")
FORMATS = {
    "torch": Format((), "torch"),
    "onnx": Format(ONNX, "onnx"),
    "onnx-int8": Format(ONNX, "onnx-int8", "int8"),
    "openvino": Format(("openvino",), "openvino"),
    "openvino-bf16": Format(("openvino",), "openvino", "bf16"),  # the same file, run in another precision
    "openvino-int8": Format(("openvino", "nncf"), "openvino-int8", "int8"),
    "torchao-int8": Format(("torchao",), "torchao-int8", "int8"),
    "executorch": Format(("executorch",), "executorch"),
}


@dataclass
class ExportArguments:
    """What to export, and how to measure it."""

    model: str | None = field(
        default=None, metadata={"help": f"Folder or Hub id of a CrossViT. Default: {QUICKSTART}, of the quickstart."}
    )
    output_dir: str = field(default="outputs/export", metadata={"help": "Folder for the programs."})
    formats: list[str] = field(
        default_factory=list,
        metadata={"help": f"Of {', '.join(FORMATS)}. Default: all whose packages are installed."},
    )
    split: str | None = field(default=None, metadata={"help": "To measure with. Default: validation, else test."})
    by_order: bool = field(
        default=False, metadata={"help": "Classes of the data have other names than the model's, in the same order."}
    )
    calibration_images: int = field(default=300, metadata={"help": "Training images to calibrate int8 with."})
    test_images: int = field(default=1000, metadata={"help": "Measure the accuracy with so many images at most."})
    batch_size: int = field(default=8, metadata={"help": "Images at once, beside 1, to measure the speed with."})
    threads: int | None = field(default=None, metadata={"help": "Of each program. Default: those of PyTorch."})
    rounds: int = field(default=10, metadata={"help": "In which a program and PyTorch take turns to be timed."})


@dataclass
class Images:
    """Images as the model takes them: some to calibrate with, and others with labels to measure with."""

    calibration: torch.Tensor
    test: torch.Tensor
    labels: torch.Tensor


def check_arguments(args: ExportArguments, data: ImageSource) -> None:
    if not hasattr(exporters, "ExportedModel"):
        raise CommandError(
            f"exports need transformers 5.23 or later, this is {transformers.__version__}: pip install -U transformers"
        )
    for name in args.formats:
        if name not in FORMATS:
            raise CommandError(f"--formats {name}: none of {', '.join(FORMATS)}")
        if missing := missing_packages(name):
            raise CommandError(f"--formats {name}: {missing}")
    if bool(args.model) != bool(data.data):
        raise CommandError("give both --model, a CrossViT, and --data, images to measure it with; or neither")
    counts = ("calibration_images", "test_images", "batch_size", "rounds", "threads")
    for option, value in ((option, getattr(args, option)) for option in counts):
        if value is not None and value < 1:
            raise CommandError(f"--{option} {value}: not so few")


def missing_packages(name: str) -> str:
    missing = [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]
    return f"not installed; pip install {' '.join(missing)}" if missing else ""


def check_output(output: Path) -> None:
    """Programs replace what has their names, so it must be the work of this command."""
    known = {*FORMATS, "export.json", "README.md", LOCK_NAME, UNFINISHED}
    if others := output.is_dir() and sorted({path.name for path in output.iterdir()} - known):
        raise CommandError(f"--output_dir {output}: has other things in it, as {others[0]!r}; name a new folder")


def load_images(args: ExportArguments, data: ImageSource, model: Any, processor: Any) -> Images:
    if not data.data:
        train, test = runpy.run_path(str(SCRIPT))["load_datasets"]()
        calibration = train.images[: args.calibration_images]
        measured, labels = test.images[: args.test_images], test.labels[: args.test_images]
    else:
        images = LabelledImages.load(data)
        split = args.split or next((name for name in ("validation", "test") if name in images.splits), None)
        if images.multi_label or "train" not in images.splits or split not in {*images.splits} - {"train"}:
            raise CommandError(
                f"{data.data}: needs images of one label each, in a split 'train' to calibrate with and in another one"
                f" to measure with, got {', '.join(images.splits)}"
            )
        classes = match_classes(model.config, images.class_names, args.by_order)
        # Folders are in the order of their classes
        rows = list(images.splits["train"].shuffle(seed=0).take(args.calibration_images))
        calibration = [read_image(row["image"]) for row in rows]
        rows = list(images.splits[split].shuffle(seed=0).take(args.test_images))
        for row in rows:
            check_labels(row["labels"], len(classes), name_of(row, f"an image of {split!r}"))
        measured, labels = [read_image(row["image"]) for row in rows], [classes[row["labels"]] for row in rows]
    return Images(process(processor, calibration), process(processor, measured), torch.tensor(labels))


def process(processor: Any, images: list[PIL.Image.Image]) -> torch.Tensor:
    tensors = [processor(image, return_tensors="pt")["pixel_values"] for image in images]
    if any(tensor.shape != tensors[0].shape for tensor in tensors):
        raise CommandError("the image processor must make images of one size: set `do_center_crop`")
    return torch.cat(tensors)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporters say about versions and progress: what they make is checked."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def export_config(name: str, calibration: torch.Tensor) -> Any:
    """The configuration of Transformers' exporter of a format."""
    samples = [{"pixel_values": image[None]} for image in calibration]
    shapes: dict[str, Any] = {
        "dynamic": True,
        "dynamic_shapes": {"pixel_values": {0: torch.export.Dim("batch", min=1)}},
    }
    if name == "torch":
        return exporters.DynamoConfig(**shapes)
    if name == "onnx":
        return exporters.OnnxConfig(**shapes)
    if name == "onnx-int8":
        from onnxruntime.quantization import QuantType

        # Products of activations with each other stay in float32: int8 costs them accuracy and gains no time
        static = exporters.OnnxRuntimeStaticConfig(
            per_channel=True,
            activation_type=QuantType.QUInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            extra_options={"MatMulConstBOnly": True},
        )
        return exporters.OnnxConfig(quantizer=exporters.OnnxRuntimeQuantizer(static, samples), **shapes)
    if name == "openvino":
        return exporters.OpenVINOConfig(**shapes)
    if name == "openvino-int8":
        nncf = exporters.NNCFQuantizationConfig(subset_size=len(samples))  # NNCF would take 300 of more
        return exporters.OpenVINOConfig(quantizer=exporters.NNCFOpenVINOQuantizer(nncf, samples), **shapes)
    # ExecuTorch keeps the size of the batch it was lowered with
    return exporters.ExecutorchConfig(backend="xnnpack")


def save_program(name: str, model: Any, calibration: torch.Tensor, folder: Path) -> None:
    if name == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        # Activations in int8 too are faster (2.7 against 2.0 times, crossvit_small), but only once `torch.compile` has
        # spent a minute on it in each process; without it they are slower
        config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
        quantized = CrossViTForImageClassification.from_pretrained(
            model.name_or_path, dtype=torch.bfloat16, quantization_config=config
        )
        quantized.save_pretrained(folder)
        return
    config = export_config(name, calibration)
    sample = calibration[:1] if name == "executorch" else calibration[:1].repeat(2, 1, 1, 1)
    exporter = exporters.AutoHfExporter.from_config(config)
    exporter.export(model, {"pixel_values": sample}, config).save_pretrained(folder)


def run_options(name: str) -> dict[str, Any]:
    """Options to load a program with."""
    if name.startswith("openvino"):  # It computes in bfloat16 by default where the CPU can
        return {"config": {"INFERENCE_PRECISION_HINT": "bf16" if name == "openvino-bf16" else "f32"}}
    # Those of torch.export are pickles, which transformers from 5.24 on loads on request alone
    if (
        name == "torch"
        and "trust_remote_code" in inspect.signature(exporters.ExportedModel.from_pretrained).parameters
    ):
        return {"trust_remote_code": True}
    return {}


def load_program(name: str, folder: Path, threads: int) -> Run:
    if name == "torchao-int8":
        return eager(CrossViTForImageClassification.from_pretrained(folder))
    options = run_options(name)
    if name.startswith("onnx"):
        import onnxruntime

        options["session_options"] = onnxruntime.SessionOptions()
        options["session_options"].intra_op_num_threads = threads
    elif name.startswith("openvino"):
        options["config"]["INFERENCE_NUM_THREADS"] = threads
    program = exporters.ExportedModel.from_pretrained(folder, device="cpu", **options)
    if name == "executorch":  # one image at a time
        return lambda pixel_values: torch.cat([program(pixel_values=image).logits for image in pixel_values.split(1)])
    return lambda pixel_values: program(pixel_values=pixel_values).logits


def eager(model: Any) -> Run:
    model.eval()

    @torch.inference_mode()
    def run_model(pixel_values: torch.Tensor) -> torch.Tensor:
        return model(pixel_values.to(model.dtype)).logits.float()

    return run_model


def logits_of(program: Run, pixel_values: torch.Tensor, batch_size: int) -> torch.Tensor:
    return torch.cat([program(batch).clone() for batch in pixel_values.split(batch_size)])


def check_program(name: str, program: Run, pixel_values: torch.Tensor, reference: torch.Tensor) -> None:
    """Raises a `CommandError` for a program that does not take any number of images, or not as the model does."""
    for batch_size, number in ((1, 1), (3, 3), (8, len(pixel_values))):
        logits, expected = logits_of(program, pixel_values[:number], batch_size), reference[:number]
        if logits.shape != expected.shape:
            raise CommandError(f"its logits of {number} images are of shape {tuple(logits.shape)}")
        difference = (logits - expected).abs().max().item()
        if FORMATS[name].precision == "float32" and not difference <= TOLERANCE:  # which NaN is not either
            raise CommandError(f"its logits differ by {difference:.2g} from the model's, more than {TOLERANCE}")


def export(
    name: str,
    model: Any,
    processor: Any,
    images: Images,
    reference: torch.Tensor,
    args: ExportArguments,
) -> None:
    """Exports a model, reads the program back, checks it, and only then puts it in its place."""
    folder, unfinished = Path(args.output_dir) / name, Path(args.output_dir) / UNFINISHED
    try:
        program = unfinished / name
        program.mkdir(parents=True)
        save_program(name, model, images.calibration, program)
        processor.save_pretrained(program)
        check_program(name, load_program(name, program, torch.get_num_threads()), images.test, reference)
        if folder.exists():
            os.replace(folder, unfinished / "outdated")
        os.replace(program, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def paired_milliseconds(program: Run, baseline: Run, pixel_values: torch.Tensor, rounds: int) -> tuple[float, float]:
    """The median times of a program and of the baseline, in turns: what slows the machine down slows both."""
    times: dict[Run, list[float]] = {baseline: [], program: []}
    for _ in range(rounds):
        for run_program, measured in times.items():
            for _ in range(2):  # threads of the other one wait for work for a while
                run_program(pixel_values)
            end = time.perf_counter() + BLOCK_SECONDS
            while not measured or time.perf_counter() < end:
                start = time.perf_counter()
                run_program(pixel_values)
                measured.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[program]), statistics.median(times[baseline])


def measure(program: Run, baseline: Run, images: Images, reference: torch.Tensor, args: ExportArguments) -> dict:
    """What a program gets right, and how fast it is beside the model in float32."""
    logits = logits_of(program, images.test, args.batch_size)
    batches = sorted({1, args.batch_size})
    times = [
        paired_milliseconds(program, baseline, images.test[:1].repeat(batch_size, 1, 1, 1), args.rounds)
        for batch_size in batches
    ]
    return {
        "largest_difference": (logits - reference).abs().max().item(),
        "accuracy": (logits.argmax(-1) == images.labels).float().mean().item(),
        "batches": batches,
        "milliseconds": [milliseconds for milliseconds, _ in times],
        "times_as_fast": [baseline_milliseconds / milliseconds for milliseconds, baseline_milliseconds in times],
    }


def choose(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest with more than one image, if there is such a measurement, of those nearly as right as the first."""
    lowest = rows[0]["accuracy"] - ACCURACY_LOSS - 1e-6
    return max((row for row in rows if row["accuracy"] >= lowest), key=lambda row: row["times_as_fast"][-1])


def make_table(rows: list[dict[str, Any]], notes: dict[str, str]) -> list[str]:
    batches = rows[0]["batches"]
    columns = "".join(f"{f'ms, batch {batch_size}':>14}{'speed-up':>10}" for batch_size in batches)
    lines = [f"{'':16}{'MB':>8}{'difference':>12}{'accuracy':>10}{columns}"]
    for row in rows:
        speeds = zip(row["milliseconds"], row["times_as_fast"])
        columns = "".join(f"{milliseconds:14.2f}{times_as_fast:10.2f}" for milliseconds, times_as_fast in speeds)
        figures = f"{row['megabytes']:8.1f}{row['largest_difference']:12.1g}{row['accuracy']:10.1%}{columns}"
        lines.append(f"{row['format']:16}{figures}")
    return lines + [f"{name:16}  {note}" for name, note in notes.items()]


GUIDE = """\
# An exported CrossViT

{table}

{numbers}

{choice}

Programs take images as the image processor makes them, any number at once. In the folder of this file:

```python
from PIL import Image
import crossvit
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.exporters import ExportedModel

processor = AutoImageProcessor.from_pretrained("{folder}")
id2label = AutoConfig.from_pretrained("{folder}").id2label
pixel_values = processor(Image.open("image.png").convert("RGB"), return_tensors="pt")["pixel_values"]
```
"""
TORCHAO_GUIDE = """
## {name}

```python
model = AutoModelForImageClassification.from_pretrained("{folder}").eval()
logits = model(pixel_values.to(model.dtype)).logits
print(id2label[logits.argmax(-1).item()])
```
"""
PROGRAM_GUIDE = """
## {name}

```python
program = ExportedModel.from_pretrained("{folder}", device="cpu"{options})
logits = program(pixel_values=pixel_values).logits
print(id2label[logits.argmax(-1).item()])
```
"""
RUNTIME_GUIDES = {
    "torch": """
It is a pickle, which can run any code: load those alone that you exported yourself or trust like your own.
""",
    "executorch": """
It takes one image at a time: `pixel_values` of shape (1, 3, height, width).
""",
    "onnx": """
Without PyTorch and Transformers, from an array of `pixel_values`:

```python
import onnxruntime

session = onnxruntime.InferenceSession("{folder}/model.onnx")
(logits,) = session.run(["logits"], {{"pixel_values": pixel_values.numpy()}})
```
""",
    "openvino": """
Without PyTorch and Transformers, from an array of `pixel_values`:

```python
import openvino

program = openvino.compile_model("{folder}/openvino_model.xml", "CPU", {config})
logits = program({{"pixel_values": pixel_values.numpy()}})["logits"]
```
""",
}


def make_guide(rows: list[dict[str, Any]], table: list[str], numbers: str, choice: str) -> str:
    """How to run the programs, as README.md."""
    programs = [row for row in rows if row["folder"]]
    folder = programs[0]["folder"] if programs else ""
    text = GUIDE.format(
        table="\n".join(f"    {line}" for line in table), numbers=numbers, choice=choice, folder=folder
    )
    for row in programs:
        name, folder, options = row["format"], row["folder"], run_options(row["format"])
        guide = TORCHAO_GUIDE if name == "torchao-int8" else PROGRAM_GUIDE
        guide += RUNTIME_GUIDES.get(name.partition("-")[0], "")
        config = json.dumps(options.get("config"))
        arguments = "".join(f", {option}={value!r}" for option, value in options.items())
        text += guide.format(name=name, folder=folder, options=arguments, config=config)
    return text


def megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6


def write(file: Path, text: str) -> None:
    unfinished = file.with_name(UNFINISHED)
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, file)


def export_all(args: ExportArguments, data: ImageSource) -> None:
    output = Path(args.output_dir)
    source = args.model or quickstart_model(SCRIPT)
    model, processor = load_checkpoint(source, dtype=torch.float32)
    images = load_images(args, data, model.eval(), processor)
    if args.threads:
        torch.set_num_threads(args.threads)
    threads = torch.get_num_threads()

    baseline, half = eager(model), copy.deepcopy(model).bfloat16()
    reference = logits_of(baseline, images.test, args.batch_size)
    rows = [
        {"format": f"torch {precision}", "folder": None, "megabytes": program.get_memory_footprint() / 1e6}
        | measure(eager(program), baseline, images, reference, args)
        for precision, program in (("float32", model), ("bfloat16", half))
    ]
    notes: dict[str, str] = {}
    failed: dict[str, str] = {}
    exported: set[str] = set()
    for name in args.formats or FORMATS:
        folder = FORMATS[name].folder
        if note := missing_packages(name) or failed.get(folder, ""):
            notes[name] = note
            continue
        print(f"Exporting and measuring {name} ...", flush=True)
        try:
            with quiet():
                if folder not in exported:
                    export(folder, model, processor, images, reference, args)
                    exported.add(folder)
                program = load_program(name, output / folder, threads)
        # Of many types: what the tools of others cannot do
        except Exception as error:
            failed[folder] = notes[name] = f"not exported: {reason(error)}"
            shutil.rmtree(output / folder, ignore_errors=True)  # of an earlier export, perhaps of another model
            continue
        row = {"format": name, "folder": folder, "megabytes": megabytes(output / folder)}
        rows.append(row | measure(program, baseline, images, reference, args))

    table, best = make_table(rows, notes), choose(rows)
    numbers = (
        f"Accuracy on {len(images.test):,} images; {threads} threads; speed-up over torch float32 in turns with it."
    )
    what = {"torch float32": f"{source} as it is", "torch bfloat16": f"{source} in bfloat16"}.get(best["format"])
    if what is None:
        what = str(output / best["folder"])
        what += " run in bf16" if best["format"] == "openvino-bf16" else ""
    choice = (
        f"Deploy {what}: {best['times_as_fast'][-1]:.1f} times as fast as torch float32, accuracy"
        f" {best['accuracy']:.1%} ({rows[0]['accuracy']:.1%})"
    )
    results = {"model": source, "data": data.data or "digits", "images": len(images.test), "threads": threads}
    results |= {"programs": rows, "not_exported": notes, "deploy": best["format"]}
    write(output / "export.json", json.dumps(results, indent=2))
    write(output / "README.md", make_guide(rows, table, numbers, choice))
    print(*table, numbers, choice, sep="\n")
    if failed:
        raise CommandError("; ".join(f"{folder} was {problem}" for folder, problem in failed.items()))


def main() -> None:
    parser = make_parser([ExportArguments, ImageSource], __doc__, {})
    args, data = parse(parser)
    check_arguments(args, data)
    transformers.utils.logging.disable_progress_bar()
    check_output(Path(args.output_dir))
    with exclusive(Path(args.output_dir)):
        shutil.rmtree(Path(args.output_dir) / UNFINISHED, ignore_errors=True)  # of a run that was killed
        export_all(args, data)


if __name__ == "__main__":
    run(main)
