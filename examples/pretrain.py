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
"""Trains a CrossViT from scratch with the paper's recipe.

    torchrun --nproc_per_node 8 examples/pretrain.py --variant crossvit_15 --data imagenet --bf16
    python examples/pretrain.py --variant crossvit_15 --plan --bf16      # the days it takes on machines like this one

The recipe is the file paper_recipe.json beside this script; --recipe selects another. Each of its values is also an
option of the command, as are those of Transformers' TrainingArguments. The same command resumes an interrupted run.
"""

import io
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from common.command_line import load_config, make_parser, parse, run_command
from common.errors import CommandError
from common.labelled_images import DataArguments, LabelledImages
from common.workflow import TRAINING_DEFAULTS, make_trainer, prepare_images, save_and_evaluate, train, transformed
from tqdm import tqdm
from transformers import TrainingArguments

from crossvit import CrossViTConfig, CrossViTForImageClassification, CrossViTImageProcessor
from crossvit.timm_checkpoints import ARCHITECTURES
from crossvit.training.augmentation import AugmentationArguments, Collator, TrainingTransform
from crossvit.training.learning_rates import cosine_by_epoch


VARIANTS = Path(__file__).parents[1] / "conversion" / "variants.json"
IMAGENET_IMAGES = 1_281_167  # to train with
PLAN_STEPS = 6  # to measure, of which the first does not count
PLAN_BATCH_ON_CPU = 8  # as fast per image as more at once
PLAN_IMAGES = 256  # to read
DEFAULTS = {
    "output_dir": "outputs/pretrain",
    "per_device_eval_batch_size": 128,
    "lr_scheduler_type": "cosine",
    "load_best_model_at_end": False,  # the best checkpoint is kept beside the last weights, as by the authors' script
}


@dataclass
class PretrainArguments:
    """Which model to train by which recipe."""

    variant: str | None = field(default=None, metadata={"help": "One of the published models, such as crossvit_15."})
    config: str | None = field(
        default=None, metadata={"help": "Config to train, instead of --variant (folder, file or Hub ID)."}
    )
    recipe: str = field(
        default=str(Path(__file__).parent / "paper_recipe.json"),
        metadata={"help": "JSON file with values of these options."},
    )
    plan: bool = field(
        default=False,
        metadata={"help": "Benchmark this device, estimate the training time on 1, 8 and 32 of them, and exit."},
    )
    total_batch_size: int = field(default=4096, metadata={"help": "Global batch size."})
    learning_rate_batch_size: int = field(
        default=4096,
        metadata={"help": "Reference batch size of --learning_rate, which scales linearly with --total_batch_size."},
    )
    warmup_learning_rate: float = field(default=0.0, metadata={"help": "Learning rate at the start of the warmup."})
    min_learning_rate: float = field(default=0.0, metadata={"help": "Learning rate at the end of the cosine."})
    drop_path_rate: float = field(default=0.0, metadata={"help": "Stochastic depth."})


def read_recipe(path: str, known: set[str]) -> dict[str, Any]:
    try:
        recipe = dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise CommandError(f"--recipe {path}: not a JSON file of options and their values ({error})") from error
    if unknown := sorted(set(recipe) - known):
        raise CommandError(f"--recipe {path}: this command has no options {', '.join(unknown)}")
    return recipe


def load_model_config(args: PretrainArguments) -> tuple[CrossViTConfig, CrossViTImageProcessor]:
    """The configuration to train and its image processor."""
    if (args.variant is None) == (args.config is None):
        raise CommandError("give --variant, one of the published models, or --config, one of your own")
    if args.config:
        return load_config(args.config, drop_path_rate=args.drop_path_rate)
    variants = {variant["name"]: variant for variant in json.loads(VARIANTS.read_text(encoding="utf-8"))}
    if args.variant not in variants:
        raise CommandError(f"--variant {args.variant}: not one of {', '.join(variants)}")
    variant = variants[args.variant]
    preprocessing = variant["preprocessing"]
    side = preprocessing["center_crop"]
    processor = CrossViTImageProcessor(
        size={"shortest_edge": preprocessing["resize_shortest_edge"]}, crop_size={"height": side, "width": side}
    )
    return CrossViTConfig(**ARCHITECTURES[variant["architecture"]], drop_path_rate=args.drop_path_rate), processor


def set_batch_and_learning_rate(recipe: PretrainArguments, args: TrainingArguments) -> None:
    """Accumulates gradients up to the recipe's batch, and scales the learning rate with it."""
    at_once = args.train_batch_size * args.world_size
    if recipe.total_batch_size % at_once:
        raise CommandError(
            f"--total_batch_size {recipe.total_batch_size}: not a multiple of the {at_once} images at once"
            f" ({args.world_size} processes of --per_device_train_batch_size {args.train_batch_size})"
        )
    args.gradient_accumulation_steps = recipe.total_batch_size // at_once
    args.learning_rate *= recipe.total_batch_size / recipe.learning_rate_batch_size


def learning_rate_schedule(recipe: PretrainArguments, args: TrainingArguments) -> Callable[..., float] | None:
    """The cosine of the authors' script; `None` for the other schedules of Transformers."""
    if args.lr_scheduler_type != "cosine":
        return None
    return partial(
        cosine_by_epoch,
        num_epochs=args.num_train_epochs,
        warmup_lr_rate=recipe.warmup_learning_rate / args.learning_rate,
        min_lr_rate=recipe.min_learning_rate / args.learning_rate,
    )


