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
"""Trains a small segmentation model, UperNet on a CrossViT, to find shapes, and draws what it finds.

    python examples/segment.py

Nothing is downloaded: circles, squares and triangles of any bright color are drawn at random, with their masks.
"""

import signal


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the seconds of imports without a trace

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch
from command_line import run
from torch.utils.data import Dataset
from transformers import (
    EvalPrediction,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    set_seed,
)

from crossvit import CrossViTConfig, CrossViTImageProcessor
from crossvit.interpretability.plotting import Picture, draw_rows, save_figure
from crossvit.training.errors import CommandError


LABELS = ["background", "circle", "square", "triangle"]
COLORS = np.array([(30, 30, 30), (0, 114, 178), (230, 159, 0), (204, 121, 167)], dtype=np.uint8)  # of the masks
SIDE = 64  # pixels of an image
TEST_IMAGES = 200
TEST_SEED = 2**32 - 1
SHOWN = 6


def draw_sample(generator: np.random.Generator) -> tuple[PIL.Image.Image, np.ndarray]:
    """One or two bright shapes of any color on a dark noisy ground, and the label of each pixel (SIDE, SIDE)."""
    ground, *colors = generator.integers((0, 120, 120), (100, 256, 256), (3, 3)).T.tolist()
    image, mask = PIL.Image.new("RGB", (SIDE, SIDE), tuple(ground)), PIL.Image.new("L", (SIDE, SIDE))
    for color in colors[: generator.integers(1, 3)]:
        label, radius = int(generator.integers(1, 4)), generator.uniform(10, 18)
        x, y = generator.uniform(radius, SIDE - radius, 2)
        corners = {1: 60, 2: 4, 3: 3}[label]
        # Squares and triangles stand on a side, more or less
        angles = np.pi * (0.5 + 1 / corners + generator.uniform(-0.1, 0.1)) + np.arange(corners) * 2 * np.pi / corners
        outline = [(x + radius * np.cos(angle), y + radius * np.sin(angle)) for angle in angles]
        PIL.ImageDraw.Draw(image).polygon(outline, fill=tuple(color))
        PIL.ImageDraw.Draw(mask).polygon(outline, fill=label)
    pixels = np.asarray(image) + generator.normal(0, 12, (SIDE, SIDE, 3))
    return PIL.Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), np.asarray(mask)


class Shapes(Dataset):
    """Images as the model takes them and the labels of their pixels, the same for the same seed."""

    def __init__(self, processor: CrossViTImageProcessor, images: int, seed: int):
        self.processor, self.images, self.seed = processor, images, seed

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, mask = draw_sample(np.random.default_rng((self.seed, index)))
        pixel_values = self.processor(image, return_tensors="pt").pixel_values[0]
        return {"pixel_values": pixel_values, "labels": torch.tensor(mask, dtype=torch.long)}


def mean_iou(prediction: EvalPrediction) -> dict[str, float]:
    """The mean over the classes of the intersection of predicted and true pixels by their union, and the classes'."""
    predicted, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    ious = {}
    for index, label in enumerate(LABELS):
        found, true = predicted == index, labels == index
        if (found | true).any():
            ious[label] = float((found & true).sum() / (found | true).sum())
    return {"mean_iou": float(np.mean(list(ious.values()))), **{f"iou_{label}": iou for label, iou in ious.items()}}


def make_model() -> UperNetForSemanticSegmentation:
    backbone_config = CrossViTConfig(
        image_size=SIDE,
        patch_size=(4, 8),
        embed_dim=(48, 64),
        num_heads=(4, 4),
        depth=((1, 2, 0), (1, 2, 0)),
        initializer_range=0.1,  # Narrow layers hardly begin to learn from the usual 0.02
    )
    # UperNet wants the coarse ones last
    backbone_config.out_features = ["stage1_0", "stage2_0", "stage2_1"]
    config = UperNetConfig(
        backbone_config=backbone_config,
        hidden_size=32,
        use_auxiliary_head=False,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    return UperNetForSemanticSegmentation(config)


@torch.no_grad()
def draw(model_folder: Path, test_dataset: Shapes) -> Any:
    """A row per sample: the image, its mask and what the saved model finds."""
    model = UperNetForSemanticSegmentation.from_pretrained(model_folder)
    rows = []
    for index in range(SHOWN):
        image, mask = draw_sample(np.random.default_rng((test_dataset.seed, index)))
        logits = model(test_dataset[index]["pixel_values"][None]).logits[0]
        found = logits.argmax(0).numpy()
        pictures = (image, PIL.Image.fromarray(COLORS[mask]), PIL.Image.fromarray(COLORS[found]))
        titles = ("image", "true mask", "found") if index == 0 else ("", "", "")
        shapes = ", ".join(LABELS[index] for index in np.unique(mask) if index)
        labels = (shapes, "", "")
        rows.append([Picture(*cell) for cell in zip(pictures, titles, labels)])
    return draw_rows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="to train with, in each epoch; default: %(default)s")
    parser.add_argument("--epochs", type=float, default=8, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("outputs/segment"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.images < 1 or args.epochs <= 0:
        raise CommandError(f"--images {args.images} --epochs {args.epochs}: of each, more than 0")
    set_seed(args.seed)

    processor = CrossViTImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    train_dataset = Shapes(processor, args.images, seed=args.seed)
    test_dataset = Shapes(processor, TEST_IMAGES, seed=TEST_SEED)
    trainer = Trainer(
        model=make_model(),
        args=TrainingArguments(
            output_dir=str(args.output),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=50,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            weight_decay=0.05,
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=train_dataset,
        eval_dataset=test_dataset,
        processing_class=processor,
        compute_metrics=mean_iou,
        # Of the logits of all images, the best label of each pixel is kept alone
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(1).to(torch.uint8),
    )
    metrics = trainer.train().metrics | trainer.evaluate()
    trainer.save_model()
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=2))
    save_figure(draw(args.output, test_dataset), args.output / "segment.png")
    print(
        f"Trained in {metrics['train_runtime']:.0f} seconds. Mean IoU on {TEST_IMAGES} other images:"
        f" {metrics['eval_mean_iou']:.3f}"
    )
    print(f"Saved the model and what it finds in {args.output}")


if __name__ == "__main__":
    run(main)
