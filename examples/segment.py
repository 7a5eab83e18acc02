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
"""Trains a small segmentation model (UperNet with a CrossViT backbone) on generated shapes and plots its masks.

    python examples/segment.py

Nothing is downloaded: circles, squares and triangles in random bright colors are drawn together with their masks.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from common.command_line import run_command


LABELS = ["background", "circle", "square", "triangle"]
COLORS = [(30, 30, 30), (0, 114, 178), (230, 159, 0), (204, 121, 167)]  # of the masks
SIDE = 64  # pixels of an image
TEST_IMAGES = 200
TEST_SEED = 2**32 - 1
SHOWN = 6


def draw_sample(generator: Any) -> tuple[Any, Any]:
    """An image of one or two bright shapes on a dark noisy ground, and the label of each pixel (SIDE, SIDE)."""
    import numpy as np
    import PIL.Image
    import PIL.ImageDraw

    ground, *colors = generator.integers((0, 120, 120), (100, 256, 256), (3, 3)).T.tolist()
    image, mask = PIL.Image.new("RGB", (SIDE, SIDE), tuple(ground)), PIL.Image.new("L", (SIDE, SIDE))
    for color in colors[: generator.integers(1, 3)]:
        label, radius = int(generator.integers(1, 4)), generator.uniform(10, 18)
        x, y = generator.uniform(radius, SIDE - radius, 2)
        corners = {1: 60, 2: 4, 3: 3}[label]
        # Squares and triangles stand on a side, give or take 18 degrees
        angles = np.pi * (0.5 + 1 / corners + generator.uniform(-0.1, 0.1)) + np.arange(corners) * 2 * np.pi / corners
        outline = [(x + radius * np.cos(angle), y + radius * np.sin(angle)) for angle in angles]
        PIL.ImageDraw.Draw(image).polygon(outline, fill=tuple(color))
        PIL.ImageDraw.Draw(mask).polygon(outline, fill=label)
    pixels = np.asarray(image) + generator.normal(0, 12, (SIDE, SIDE, 3))
    return PIL.Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), np.asarray(mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="for training, per epoch; default: %(default)s")
    parser.add_argument("--epochs", type=float, default=8, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("outputs/segment"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.images < 1 or args.epochs <= 0:
        parser.error("--images and --epochs must be positive")

    # After the options, as these imports take seconds
    import numpy as np
    import PIL.Image
    import torch
    from sklearn.metrics import jaccard_score
    from transformers import (
        EvalPrediction,
        Trainer,
        TrainingArguments,
        UperNetConfig,
        UperNetForSemanticSegmentation,
        set_seed,
    )

    from crossvit import CrossViTConfig, CrossViTImageProcessor
    from crossvit.interpretability import ImageCell, draw_rows

    set_seed(args.seed)
    processor = CrossViTImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})

    def make_dataset(images: int, seed: int) -> list[dict[str, torch.Tensor]]:
        samples = [draw_sample(np.random.default_rng((seed, index))) for index in range(images)]
        pixel_values = processor([image for image, _ in samples], return_tensors="pt").pixel_values
        masks = [torch.tensor(mask, dtype=torch.long) for _, mask in samples]
        return [{"pixel_values": pixels, "labels": mask} for pixels, mask in zip(pixel_values, masks)]

    def mean_iou(prediction: EvalPrediction) -> dict[str, float]:
        """Intersection over union of predicted and true pixels: of each class, and the mean."""
        true, predicted = np.ravel(prediction.label_ids), np.ravel(prediction.predictions)
        ious = jaccard_score(true, predicted, labels=range(len(LABELS)), average=None, zero_division=0)
        return {"mean_iou": ious.mean(), **{f"iou_{label}": iou for label, iou in zip(LABELS, ious)}}

    backbone_config = CrossViTConfig(
        image_size=SIDE,
        patch_size=(4, 8),
        embed_dim=(48, 64),
        num_heads=(4, 4),
        depth=((1, 2, 0), (1, 2, 0)),
        initializer_range=0.1,  # With the usual 0.02 such narrow layers hardly begin to learn
    )
    backbone_config.out_features = ["stage1_0", "stage2_0", "stage2_1"]  # UperNet expects coarse maps last
    config = UperNetConfig(
        backbone_config=backbone_config,
        hidden_size=32,
        use_auxiliary_head=False,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    trainer = Trainer(
        model=UperNetForSemanticSegmentation(config),
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
        train_dataset=make_dataset(args.images, args.seed),
        eval_dataset=make_dataset(TEST_IMAGES, TEST_SEED),
        processing_class=processor,
        compute_metrics=mean_iou,
        # Keeps only the label of each pixel instead of the logits of all images
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(1).to(torch.uint8),
    )
    metrics = trainer.train().metrics | trainer.evaluate()
    trainer.save_model()
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=2))

    model = UperNetForSemanticSegmentation.from_pretrained(args.output)
    palette = np.array(COLORS, dtype=np.uint8)
    rows: list[list[ImageCell]] = []
    for index in range(SHOWN):
        image, mask = draw_sample(np.random.default_rng((TEST_SEED, index)))
        with torch.no_grad():
            predicted = model(**processor(image, return_tensors="pt")).logits[0].argmax(0).numpy()
        pictures = [image, PIL.Image.fromarray(palette[mask]), PIL.Image.fromarray(palette[predicted])]
        titles = ["", "", ""] if rows else ["image", "true mask", "predicted mask"]
        labels = [", ".join(LABELS[label] for label in np.unique(mask) if label), "", ""]
        rows.append([ImageCell(*cell) for cell in zip(pictures, titles, labels)])
    draw_rows(rows).savefig(args.output / "segment.png")
    print(
        f"Trained in {metrics['train_runtime']:.0f} seconds. Mean IoU on {TEST_IMAGES} other images:"
        f" {metrics['eval_mean_iou']:.3f}. Saved in {args.output}"
    )


if __name__ == "__main__":
    run_command(main)
