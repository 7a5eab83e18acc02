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
"""Gives each branch its own image, guides attention with masks, and plots the difference.

    python examples/guided_attention.py

The images are generated: a disk, a square or a triangle on a noisy background, as a color photo for the first branch
and as a depth image for the second. Two small models learn the shapes, one with an extra loss on where it attends.
"""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.command_line import run_command


if TYPE_CHECKING:
    import numpy as np
    import PIL.Image

    Scene = tuple[PIL.Image.Image, PIL.Image.Image, PIL.Image.Image]  # photo, depth image, mask


SHAPES = {"disk": 60, "square": 4, "triangle": 3}  # corners of their polygons
SIDE = 48  # pixels
ROWS = 4  # of the picture


def draw_scene(corners: int, generator: "np.random.Generator") -> "Scene":
    """A shape of random place, size, rotation and color, among dots that are not in the depth image."""
    import numpy as np
    import PIL.Image
    import PIL.ImageDraw

    radius = generator.uniform(7, 10)
    center, rotation = generator.uniform(radius, SIDE - radius, 2), generator.uniform(0, 2 * math.pi)
    angles = rotation + 2 * math.pi * np.arange(corners) / corners
    outline = center + radius * np.stack((np.cos(angles), np.sin(angles)), axis=1)
    mask = PIL.Image.new("L", (SIDE, SIDE))
    PIL.ImageDraw.Draw(mask).polygon([tuple(point) for point in outline], fill=255)

    background, color = generator.uniform(60, 200, (2, 3))
    pixels = background + generator.normal(0, 25, (SIDE, SIDE, 3))
    photo = PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = PIL.ImageDraw.Draw(photo)
    for x, y in generator.uniform(0, SIDE, (6, 2)):
        size = generator.uniform(1, 3)
        draw.ellipse((x - size, y - size, x + size, y + size), fill=tuple(generator.integers(0, 256, 3).tolist()))
    colored = (color + generator.normal(0, 25, (SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)
    photo.paste(PIL.Image.fromarray(colored), mask=mask)

    slope = generator.uniform(-1.5, 1.5, 2) @ (np.indices((SIDE, SIDE)).reshape(2, -1) - SIDE / 2)
    height = generator.uniform(40, 80) * np.asarray(mask) / 255
    depth = 100 + slope.reshape(SIDE, SIDE) + height + generator.normal(0, 6, (SIDE, SIDE))
    return photo, PIL.Image.fromarray(depth.clip(0, 255).astype(np.uint8)), mask


def draw_scenes(number: int, seed: int) -> tuple[list["Scene"], list[int]]:
    """Scenes with their labels, which alternate."""
    import numpy as np

    generator = np.random.default_rng(seed)
    labels = [index % len(SHAPES) for index in range(number)]
    return [draw_scene(list(SHAPES.values())[label], generator) for label in labels], labels


def train(weight: float, args: argparse.Namespace) -> tuple[Any, Any]:
    """Trains a small model, whose attention the masks guide with that weight. Returns it and its image processor."""
    import torch
    from sklearn.metrics import accuracy_score
    from torchvision.transforms.v2 import functional as tvF
    from transformers import TrainingArguments, set_seed

    from crossvit import CrossViTConfig, CrossViTForImageClassification, CrossViTImageProcessor
    from crossvit.training.guided_attention import GuidedAttentionTrainer

    torch.set_num_threads(1)  # such a small model gains little from more threads
    set_seed(args.seed)
    processor = CrossViTImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    config = CrossViTConfig(
        image_size=(SIDE, 40),
        patch_size=(6, 8),
        embed_dim=(64, 64),
        num_heads=(4, 4),
        depth=((1, 2, 0),),
        initializer_range=0.15,
        id2label=dict(enumerate(SHAPES)),
        label2id={name: label for label, name in enumerate(SHAPES)},
    )
    model = CrossViTForImageClassification(config)

    def prepare(number: int, seed: int) -> list[dict[str, Any]]:
        scenes, labels = draw_scenes(number, seed)
        images: Any = [(photo, depth) for photo, depth, _ in scenes]
        pixel_values = processor(images, return_tensors="pt")["pixel_values"]
        masks = [tvF.to_image(mask)[0] / 255 for _, _, mask in scenes]
        columns = zip(pixel_values, masks, labels)
        return [{"pixel_values": images, "mask": mask, "labels": label} for images, mask, label in columns]

    def measure(prediction: Any) -> dict[str, float]:
        return {"accuracy": accuracy_score(prediction.label_ids, prediction.predictions.argmax(axis=1))}

    trainer = GuidedAttentionTrainer(
        model,
        TrainingArguments(
            output_dir=str(args.output),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=100,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            weight_decay=0.05,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=prepare(args.images, seed=0),
        eval_dataset=prepare(500, seed=1),
        compute_metrics=measure,
        mask_weight=weight,
    )
    print(f"Training on {args.images} images, weight of the masks {weight:g} ...", flush=True)
    trainer.train()
    metrics = trainer.evaluate()
    print(f"On 500 unseen images: accuracy {metrics['eval_accuracy']:.1%}, IoU {metrics['eval_iou']:.2f}", flush=True)
    return model, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", type=float, default=3.0, help="of the masks in the loss; default: %(default)s")
    parser.add_argument("--images", type=int, default=3000, help="to train with; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/guided_attention"), help="default: %(default)s")
    args = parser.parse_args()

    from crossvit.interpretability import AttentionMaps, ImageCell, draw_attention, draw_rows

    args.output.mkdir(parents=True, exist_ok=True)
    unguided, processor = train(0.0, args)
    guided, _ = train(args.weight, args)
    guided.save_pretrained(args.output)
    processor.save_pretrained(args.output)

    rows: list[Any] = []
    for *images, _ in draw_scenes(ROWS, seed=2)[0]:
        rollouts = [AttentionMaps(model, processor, images).rollout() for model in (unguided, guided)]
        row = []
        for branch, (image, name) in enumerate(zip(images, ("photo", "depth image"))):
            titles = [f"{name}\n(branch {branch})", "rollout\nunguided", "rollout\nguided"] if not rows else [""] * 3
            row.append(ImageCell(image.resize((4 * SIDE, 4 * SIDE)), titles[0]))
            for rollout, title in zip(rollouts, titles[1:]):
                overlaid, peak = draw_attention(image, rollout, branch)
                row.append(ImageCell(overlaid, f"{title}\n{peak}" if title else peak))
        rows.append(row)
    picture = args.output / "guided_attention.png"
    draw_rows(rows, heat=True).savefig(picture)
    print(f"Drew what both attend to in unseen images in {picture}")


if __name__ == "__main__":
    run_command(main)
