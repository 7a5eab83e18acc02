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
"""Trains a small CrossViT on real handwritten digits, saves it, loads it back, classifies and draws what it looks at.

    python examples/quickstart.py

Nothing is downloaded: the digits ship with scikit-learn. With images or a CrossViT of your own:

    python examples/quickstart.py --image digit.png                             # trains, then classifies that image
    python examples/quickstart.py --image digit.png --model outputs/quickstart  # with what was trained before
    python examples/quickstart.py --image photo.jpg --model my-crossvit         # a folder or a model of the Hub
"""

import signal
import sys


if __name__ == "__main__":  # Ahead of the imports that take seconds, so that Ctrl-C ends these cleanly too
    signal.signal(signal.SIGINT, lambda *_: sys.exit("\nInterrupted."))

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from command_line import load_checkpoint
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset
from torchvision.transforms import v2
from transformers import (
    EvalPrediction,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)
from transformers.utils import logging

from crossvit import CrossViTConfig, CrossViTForImageClassification, CrossViTImageProcessor
from crossvit.interpretability.attention_maps import AttentionMaps
from crossvit.interpretability.plotting import Picture, Scores, display_size, draw_rows, overlay, save_figure
from crossvit.training.errors import CommandError


LABELS = [str(digit) for digit in range(10)]
SIDE = 48  # pixels that the model sees; the digits themselves have 8x8
MIN_SIDE = 8  # of an image to classify: with fewer pixels there is nothing to see
MAX_ROWS = 8  # of the picture


class Digits(Dataset):
    """Images and their labels; for training, shifted by up to 2 of 48 pixels at random."""

    def __init__(self, images: list[PIL.Image.Image], labels: list[int], augment: bool):
        self.images, self.labels = images, labels
        shift = v2.Compose([v2.Resize(SIDE, v2.InterpolationMode.BICUBIC), v2.RandomCrop(SIDE, padding=2)])
        self.transform = shift if augment else v2.Identity()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.transform(self.images[index]), "label": self.labels[index]}


def load_datasets() -> tuple[Digits, Digits]:
    """The digits to train with, and the fifth of them that is held out, always the same."""
    digits = load_digits()
    images = [PIL.Image.fromarray((ink * 255 / 16).astype(np.uint8)) for ink in digits.images]
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, digits.target.tolist(), test_size=0.2, stratify=digits.target, random_state=0
    )
    return Digits(train_images, train_labels, augment=True), Digits(test_images, test_labels, augment=False)


def train(output: Path, seed: int) -> None:
    """Trains a small model from scratch; leaves it, its image processor and its metrics in `output`."""
    set_seed(seed)
    processor = CrossViTImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5, 0.5, 0.5],  # Those of ImageNet, the default, suit photos
        image_std=[0.5, 0.5, 0.5],
    )
    config = CrossViTConfig(
        image_size=(SIDE, 40),
        patch_size=(6, 8),
        embed_dim=(64, 64),
        num_heads=(4, 4),
        depth=((1, 2, 0),),
        initializer_range=0.15,  # So narrow layers hardly begin to learn from the usual 0.02
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    model = CrossViTForImageClassification(config)
    train_dataset, test_dataset = load_datasets()

    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.argmax(prediction.predictions, axis=-1) == prediction.label_ids))}

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixel_values = processor([example["image"] for example in examples], return_tensors="pt").pixel_values
        return {"pixel_values": pixel_values, "labels": torch.tensor([example["label"] for example in examples])}

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            num_train_epochs=18,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            learning_rate=7e-4,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            weight_decay=0.05,
            remove_unused_columns=False,  # The collator needs the images
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            seed=seed,
        ),
        data_collator=collate,
        train_dataset=train_dataset,
        eval_dataset=test_dataset,
        compute_metrics=accuracy,
    )
    print(f"Training {model.num_parameters():,} weights on {len(train_dataset)} handwritten digits ...", flush=True)
    metrics = trainer.train().metrics | trainer.evaluate()
    print(
        f"Trained in {metrics['train_runtime']:.0f} seconds. Accuracy on {len(test_dataset)} held-out digits:"
        f" {metrics['eval_accuracy']:.1%}"
    )

    # Written elsewhere first and the weights put in place last, so that what looks complete is
    for outdated in ("model.safetensors", "predictions.json", "quickstart.png"):
        (output / outdated).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".") as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (Path(folder) / "metrics.json").write_text(json.dumps(metrics, indent=2))
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.suffix == ".safetensors"):
            file.replace(output / file.name)
    print(f"Saved the model and its image processor in {output}", flush=True)


