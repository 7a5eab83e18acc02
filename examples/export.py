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
"""Exports a CrossViT for inference on CPUs without its Python code, and measures the exported models.

    python examples/export.py --data photos                                 # published weights
    python examples/export.py --data photos --model outputs/photos --formats onnx openvino openvino-int8

Images come from a folder or the Hub and are split as in finetune.py: training images calibrate int8,
held-out images measure accuracy. In float32, the logits of the exported models must match the model's. The README.md
beside them says how to run each one; that of the format torch needs `import crossvit` where it is loaded. Needs
transformers 5.23 or later.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.command_line import DEFAULT_MODEL, load_checkpoint, run_command
from common.errors import CommandError, one_line


if TYPE_CHECKING:
    import torch

    Program = Callable[[torch.Tensor], torch.Tensor]  # pixel values -> logits


FORMATS = ("torch", "onnx", "onnx-int8", "openvino", "openvino-int8")
TOLERANCE = 1e-4  # between the logits of a float32 program and those of the model
BATCH_SIZES = (1, 8)  # to measure speed with


def load_images(args: argparse.Namespace, config: Any, processor: Any) -> tuple[Any, Any, Any]:
    """
    Pixel values to calibrate with, others to measure with, and their labels, which are `None` if the classes of the
    images are not those of the model.
    """
    import torch
    from common.data_sources import ImageSource
    from common.labelled_images import LabelledImages
    from common.workflow import transformed
    from tqdm import tqdm

    from crossvit.training.augmentation import EvaluationTransform

    loaded = LabelledImages.load(ImageSource(args.data, image_columns=args.image_columns))
    # With the default seed of finetune.py: a model that it trained on the same folder has not seen the held-out images
    splits = loaded.for_training(args.validation_fraction, seed=42).splits

    def load(split: str, count: int) -> tuple[torch.Tensor, list[int]]:
        images = splits[split].shuffle(seed=0).select(range(min(count, len(splits[split]))))
        rows = transformed(images, EvaluationTransform(processor, loaded.image_columns))
        pixel_values = [row["pixel_values"] for row in tqdm(rows, f"{split} images", leave=False)]
        return torch.stack(pixel_values), images["labels"]

    calibration, _ = load("train", args.calibration_images)
    test, indices = load("validation", args.test_images)
    classes, labels = list(config.id2label.values()), None
    if set(loaded.class_names) <= set(classes) and not loaded.multi_label:
        labels = torch.tensor([classes.index(loaded.class_names[index]) for index in indices])
    return calibration, test, labels


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
    """Exports a model with Transformers' exporter for a format."""
    import torch
    from transformers import exporters

    configs = {"torch": "DynamoConfig", "onnx": "OnnxConfig", "openvino": "OpenVINOConfig"}
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1)}}
    config = getattr(exporters, configs[name.removesuffix("-int8")])(dynamic=True, dynamic_shapes=shapes)
    samples = [{"pixel_values": image[None]} for image in calibration]
    if name == "onnx-int8":
        from onnxruntime.quantization import QuantType

        # Products of two activations stay in float32: int8 costs accuracy there and saves no time
        static = exporters.OnnxRuntimeStaticConfig(
            per_channel=True,
            activation_type=QuantType.QUInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            extra_options={"MatMulConstBOnly": True},
        )
        config.quantizer = exporters.OnnxRuntimeQuantizer(static, samples)
    if name == "openvino-int8":
        nncf = exporters.NNCFQuantizationConfig(subset_size=len(samples))  # by default at most 300
        config.quantizer = exporters.NNCFOpenVINOQuantizer(nncf, samples)
    batch: dict[str, Any] = {"pixel_values": calibration[:1].repeat_interleave(2, dim=0)}
    exporters.AutoHfExporter.from_config(config).export(model, batch, config).save_pretrained(folder)


def load_program(name: str, folder: Path, precision: str = "f32") -> Program:
    """Loads what `save_program` wrote; `precision` is that of OpenVINO."""
    import torch
    from transformers.exporters import ExportedModel

    options: dict[str, Any] = {}
    match name.removesuffix("-int8"):
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
    return lambda batch: program(pixel_values=batch).logits


def eager(model: Any) -> Program:
    """A model as a program."""
    import torch

    return torch.inference_mode()(lambda batch: model(batch.to(model.dtype)).logits.float())


def compute_logits(program: Program, pixel_values: torch.Tensor, description: str) -> torch.Tensor:
    """The logits of images in batches of different sizes, all of which a program must take."""
    import torch
    from tqdm import tqdm

    batches = [pixel_values[:1], *pixel_values[1:].split(BATCH_SIZES[-1])]
    return torch.cat([program(batch).clone() for batch in tqdm(batches, description, leave=False)])


def milliseconds(program: Program, batch: torch.Tensor, seconds: float) -> float:
    """The median time of a program, measured for so many seconds."""
    import torch
    from torch.utils.benchmark import Timer

    timer = Timer("program(batch)", globals=locals(), num_threads=torch.get_num_threads())
    return 1000 * timer.blocked_autorange(min_run_time=seconds).median


