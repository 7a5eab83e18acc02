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
"""Exports a CrossViT for inference on CPUs without its Python code; checks, measures and compares the programs.

    python examples/export.py --data photos                                 # published weights
    python examples/export.py --data photos --model outputs/finetune --formats onnx openvino openvino-int8

`photos` holds a folder of images per class, or train/ and validation/ with such folders. int8 is calibrated with some
of the images (those of train/), and accuracy is measured on others. Programs take images as the image processor makes
them, in batches of any size (ExecuTorch: of one); the README.md beside them says how to run each. The logits of
programs in float32 must be those of the model.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import logging
import math
import random
import shutil
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import load_checkpoint, reason, run


if TYPE_CHECKING:
    import torch

    Program = Callable[[torch.Tensor], torch.Tensor]  # pixel values -> logits


# The packages that each format needs besides PyTorch and Transformers
FORMATS = {
    "torch": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "onnx-int8": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "openvino-int8": ("openvino", "nncf"),
    "torchao-int8": ("torchao",),
    "executorch": ("executorch",),
}
SPLITS = ("train", "validation", "val", "test")  # of a data set: the first calibrates, the second measures
TOLERANCE = 1e-4  # between the logits of a float32 program and those of the model
ACCURACY_LOSS = 0.01  # that a faster program may have
BATCH_SIZE = 8  # of images, besides 1, to measure speed with
ROUNDS = 5  # in which programs take turns to be timed


def load_images(args: argparse.Namespace, label2id: dict[Any, Any], processor: Any) -> tuple[Any, Any, Any]:
    """
    Pixel values to calibrate with, others to measure with, and their labels, which are `None` if the classes of the
    images are not those of the model.
    """
    import PIL.Image
    import torch
    from torchvision.datasets import ImageFolder
    from tqdm import tqdm
    from transformers.image_utils import load_image

    names = {path.name for path in args.data.iterdir() if path.is_dir()}
    splits = [args.data / split for split in SPLITS if split in names] if names <= set(SPLITS) else []
    folders = [ImageFolder(folder) for folder in splits[:2] or [args.data]]
    for folder in folders:
        random.Random(0).shuffle(folder.samples)  # They come by class
    calibration, test = folders[0].samples[: args.calibration_images], folders[-1].samples
    if len(folders) == 1:  # At most half of the images calibrate; the others are held out
        calibration = calibration[: len(test) // 2]
        test = test[len(calibration) :]
    test = test[: args.test_images]
    if not calibration or len(test) < 2:
        raise ValueError(f"--data {args.data}: needs images to calibrate with and two others to measure with")

    classes = folders[-1].classes
    if args.by_order and len(classes) == len(label2id):
        label2id = {name: label for label, name in enumerate(classes)}
    labels = None
    if set(classes) <= set(label2id):
        labels = torch.tensor([label2id[classes[index]] for _, index in test])

    def process(samples: list[tuple[str, int]], description: str) -> torch.Tensor:
        images = (load_image(PIL.Image.open(path)) for path, _ in tqdm(samples, description, leave=False))
        return torch.cat([processor(image, return_tensors="pt").pixel_values for image in images])

    return process(calibration, "Calibration images"), process(test, "Test images"), labels


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters print about versions and progress: their programs are checked."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def save_program(name: str, model: Any, calibration: torch.Tensor, folder: Path) -> None:
    """Exports a model with Transformers' exporter for a format, or quantizes it with torchao."""
    import torch
    from transformers import TorchAoConfig, exporters

    samples = [{"pixel_values": image[None]} for image in calibration]
    batch: dict[str, Any] = {
        "dynamic": True,
        "dynamic_shapes": {"pixel_values": {0: torch.export.Dim("batch", min=1)}},
    }
    config: Any
    match name:
        case "torch":
            config = exporters.DynamoConfig(**batch)
        case "onnx":
            config = exporters.OnnxConfig(**batch)
        case "onnx-int8":
            from onnxruntime.quantization import QuantType

            static = exporters.OnnxRuntimeStaticConfig(
                per_channel=True,
                activation_type=QuantType.QUInt8,
                # Products of two activations stay in float32: int8 costs accuracy there and saves no time
                op_types_to_quantize=["MatMul", "Gemm"],
                extra_options={"MatMulConstBOnly": True},
            )
            config = exporters.OnnxConfig(quantizer=exporters.OnnxRuntimeQuantizer(static, samples), **batch)
        case "openvino":
            config = exporters.OpenVINOConfig(**batch)
        case "openvino-int8":
            nncf = exporters.NNCFQuantizationConfig(subset_size=len(samples))  # by default at most 300
            config = exporters.OpenVINOConfig(quantizer=exporters.NNCFOpenVINOQuantizer(nncf, samples), **batch)
        case "executorch":
            config = exporters.ExecutorchConfig(backend="xnnpack")  # keeps the batch size of the sample
        case "torchao-int8":
            from torchao.quantization import Int8WeightOnlyConfig

            # Activations in int8 would be faster, but only after `torch.compile`, a minute in each process
            options = {"dtype": torch.bfloat16, "quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
            return type(model).from_pretrained(model.name_or_path, **options).save_pretrained(folder)
    sample = calibration[:1].repeat(1 if name == "executorch" else 2, 1, 1, 1)
    exporter = exporters.AutoHfExporter.from_config(config)
    exporter.export(model, {"pixel_values": sample}, config).save_pretrained(folder)


def load_program(name: str, folder: Path, precision: str = "f32") -> Program:
    """Loads what `save_program` wrote; `precision` is that of OpenVINO."""
    import torch
    from transformers.exporters import ExportedModel

    from crossvit import CrossViTForImageClassification

    options: dict[str, Any] = {}
    match name.partition("-")[0]:
        case "torchao":
            return eager(CrossViTForImageClassification.from_pretrained(folder))
        case "torch":
            options["trust_remote_code"] = True  # The program is a pickle
        case "onnx":
            import onnxruntime

            options["session_options"] = onnxruntime.SessionOptions()
            options["session_options"].intra_op_num_threads = torch.get_num_threads()
        case "openvino":  # computes in bfloat16 by default on CPUs that support it
            options["config"] = {"INFERENCE_PRECISION_HINT": precision}
            options["config"]["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
    program = ExportedModel.from_pretrained(folder, device="cpu", **options)
    if name == "executorch":
        return lambda batch: torch.cat([program(pixel_values=image).logits for image in batch.split(1)])
    return lambda batch: program(pixel_values=batch).logits


def eager(model: Any) -> Program:
    """A model as a program."""
    import torch

    @torch.inference_mode()
    def run_model(pixel_values: torch.Tensor) -> torch.Tensor:
        return model(pixel_values.to(model.dtype)).logits.float()

    model.eval()
    return run_model


def compute_logits(program: Program, pixel_values: torch.Tensor, description: str) -> torch.Tensor:
    """The logits of images in batches of different sizes, all of which a program must take."""
    import torch
    from tqdm import tqdm

    batches = [pixel_values[:1], *pixel_values[1:].split(BATCH_SIZE)]
    return torch.cat([program(batch).clone() for batch in tqdm(batches, description, leave=False)])


def paired_milliseconds(programs: list[Program], batch: torch.Tensor, seconds: float) -> list[float]:
    """The median times of programs that take turns, so that what slows the machine down slows all of them."""
    import torch
    from torch.utils.benchmark import Timer

    timers = [
        Timer("program(batch)", globals={"program": program, "batch": batch}, num_threads=torch.get_num_threads())
        for program in programs
    ]
    rounds = [
        [timer.blocked_autorange(min_run_time=seconds / ROUNDS).median for timer in timers] for _ in range(ROUNDS)
    ]
    return [1000 * statistics.median(times) for times in zip(*rounds)]


def format_row(row: dict[str, Any]) -> str:
    times = "".join(f"{time:14.2f}{speed:10.2f}" for time, speed in zip(row["milliseconds"], row["times_as_fast"]))
    return f"{row['format']:16}{row['megabytes']:8.1f}{row['largest_difference']:12.1g}{row['accuracy']:11.1%}{times}"


def choose(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest program with the larger batch among those nearly as accurate as the first, the model in float32."""
    lowest = rows[0]["accuracy"] - ACCURACY_LOSS - 1e-6
    return max((row for row in rows if row["accuracy"] >= lowest), key=lambda row: row["times_as_fast"][-1])


GUIDE = """\
# An exported CrossViT

```
{table}
```

Every program takes images as the image processor makes them, and returns logits. In the folder of this file:

```python
from PIL import Image
import crossvit
from transformers import AutoConfig, AutoImageProcessor

processor = AutoImageProcessor.from_pretrained("{folder}")
id2label = AutoConfig.from_pretrained("{folder}").id2label
pixel_values = processor(Image.open("image.png").convert("RGB"), return_tensors="pt")["pixel_values"]
```
"""
USAGE = {
    "torch": """\
from transformers.exporters import ExportedModel

program = ExportedModel.from_pretrained("{folder}", trust_remote_code=True)  # that of torch is a pickle
logits = program(pixel_values=pixel_values).logits
""",
    "onnx": """\
import onnxruntime  # needs neither PyTorch nor Transformers

session = onnxruntime.InferenceSession("{folder}/model.onnx")
(logits,) = session.run(["logits"], {{"pixel_values": pixel_values.numpy()}})
""",
    "openvino": """\
import openvino  # needs neither PyTorch nor Transformers

options = {{"INFERENCE_PRECISION_HINT": "f32"}}  # or "bf16"
program = openvino.compile_model("{folder}/openvino_model.xml", "CPU", options)
logits = program({{"pixel_values": pixel_values.numpy()}})["logits"]
""",
    "torchao": """\
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("{folder}").eval()
logits = model(pixel_values.to(model.dtype)).logits
""",
}
USAGE["executorch"] = USAGE["torch"]


def make_guide(names: list[str], table: str) -> str:
    """The README.md: the table, and how to run each program."""
    guide = GUIDE.format(table=table, folder=names[0])
    for name in names:
        usage = USAGE[name.partition("-")[0]].format(folder=name)
        guide += f"\n## {name}\n\n```python\n{usage}print(id2label[logits[0].argmax().item()])\n```\n"
    return guide


def missing_packages(name: str) -> str:
    missing = [package for package in FORMATS[name] if importlib.util.find_spec(package) is None]
    return f"not installed; pip install {' '.join(missing)}" if missing else ""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="labelled images")
    parser.add_argument(
        "--model",
        default="timm/crossvit_15_dagger_240.in1k",
        help="folder or Hub id of a CrossViT; default: %(default)s",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/export"), help="default: %(default)s")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, help="default: those whose packages are installed")
    parser.add_argument(
        "--by_order", action="store_true", help="the classes of the data are the model's, in order, by other names"
    )
    parser.add_argument("--calibration_images", type=int, default=300, help="at most; default: %(default)s")
    parser.add_argument("--test_images", type=int, default=1000, help="at most; default: %(default)s")
    parser.add_argument("--threads", type=int, help="of each program; default: those of PyTorch")
    parser.add_argument("--seconds", type=float, default=2, help="of each measurement of speed; default: %(default)s")
    args = parser.parse_args()
    for name in args.formats or ():
        if missing := missing_packages(name):
            parser.error(f"--formats {name}: {missing}")
    if args.output_dir.is_dir():
        files = {path.name for path in args.output_dir.iterdir()}
        if others := sorted(files - {*FORMATS, "export.json", "README.md"}):
            parser.error(f"--output_dir {args.output_dir}: holds other files, such as {others[0]}; name a new folder")
    return args


def main() -> None:
    args = parse_arguments()

    # After the options, as these imports take seconds
    import torch
    import transformers

    from crossvit.training.errors import CommandError

    if not hasattr(getattr(transformers, "exporters", None), "ExportedModel"):
        raise CommandError(f"needs transformers 5.23 or later, this is {transformers.__version__}")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    args.output_dir.mkdir(parents=True, exist_ok=True)
    model, processor = load_checkpoint(args.model, dtype=torch.float32)
    label2id = {name: label for label, name in model.config.id2label.items()}
    calibration, test, labels = load_images(args, label2id, processor)
    expected = compute_logits(eager(model), test, "PyTorch")
    measured = "accuracy"
    if labels is None:
        print("The classes of the images are not the model's: measuring the agreement with its predictions instead")
        measured, labels = "agreement", expected.argmax(-1)

    lines = [f"{'':16}{'MB':>8}{'difference':>12}{measured:>11}"]
    lines[0] += "".join(f"{f'ms, batch {size}':>14}{'speed-up':>10}" for size in (1, BATCH_SIZE))
    print(lines[0])
    rows: list[dict[str, Any]] = []

    def add_row(name: str, program: Program, megabytes: float, tolerance: float = math.inf) -> None:
        """Checks and measures a program."""
        logits = compute_logits(program, test, name)
        difference = (logits - expected).abs().max().item()
        if not difference <= tolerance:  # also for NaN
            raise ValueError(f"its logits differ by {difference:.2g} from those of the model, more than {tolerance}")
        sizes = {size: test[:1].repeat(size, 1, 1, 1) for size in (1, BATCH_SIZE)}
        times = [paired_milliseconds([program, eager(model)], batch, args.seconds) for batch in sizes.values()]
        row: dict[str, Any] = {
            "format": name,
            "megabytes": megabytes,
            "largest_difference": difference,
            "accuracy": (logits.argmax(-1) == labels).float().mean().item(),
            "batches": list(sizes),
            "milliseconds": [time for time, _ in times],
            "times_as_fast": [baseline / time for time, baseline in times],
        }
        rows.append(row)
        lines.append(format_row(row))
        print(lines[-1], flush=True)

    for precision, variant in (("float32", model), ("bfloat16", copy.deepcopy(model).bfloat16())):
        add_row(f"torch {precision}", eager(variant), variant.get_memory_footprint() / 1e6)
    exported: list[str] = []
    failed: dict[str, str] = {}
    for name in args.formats or FORMATS:
        folder, note = args.output_dir / name, missing_packages(name)
        try:
            if not note:
                print(f"exporting {name} ...", end="\r", flush=True)
                shutil.rmtree(folder, ignore_errors=True)  # of an earlier export
                with quiet():
                    save_program(name, model, calibration, folder)
                    processor.save_pretrained(folder)
                    program = load_program(name, folder)
                megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
                add_row(name, program, megabytes, math.inf if name.endswith("int8") else TOLERANCE)
                if name == "openvino":
                    add_row("openvino bf16", load_program(name, folder, "bf16"), megabytes)
                exported.append(name)
        except Exception as error:  # of many types: what exporters and engines cannot do
            shutil.rmtree(folder, ignore_errors=True)
            note = failed[name] = f"not exported: {reason(error)}"
        if note:
            lines.append(f"{name:16}  {note}")
            print(lines[-1], flush=True)

    best = choose(rows)
    summary = (
        f"{len(test):,} test images, {torch.get_num_threads()} threads; speed-up over torch float32\n"
        f"Deploy {best['format']}: {best['times_as_fast'][-1]:.1f} times as fast as torch float32, {measured}"
        f" {best['accuracy']:.1%} ({rows[0]['accuracy']:.1%})"
    )
    print(summary)
    results = {"model": args.model, "data": str(args.data), "images": len(test), "threads": torch.get_num_threads()}
    results |= {"programs": rows, "not_exported": failed, "deploy": best["format"]}
    (args.output_dir / "export.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    if exported:
        guide = make_guide(exported, "\n".join([*lines, summary]))
        (args.output_dir / "README.md").write_text(guide, encoding="utf-8")
    if failed:
        raise CommandError("; ".join(f"{name} was {note}" for name, note in failed.items()))


if __name__ == "__main__":
    run(main)
