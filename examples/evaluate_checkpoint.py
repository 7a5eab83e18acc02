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
"""Measures the accuracy of a CrossViT on labelled images: a folder, a saved data set or the Hub, streaming too.

    python examples/evaluate_checkpoint.py --model checkpoints/crossvit_15 --data imagenet/val --dtype bfloat16
    torchrun --nproc_per_node 8 examples/evaluate_checkpoint.py ...      # on several devices, with the same result

Images that cannot be read are named, counted and left out of the accuracy.
"""

import signal


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the seconds of imports without a trace

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, gather_object
from command_line import load_checkpoint, make_parser, parse, run
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from tqdm import tqdm

from crossvit.training.errors import CommandError, ImageDatasetError
from crossvit.training.image_datasets import ImageSource, LabelledImages, match_classes
from crossvit.training.image_files import check_labels, name_of, read_image
from crossvit.training.metrics import SingleLabelMetric
from crossvit.training.sampling import ImageDataset, ImageStream


VARIANTS = Path(__file__).parents[1] / "conversion" / "variants.json"


@dataclass
class EvaluationArguments:
    """Which model to measure, and how."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of a CrossViT."})
    split: str | None = field(default=None, metadata={"help": "Default: validation, else test, else the only one."})
    batch_size: int = field(default=64, metadata={"help": "Images at once."})
    dtype: str = field(
        default="float32", metadata={"help": "Of the model.", "choices": ["float32", "bfloat16", "float16"]}
    )
    num_workers: int = field(default=0, metadata={"help": "Processes that read images."})
    by_order: bool = field(
        default=False, metadata={"help": "Classes of the data have other names than the model's, in the same order."}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})
    cpu: bool = field(default=False, metadata={"help": "Leave a GPU unused."})


def published_figures(name: str) -> dict[str, Any] | None:
    """What was published of a converted checkpoint; others, fine-tuned ones too, lack the record of the conversion."""
    record = Path(name) / "conversion.json"
    try:
        if not Path(name).is_dir():
            record = Path(hf_hub_download(name, record.name))
        variant = json.loads(record.read_text(encoding="utf-8"))["variant"]
    except (EntryNotFoundError, LocalEntryNotFoundError, FileNotFoundError):
        return None
    variants = {variant["name"]: variant for variant in json.loads(VARIANTS.read_text(encoding="utf-8"))}
    return variants.get(variant)


class Collator:
    """Makes a batch; an image that cannot be read becomes a black one without a label, and is named."""

    def __init__(self, processor: Any, classes: list[int]):
        self.processor, self.classes = processor, classes

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        images, labels, unreadable = [], [], []
        for row in rows:
            name = name_of(row, f"row {row['index']}")
            check_labels(row["labels"], len(self.classes), name)
            try:
                images.append(read_image(row["image"] and {**row["image"], "path": name}))
                labels.append(self.classes[row["labels"]])
            except ImageDatasetError as error:
                images.append(PIL.Image.new("RGB", (64, 64)))
                labels.append(-100)
                unreadable.append((row["index"], str(error)))
        return {
            "pixel_values": self.processor(images, return_tensors="pt")["pixel_values"],
            "labels": torch.tensor(labels),
            "index": torch.tensor([row["index"] for row in rows]),
            "unreadable": unreadable,
        }


@torch.no_grad()
def evaluate(model: Any, loader: Any, accelerator: Accelerator) -> tuple[dict[str, float], list[str], int]:
    """The metrics, the unreadable images, and the number of all images."""
    metric = SingleLabelMetric()
    unreadable: dict[int, str] = {}
    seen: set[int] = set()
    for batch in tqdm(loader, desc="Evaluating", unit="batch", disable=not accelerator.is_main_process):
        pixel_values = batch["pixel_values"].to(accelerator.device, model.dtype)
        ranking = metric.rank(model(pixel_values).logits)
        index, ranking, labels = accelerator.gather(
            (batch["index"].to(accelerator.device), ranking, batch["labels"].to(accelerator.device))
        )
        unreadable |= dict(gather_object(batch["unreadable"]))
        # Processes are given the same number of images: the last batch is filled up with some that were there before
        rows = []
        for row, number in enumerate(index.tolist()):
            if number not in seen:
                seen.add(number)
                rows.append(row)
        metric.add_batch(predictions=ranking[rows].cpu(), references=labels[rows].cpu())
    if len(unreadable) == len(seen):
        raise CommandError(f"none of {len(seen)} images can be read: {next(iter(unreadable.values()), 'no images')}")
    return metric.compute(), [unreadable[number] for number in sorted(unreadable)], len(seen)


def main() -> None:
    parser = make_parser([EvaluationArguments, ImageSource], __doc__, {})
    args, data = parse(parser)
    if not args.model or not data.data:
        raise CommandError("give --model, a CrossViT, and --data, a folder of images or a data set of the Hub")
    if args.batch_size < 1 or args.num_workers < 0:
        raise CommandError(f"--batch_size {args.batch_size} --num_workers {args.num_workers}: of each, not so few")
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        if Path(args.output).is_dir():
            raise CommandError(f"--output {args.output}: a folder, not a file")
    # Each process reads its own part of a stream: tensors alone come through from one that reads for all
    accelerator = Accelerator(cpu=args.cpu, dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
    model, processor = load_checkpoint(args.model, dtype=getattr(torch, args.dtype))
    model.to(accelerator.device).eval()

    with accelerator.main_process_first():
        images = LabelledImages.load(data)
    if images.multi_label:
        raise CommandError(f"{data.data}: images with several labels each have no top-1 accuracy")
    split = args.split or next((name for name in ("validation", "test") if name in images.splits), None)
    if split is None and len(images.splits) == 1:
        split = next(iter(images.splits))
    if split not in images.splits:
        raise CommandError(f"{data.data}: which split? --split is one of {', '.join(images.splits)}")
    classes = match_classes(model.config, images.class_names, args.by_order)
    rows: Any = images.splits[split]
    rows = ImageStream(rows) if isinstance(rows, datasets.IterableDataset) else ImageDataset(rows)
    loader = torch.utils.data.DataLoader(
        rows, args.batch_size, num_workers=args.num_workers, collate_fn=Collator(processor, classes)
    )

    published = published_figures(args.model)
    start = time.perf_counter()
    metrics, unreadable, total = evaluate(model, accelerator.prepare(loader), accelerator)
    seconds = time.perf_counter() - start
    if not accelerator.is_main_process:
        return
    for message in unreadable:
        print(f"left out: {message}")
    results = {
        "model": args.model,
        "data": data.data,
        "split": split,
        "dtype": args.dtype,
        "images": total,
        "unreadable": unreadable,
        "top1": metrics["accuracy"],
        "top5": metrics["top5_accuracy"],
        "f1": metrics["f1"],
        "seconds": seconds,
        "published": published and {"top1": published["imagenet_top1"], "top5": published["imagenet_top5"]},
    }
    measured = f"{total - len(unreadable):,} images" + (f", {len(unreadable)} unreadable" if unreadable else "")
    print(f"{'':24}{'top-1':>8}{'top-5':>8}")
    print(f"{measured:24}{results['top1']:8.2%}{results['top5']:8.2%}")
    if published:
        for source in ("paper", "timm"):
            figures = [published[f"imagenet_{top}"].get(source) for top in ("top1", "top5")]
            row = "".join(f"{'-' if figure is None else f'{figure:.2f}%':>8}" for figure in figures)
            print(f"{f'ImageNet, {source}':24}{row}")
    if args.output:
        unfinished = Path(f"{args.output}.tmp")
        unfinished.write_text(json.dumps(results, indent=2), encoding="utf-8")
        os.replace(unfinished, args.output)


if __name__ == "__main__":
    run(main)