GUIDE = """\
# An exported CrossViT

```
{table}
```

Every exported model takes images as the image processor makes them, and returns logits. In the folder of this file:

```python
from PIL import Image
import crossvit  # for the image processor, and for what the model of torch returns
from transformers import AutoConfig, AutoImageProcessor

processor = AutoImageProcessor.from_pretrained("{folder}")
id2label = AutoConfig.from_pretrained("{folder}").id2label
pixel_values = processor({images}, return_tensors="pt")["pixel_values"]
```
"""
SECTION = """
## {name}

```python
{usage}print(id2label[logits[0].argmax().item()])
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
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="folder of images, or dataset on the Hub, as for finetune.py")
    add("--image_columns", nargs="+", help="one for all branches or one for each; default: the only one")
    add("--model", default=DEFAULT_MODEL, help="folder or Hub ID; default: %(default)s")
    add("--output_dir", type=Path, default=Path("outputs/export"), help="new or empty; default: %(default)s")
    add("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="default: all")
    add("--validation_fraction", type=float, default=0.1, help="of data without such a split; default: %(default)s")
    add("--calibration_images", type=int, default=300, help="at most; default: %(default)s")
    add("--test_images", type=int, default=1000, help="at most; default: %(default)s")
    add("--seconds", type=float, default=2, help="of each measurement of speed; default: %(default)s")
    args = parser.parse_args()
    if args.output_dir.is_dir() and any(args.output_dir.iterdir()):
        parser.error(f"--output_dir {args.output_dir}: not empty; name a new folder")

    # After the options, as these imports take seconds
    import torch

    model, processor = load_checkpoint(args.model, dtype=torch.float32)
    calibration, test, labels = load_images(args, model.config, processor)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    expected = compute_logits(eager(model), test, "PyTorch")
    measured = "accuracy"
    if labels is None:
        print("The classes of the images are not the model's: measuring the agreement with its predictions instead")
        measured, labels = "agreement", expected.argmax(-1)

    rows: list[dict[str, Any]] = []
    lines: list[str] = []  # of the table
    failed: dict[str, str] = {}

    def add_line(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    def add_row(name: str, program: Program, megabytes: float, tolerance: float = math.inf) -> None:
        """Checks and measures a program."""
        logits = compute_logits(program, test, name)
        difference = (logits - expected).abs().max().item()
        if not difference <= tolerance:  # also for NaN
            raise ValueError(f"its logits differ by {difference:.2g} from those of the model, more than {tolerance}")
        accuracy = (logits.argmax(-1) == labels).float().mean().item()
        times = [milliseconds(program, test[:1].repeat_interleave(size, dim=0), args.seconds) for size in BATCH_SIZES]
        row = {"format": name, "megabytes": megabytes, "largest_difference": difference, measured: accuracy}
        rows.append(row | {"milliseconds": dict(zip(BATCH_SIZES, times))})
        columns = "".join(f"{time:14.2f}" for time in times)
        add_line(f"{name:16}{megabytes:8.1f}{difference:12.1g}{accuracy:11.1%}{columns}")

    batches = "".join(f"{f'ms, batch {size}':>14}" for size in BATCH_SIZES)
    add_line(f"{'':16}{'MB':>8}{'difference':>12}{measured:>11}{batches}")
    add_row("torch float32", eager(model), model.get_memory_footprint() / 1e6)
    variant = copy.deepcopy(model).bfloat16()
    add_row("torch bfloat16", eager(variant), variant.get_memory_footprint() / 1e6)
    for name in args.formats:
        folder = args.output_dir / name
        print(f"exporting {name} ...", end="\r", flush=True)
        try:
            with quiet():
                save_program(name, model, calibration, folder)
                processor.save_pretrained(folder)
                program = load_program(name, folder)
            megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
            add_row(name, program, megabytes, math.inf if name.endswith("int8") else TOLERANCE)
            if name == "openvino":
                add_row("openvino bf16", load_program(name, folder, "bf16"), megabytes)
        except Exception as error:  # of many types: missing packages, and what exporters and engines cannot do
            shutil.rmtree(folder, ignore_errors=True)
            failed[name] = one_line(error)
            add_line(f"{name:16}  not exported: {failed[name]}")

    add_line(f"{len(test):,} test images, {torch.get_num_threads()} threads")
    results = {"model": args.model, "data": args.data, "images": len(test), "threads": torch.get_num_threads()}
    results |= {"programs": rows, "not_exported": failed}
    (args.output_dir / "export.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    if exported := [name for name in args.formats if name not in failed]:
        images = ", ".join(f'Image.open("{name}.png").convert("RGB")' for name in args.image_columns or ["image"])
        images = f"[({images})]" if test.ndim == 5 else images
        guide = GUIDE.format(table="\n".join(lines), folder=exported[0], images=images)
        for name in exported:
            guide += SECTION.format(name=name, usage=USAGE[name.removesuffix("-int8")].format(folder=name))
        (args.output_dir / "README.md").write_text(guide, encoding="utf-8")
    if failed:
        raise CommandError("; ".join(f"{name} was not exported: {text}" for name, text in failed.items()))


if __name__ == "__main__":
    run_command(main)
