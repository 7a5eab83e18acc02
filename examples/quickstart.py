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
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset
from torchvision.transforms import v2
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)
from transformers.utils import logging

from crossvit import CrossViTConfig, CrossViTForImageClassification, CrossViTImageProcessor


matplotlib.use("Agg")
from matplotlib import pyplot as plt


LABELS = [str(digit) for digit in range(10)]
SIDE = 48  # pixels that the model sees; the digits themselves have 8x8
MIN_SIDE = 8  # of an image to classify: with fewer pixels there is nothing to see
MAX_ROWS = 8  # of the picture
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#BBBBBB"  # different to color-blind eyes too


class Digits(Dataset):
    """Images and their labels; for training, shifted by up to 3 of 48 pixels at random."""

    def __init__(self, images: list[PIL.Image.Image], labels: list[int], augment: bool):
        self.images, self.labels = images, labels
        shift = v2.Compose([v2.Resize(SIDE, v2.InterpolationMode.BICUBIC), v2.RandomCrop(SIDE, padding=3)])
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


def train(output: Path, seed: int):
    """Trains a small model from scratch; leaves it, its image processor and its metrics in `output`."""
    set_seed(seed)
    torch.set_num_threads(1)  # So small a model gains little from more, and loses a lot on a busy machine
    processor = CrossViTImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
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
            num_train_epochs=24,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            learning_rate=1e-3,
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
    with tempfile.TemporaryDirectory(dir=output, prefix=".") as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (Path(folder) / "metrics.json").write_text(json.dumps(metrics, indent=2))
        (output / "model.safetensors").unlink(missing_ok=True)
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.suffix == ".safetensors"):
            os.replace(file, output / file.name)
    print(f"Saved the model and its image processor in {output}")


def open_image(path: str) -> PIL.Image.Image:
    """Reads an image file, upright and in RGB; exits with a message that names what is none."""
    try:
        image = PIL.ImageOps.exif_transpose(PIL.Image.open(path)).convert("RGB")
    except FileNotFoundError:
        sys.exit(f"There is no image {path!r}: check the path.")
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        sys.exit(f"{path!r} cannot be read as an image: {error}")
    if min(image.size) < MIN_SIDE:
        sys.exit(f"{path!r} has {image.width}x{image.height} pixels: give an image of {MIN_SIDE}x{MIN_SIDE} or more.")
    return image