def fail(message: str) -> NoReturn:
    sys.exit(f"{Path(__file__).name}: error: {message}")


def open_image(path: str) -> PIL.Image.Image:
    """Reads an image file, upright and in RGB."""
    try:
        image = PIL.ImageOps.exif_transpose(PIL.Image.open(path)).convert("RGB")
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:  # PIL raises all of them
        fail(f"--image {path}: {getattr(error, 'strerror', None) or error}")
    if min(image.size) < MIN_SIDE:
        fail(f"--image {path}: {image.width}x{image.height} pixels are too few, it takes {MIN_SIDE}x{MIN_SIDE}")
    return image


def load(name: str) -> tuple[Any, Any, Any]:
    """The pipeline of a saved CrossViT, its image processor and its model, which returns attention maps."""
    try:
        model, processor = load_checkpoint(name)
    except CommandError as error:
        fail(f"--model {error}")
    model.set_attn_implementation("eager")
    return pipeline("image-classification", model=model, image_processor=processor), processor, model


def classify(model_name: str, paths: list[str], output: Path) -> None:
    """Classifies and draws the images, or else the held-out digits."""
    samples: list[dict[str, Any]] = [{"image": open_image(path), "title": Path(path).name} for path in paths]
    classifier, processor, model = load(model_name)
    if not samples:
        if list(model.config.id2label.values()) != LABELS:
            fail(f"--model {model_name}: its labels are not the digits, so give an image with --image")
        digits = load_datasets()[1]
        for image, label in zip(digits.images, digits.labels):
            samples.append({"image": image, "title": f"is {label}", "label": LABELS[label]})

    predictions = classifier([sample["image"] for sample in samples], top_k=3, batch_size=8)
    for sample, prediction in zip(samples, predictions):
        sample["prediction"] = prediction
        sample["right"] = sample.get("label") in (None, prediction[0]["label"])
    if paths:
        for path, prediction in zip(paths, predictions):
            print(path, *(f"{top['label']} {top['score']:.1%}" for top in prediction), sep="  ")
    else:
        right = sum(sample["right"] for sample in samples)
        print(f"Loaded {model_name} in a new process: {right} of {len(samples)} held-out digits are right")
        mistakes = [sample for sample in samples if not sample["right"]][:2]  # There is most to see in them
        samples = mistakes + [sample for sample in samples if sample["right"]]

    rows: list[list[Picture | Scores | None]] = []
    for sample in samples[:MAX_ROWS]:
        image = sample["image"]
        maps = AttentionMaps(model, processor, image)
        titles = ("", "") if rows else ("image", "prediction")
        row: list[Picture | Scores | None] = [Picture(image, titles[0], label=sample["title"][-20:])]
        row += [Scores(sample["prediction"], titles[1], sample["right"]), None]
        for branch, grid_size in enumerate(maps.grid_sizes):
            stages = [stage for stage, depths in enumerate(model.config.depth) if depths[branch] > 0]
            if stages:  # The last in which the branch has layers
                attention = maps.self_attention(branch, stages[-1])
                values = attention.on_image(smooth=True, image_size=display_size(image))
                title = "" if rows else "branch {}\n{}x{} patches".format(branch, *grid_size)
                row.append(Picture(overlay(image, values), title))
        rows.append(row)
    figure = draw_rows(rows, heat="attention of the class token (1: the most in this image)")
    (output / "predictions.json").write_text(json.dumps(predictions, indent=2))
    save_figure(figure, output / "quickstart.png")
    print(f"Drew {len(rows)} of them and what the model looks at in {output / 'quickstart.png'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="classify these instead of the digits")
    parser.add_argument("--model", help="folder or Hub id of a CrossViT to use instead of training one")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # So small a model gains little from more, and waits for them on a busy machine
    logging.disable_progress_bar()  # Those of loading and saving; the one of training stays
    for path in args.image:
        open_image(path)  # A typo should not cost a training
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output {args.output}: {error.strerror}")

    if args.model is not None:
        return classify(args.model, args.image, args.output)
    train(args.output, args.seed)
    # In a new process, as a user of the saved model would; Ctrl-C reaches this one alone, which then ends the other
    command = [sys.executable, __file__, "--model", str(args.output), "--output", str(args.output)]
    command += ["--image", *args.image] if args.image else []
    sys.exit(subprocess.run(command, start_new_session=True).returncode)


if __name__ == "__main__":
    main()