def measure_training(config: CrossViTConfig, batch: int, args: TrainingArguments) -> float:
    """The images per second that this device trains on, if they are there already."""
    model: Any = CrossViTForImageClassification(config).train()
    model.to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.randn(batch, config.num_channels, *config.image_sizes[0], device=args.device)
    labels = torch.randint(config.num_labels, (batch,), device=args.device)
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    seconds = []
    for _ in tqdm(range(PLAN_STEPS), "steps to measure", leave=False, disable=args.disable_tqdm):
        start = time.perf_counter()
        with torch.autocast(args.device.type, dtype=dtype, enabled=args.fp16 or args.bf16):
            loss = model(images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return batch / statistics.median(seconds[1:])


def generate_photos() -> LabelledImages:
    """Images in memory that take about as long to decode as ImageNet's: JPEG, 500x400 pixels, 100 kB."""
    generator, files = np.random.default_rng(0), []
    for _ in range(PLAN_IMAGES):
        pixels = generator.integers(0, 256, (100, 125, 3), dtype=np.uint8)
        file = io.BytesIO()
        PIL.Image.fromarray(pixels).resize((500, 400), PIL.Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append({"bytes": file.getvalue(), "path": None})
    labels = datasets.ClassLabel(names=["photo"])
    features = datasets.Features({"image": datasets.Image(decode=False), "labels": labels})
    photos = datasets.Dataset.from_dict({"image": files, "labels": [0] * len(files)}, features)
    return LabelledImages({"train": photos}, ["photo"], multi_label=False, image_columns=["image"])


def measure_reading(
    images: LabelledImages, processor: Any, augmentation: AugmentationArguments, args: TrainingArguments
) -> float:
    """The images per second that one core reads and augments, as the workers of the data loader do."""
    torch.set_num_threads(1)
    train = images.splits["train"]
    if not images.is_stream:  # some of each class
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed))
        train = train.select(chosen[:PLAN_IMAGES].tolist())
    mixup = None if images.multi_label else augmentation.mixup(len(images.class_names))
    loader = torch.utils.data.DataLoader(
        transformed(train, TrainingTransform(augmentation, processor, images.image_columns)),
        batch_size=min(args.per_device_train_batch_size, PLAN_IMAGES),
        collate_fn=Collator(len(images.class_names), images.multi_label, mixup),
    )
    read, start = 0, time.perf_counter()
    for batch in tqdm(loader, "batches to measure", leave=False, disable=args.disable_tqdm):
        read += len(batch["labels"])
        if read >= PLAN_IMAGES:
            break
    return read / (time.perf_counter() - start)


def print_plan(
    config: CrossViTConfig,
    processor: Any,
    recipe: PretrainArguments,
    data: DataArguments,
    augmentation: AugmentationArguments,
    args: TrainingArguments,
) -> None:
    """Measures this machine, and prints how long the recipe takes on more of them."""
    source, images = "generated 500x400 JPEGs", generate_photos()
    if data.data:
        source, images = data.data, LabelledImages.load(data).for_training(data.validation_fraction, args.seed)
    batch = args.per_device_train_batch_size
    measured = min(batch, PLAN_BATCH_ON_CPU) if args.device.type == "cpu" else batch
    rate = measure_training(config, measured, args)
    reading = measure_reading(images, processor, augmentation, args)
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU"
    print(f"{name}: {rate:,.1f} images/s per device (batch size {measured}, synthetic data)")
    cores = math.ceil(rate / reading)
    print(f"Data loading: {reading:,.1f} images/s per CPU core ({source}); cores needed per device: {cores}")
    print(f"{args.num_train_epochs:g} epochs of ImageNet, {recipe.total_batch_size} images per step:")
    print(f"{'devices':>8} {'per device':>11} {'accumulated':>12} {'learning rate':>14} {'steps':>8} {'days':>8}")
    for devices in (1, 8, 32):
        accumulated = max(recipe.total_batch_size // (batch * devices), 1)
        total = batch * devices * accumulated
        learning_rate = args.learning_rate * total / recipe.learning_rate_batch_size
        steps = args.num_train_epochs * (IMAGENET_IMAGES // total)
        days = steps * total / (rate * devices) / 86_400
        print(f"{devices:8} {batch:11} {accumulated:12} {learning_rate:14.2g} {steps:8,.0f} {days:8,.1f}")
    print("The estimate assumes linear scaling and no data-loading bottleneck.")


def main() -> None:
    groups: Any = [PretrainArguments, DataArguments, AugmentationArguments, TrainingArguments]
    parser = make_parser(groups, __doc__, TRAINING_DEFAULTS | DEFAULTS)
    path = parser.parse_known_args()[0].recipe
    parser.set_defaults(**read_recipe(path, {action.dest for action in parser._actions} - {"help"}))
    recipe, data, augmentation, args = parse(parser)

    config, processor = load_model_config(recipe)
    if recipe.plan:
        return print_plan(config, processor, recipe, data, augmentation, args)
    set_batch_and_learning_rate(recipe, args)
    images = prepare_images(data, args)
    if images.multi_label:
        raise CommandError(f"{data.data}: the recipe mixes images with one label each, these have several")
    if not data.streaming and len(images.splits["train"]) < recipe.total_batch_size:
        raise CommandError(
            f"--total_batch_size {recipe.total_batch_size}: there are only {len(images.splits['train'])} images to"
            " train with; choose a smaller one, and --per_device_train_batch_size if necessary"
        )
    config.id2label = dict(enumerate(images.class_names))
    config.label2id = {name: index for index, name in config.id2label.items()}
    config.problem_type = "single_label_classification"  # even where the labels are probabilities
    model = CrossViTForImageClassification(config)
    schedule = learning_rate_schedule(recipe, args)
    trainer = make_trainer(
        model, processor, images, data, augmentation, args, drop_incomplete_step=True, learning_rate_schedule=schedule
    )
    train(trainer, images)
    save_and_evaluate(trainer, images, data)


if __name__ == "__main__":
    run_command(main)
