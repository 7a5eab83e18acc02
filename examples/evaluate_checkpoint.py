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
"""Measures a CrossViT's accuracy on labelled images from a folder, a saved dataset or the Hub, optionally streamed.

python examples/evaluate_checkpoint.py --model timm/crossvit_15_240.in1k --data imagenet/val --dtype bfloat16
torchrun --nproc_per_node 8 examples/evaluate_checkpoint.py ...      # distributed, with the same result
"""

import json
import re
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from common.command_line import DTYPES, load_checkpoint, make_parser, parse, run_command
from common.data_sources import ImageSource
from common.errors import CommandError
from common.labelled_images import LabelledImages
from common.metrics import SingleLabelMetric
from common.streams import StreamTrainer
from common.workers import default_num_workers
from common.workflow import check_image_columns, transformed
from transformers import TrainingArguments
from transformers.utils import cached_file

from crossvit.training.augmentation import Collator, EvaluationTransform


VARIANTS = Path(__file__).parents[1] / "conversion" / "variants.json"


@dataclass
class EvaluationArguments:
    """Which model to measure, and how."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub ID of a CrossViT, timm's too."})
    split: str | None = field(default=None, metadata={"help": "Default: validation, else test, else the only one."})
    batch_size: int = field(default=64, metadata={"help": "Images per forward pass on each device."})
    dtype: str = field(default="float32", metadata={"help": "Data type of the model.", "choices": DTYPES})
    compile: bool = field(default=False, metadata={"help": "Compile the model first."})
    num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes per device that read images; default: with a GPU one per core, at most 8, else none."
        },
    )
    by_order: bool = field(default=False, metadata={"help": "Match the classes by index instead of by name."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})
    cpu: bool = field(default=False, metadata={"help": "Run on the CPU even if there is a GPU."})


class MatchedTransform(EvaluationTransform):
    """Rows for evaluation, with the model's class for each class of the data."""

    def __init__(self, processor: Any, image_columns: list[str], classes: list[int]):
        super().__init__(processor, image_columns)
        self.classes = classes

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return super().__call__({**rows, "labels": [self.classes[label] for label in rows["labels"]]})


def published_figures(model: str) -> dict[str, Any] | None:
    """What was published of timm's checkpoint or a converted one; only the latter has the record of a conversion."""
    variants = json.loads(VARIANTS.read_text(encoding="utf-8"))
    record = cached_file(
        model,
        "conversion.json",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    name = json.loads(Path(record).read_text(encoding="utf-8"))["variant"] if record else None
    return next((variant for variant in variants if model == variant["timm_id"] or name == variant["name"]), None)


def match_classes(config: Any, class_names: list[str], by_order: bool) -> list[int]:
    """For each class of the data, its index in the model: by its name, or by its place if the order is known."""
    of_model = [str(config.id2label[index]) for index in range(config.num_labels)]
    if set(class_names) <= set(of_model) and len(set(of_model)) == len(of_model):
        return [of_model.index(name) for name in class_names]
    if len(class_names) != len(of_model):
        raise CommandError(
            f"the model has {len(of_model)} classes ({of_model[0]!r}, ...), the data has {len(class_names)} others"
            f" ({class_names[0]!r}, ...)"
        )
    # The names of ImageNet's folders are in the order of its classes
    if by_order or (len(class_names) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in class_names)):
        print(f"Classes are matched by their order: {class_names[0]!r} is {of_model[0]!r}, and so on")
        return list(range(len(of_model)))
    unknown = next(name for name in class_names if name not in of_model)
    raise CommandError(
        f"the model has no class {unknown!r}; if the classes of the data have other names than the model's"
        f" ({of_model[0]!r}, ...) and the same order, say --by_order"
    )


def choose_split(images: LabelledImages, args: EvaluationArguments) -> str:
    names = ("validation", "test", *images.splits) if len(images.splits) == 1 else ("validation", "test")
    split = args.split or next((name for name in names if name in images.splits), None)
    if split not in images.splits:
        raise CommandError(f"which split? --split is one of {', '.join(images.splits)}")
    return split


def print_table(results: dict[str, Any], published: dict[str, Any] | None) -> None:
    rows = {f"{results['images']:,} images": (100 * results["top1"], results["top5"] and 100 * results["top5"])}
    for source in ("paper", "timm") if published else ():
        top1, top5 = (published[f"imagenet_{top}"].get(source) for top in ("top1", "top5"))
        rows[f"ImageNet, {source}"] = (top1, top5)
    print(f"{'':24}{'top-1':>8}{'top-5':>8}")
    for name, figures in rows.items():
        print(f"{name:24}" + "".join(f"{'-' if figure is None else f'{figure:.2f}%':>8}" for figure in figures))


def main() -> None:
    args, source = parse(make_parser([EvaluationArguments, ImageSource], __doc__, {}))
    if not args.model:
        raise CommandError("give --model, a CrossViT, and --data, a folder of images or a dataset of the Hub")
    training_args = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # the Trainer would create a folder, though it writes nothing
        per_device_eval_batch_size=args.batch_size,
        dataloader_num_workers=default_num_workers() if args.num_workers is None else args.num_workers,
        accelerator_config={"non_blocking": torch.accelerator.is_available()},  # warns without
        use_cpu=args.cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
    )
    model, processor = load_checkpoint(args.model, dtype=getattr(torch, args.dtype))
    with training_args.main_process_first():
        images = LabelledImages.load(source)
        check_image_columns(images.image_columns, model)
        if images.multi_label:
            raise CommandError(f"{source.data}: images with several labels each have no top-1 accuracy")
        split = choose_split(images, args)
        images = replace(images, splits={split: images.splits[split]})
        images.check_images()
    classes = match_classes(model.config, images.class_names, args.by_order)
    if args.compile:
        model.compile()
    metric = SingleLabelMetric()
    trainer = StreamTrainer(
        model,
        training_args,
        data_collator=Collator(model.config.num_labels),
        compute_metrics=metric.compute_metrics,
        preprocess_logits_for_metrics=metric.reduce_logits,
    )
    transform = MatchedTransform(processor, images.image_columns, classes)
    prediction = trainer.predict(transformed(images.splits[split], transform))
    if not trainer.is_world_process_zero():
        return
    published = published_figures(args.model)
    results = {
        "model": args.model,
        "data": source.data,
        "split": split,
        "dtype": args.dtype,
        "images": len(prediction.label_ids),
        "top1": prediction.metrics["test_accuracy"],
        "top5": prediction.metrics.get("test_top5_accuracy"),
        "f1": prediction.metrics["test_f1"],
        "seconds": prediction.metrics["test_runtime"],
        "published": published and {"top1": published["imagenet_top1"], "top5": published["imagenet_top5"]},
    }
    print_table(results, published)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