def class_token_attention(model: Any, attentions: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    """Per branch, how the class token attends to the patches in the last layer: arrays (images, rows, columns)."""
    # `attentions` come in the order stage, branch, layer: the branch of each, and the last one of each branch
    branches = [
        branch for *depths, _ in model.config.depth for branch, depth in enumerate(depths) for _ in range(depth)
    ]
    last_layers = {branch: layer for layer, branch in enumerate(branches)}
    maps = []
    for branch, layer in sorted(last_layers.items()):
        embeddings = model.crossvit.embeddings[branch]
        to_patches = attentions[layer].mean(dim=1)[:, 0, 1:]  # the mean of the heads, from the class token
        maps.append(to_patches.unflatten(1, embeddings.get_grid_size(embeddings.image_size)).numpy())
    return maps


def draw(images: torch.Tensor, titles: list[str], predictions: list[list[dict]], maps: list[np.ndarray], path: Path):
    """A row per image: what the model sees, its best labels, and where the class token of each branch looks."""
    columns = 2 + len(maps)
    figure, axes = plt.subplots(
        len(images), columns, figsize=(2.6 * columns, 2.35 * len(images) + 0.9), squeeze=False, layout="constrained"
    )
    for row, image in zip(axes, images.permute(0, 2, 3, 1).numpy().clip(0, 1)):
        for axis in (row[0], *row[2:]):
            axis.imshow(image, extent=(0, 1, 1, 0))
            axis.set_axis_off()
    heat = None
    for row, title, labels, *attention in zip(axes, titles, predictions, *maps):
        row[0].set_title(title, fontsize=10)
        scores = [label["score"] for label in labels]
        wrong = title.startswith("is ") and title != f"is {labels[0]['label']}"
        row[1].barh(
            range(len(labels)), scores, color=[ORANGE if wrong else BLUE] + [GREY] * (len(labels) - 1), height=0.3
        )
        for position, label in enumerate(labels):
            text = f"{label['label'].split(',')[0][:24]}  {label['score']:.1%}"
            row[1].text(0, position - 0.2, text, va="bottom", fontsize=10)
        row[1].set(xlim=(0, 1), ylim=(len(labels) - 0.7, -0.7), xticks=[0, 0.5, 1], yticks=[])
        row[1].spines[["top", "right", "left"]].set_visible(False)
        for axis, weights in zip(row[2:], attention):
            heat = axis.imshow(
                weights / weights.max(),
                extent=(0, 1, 1, 0),
                cmap="inferno",
                alpha=0.65,
                interpolation="bicubic",
                vmin=0,
                vmax=1,
            )
    headers = ["image", "probability", *(f"branch {branch} looks at" for branch in range(len(maps)))]
    for axis, header in zip(axes[0], headers):
        axis.annotate(header, (0.5, 1.0), (0, 22), "axes fraction", "offset points", ha="center", weight="bold")
    if heat is not None:
        bar = figure.colorbar(heat, ax=axes[:, 2:], location="bottom", aspect=40, shrink=0.8, pad=0.02)
        bar.set_label("attention of the class token, share of the largest")
    figure.savefig(path, dpi=120)
    plt.close(figure)


@torch.no_grad()
def classify(model_id: str, paths: list[str], output: Path):
    """Loads a CrossViT through the Auto classes, classifies and draws the images, or else the held-out digits."""
    images, labels = [open_image(path) for path in paths], []
    try:
        if AutoConfig.from_pretrained(model_id).model_type != "crossvit":
            sys.exit(f"{model_id!r} is no CrossViT.")
        processor = AutoImageProcessor.from_pretrained(model_id)
        model = AutoModelForImageClassification.from_pretrained(model_id, attn_implementation="eager").eval()
    except (OSError, ValueError) as error:
        sys.exit(f"Cannot load a CrossViT from {model_id!r}: {str(error).splitlines()[0]}")

    if not images:
        if list(model.config.id2label.values()) != LABELS:
            sys.exit(f"{model_id!r} was not trained on digits: give it images of yours with --image.")
        digits = load_datasets()[1]
        images, labels = [image.convert("RGB") for image in digits.images], [LABELS[label] for label in digits.labels]

    classifier = pipeline("image-classification", model=model_id, image_processor=processor)
    predictions = classifier(images, top_k=min(3, model.config.num_labels), batch_size=8)
    if labels:
        right = [prediction[0]["label"] == label for prediction, label in zip(predictions, labels)]
        print(f"Loaded {model_id} in a new process: {sum(right)} of {len(right)} held-out digits are right")
        # Up to two mistakes first (orange), there is most to see in them
        mistakes = [index for index, is_right in enumerate(right) if not is_right][:2]
        order = list(dict.fromkeys([*mistakes, *range(len(images))]))[:MAX_ROWS]
        titles = [f"is {labels[index]}" for index in order]
    else:
        for path, prediction in zip(paths, predictions):
            print(path, *(f"{label['label']} {label['score']:.1%}" for label in prediction), sep="  ")
        order = list(range(len(images)))[:MAX_ROWS]
        titles = [Path(paths[index]).name[-24:] for index in order]

    pixel_values = processor([images[index] for index in order], return_tensors="pt").pixel_values
    maps = class_token_attention(model, model(pixel_values, output_attentions=True).attentions)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    output.mkdir(parents=True, exist_ok=True)
    (output / "predictions.json").write_text(json.dumps(predictions, indent=2))
    draw(pixel_values * std + mean, titles, [predictions[index] for index in order], maps, output / "quickstart.png")
    print(f"Drew {len(order)} images and what the model looks at in {output / 'quickstart.png'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="classify these instead of the digits")
    parser.add_argument("--model", help="folder or Hub id of a CrossViT to use instead of training one")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable_progress_bar()  # those of loading and saving; the one of training stays

    if args.model is not None:
        return classify(args.model, args.image, args.output)
    for path in args.image:
        open_image(path)  # A typo should not cost a training
    args.output.mkdir(parents=True, exist_ok=True)
    train(args.output, args.seed)
    # In a new process, as a user of the saved model would
    command = [sys.executable, __file__, "--model", str(args.output), "--output", str(args.output)]
    sys.exit(subprocess.run(command + (["--image", *args.image] if args.image else [])).returncode)


if __name__ == "__main__":
    main()
