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
"""Trains a small CrossViT on handwritten digits, loads it in a new process, classifies and plots what it attends to.

    python examples/quickstart.py

Nothing is downloaded: the digits, 8x8 pixels each, ship with scikit-learn. The model is a demonstration that knows
only these digits. To classify your own digits after training, or with a model that you already have:

    python examples/quickstart.py --image digit.png
    python examples/quickstart.py --image digit.png --model outputs/quickstart

Other examples use the digits as image files:

    python examples/quickstart.py --write_digits outputs/data
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.command_line import load_checkpoint, run_command
from common.errors import CommandError
from common.images import open_image


if TYPE_CHECKING:
    import datasets


LABELS = [str(digit) for digit in range(10)]
SIDE = 48  # pixels of the images that the model takes; the digits themselves have 8x8
MAX_ROWS = 8  # of the picture
PURPOSE = "The model is a demonstration: it knows only handwritten digits of 8x8 pixels, not photos."


def load_digits() -> "datasets.DatasetDict":
    """The digits of scikit-learn: "train", and "test", a fifth of them, which is always the same."""
    import datasets
    import numpy as np
    import PIL.Image
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    images = [PIL.Image.fromarray((ink * 255 / 16).astype(np.uint8)) for ink in digits.images]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=LABELS)})
    dataset = datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features)
    return dataset.train_test_split(test_size=0.2, stratify_by_column="label", seed=0)


def write_digits(folder: Path) -> None:
    """Writes the digits as images, in a folder per digit and in one for odd and one for even digits."""
    for split, digits in load_digits().items():
        for number, digit in enumerate(digits):
            parity = "odd" if digit["label"] % 2 else "even"
            for path in (Path("digits", split, LABELS[digit["label"]]), Path("parity", split, parity)):
                (folder / path).mkdir(parents=True, exist_ok=True)
                digit["image"].save(folder / path / f"{number}.png")
    print(f"Wrote the digits to {folder / 'digits'} and {folder / 'parity'}")


def train(output: Path, seed: int) -> None:
    """Trains a small model from scratch; saves it, its image processor and its metrics in `output`."""
    import numpy as np
    import torch
    from sklearn.metrics import accuracy_score
    from torchvision.transforms import v2
    from transformers import Trainer, TrainingArguments, set_seed

    from crossvit import CrossViTConfig, CrossViTForImageClassification, CrossViTImageProcessor

    torch.set_num_threads(1)  # Such a small model gains little from more threads
    set_seed(seed)
    processor = CrossViTImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5, 0.5, 0.5],  # The default, ImageNet's, is for photos
        image_std=[0.5, 0.5, 0.5],
    )
    config = CrossViTConfig(
        image_size=(SIDE, 40),
        patch_size=(6, 8),
        embed_dim=(64, 64),
        num_heads=(4, 4),
        depth=((1, 2, 0),),
        initializer_range=0.15,  # With the usual 0.02 such narrow layers hardly begin to learn
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    model = CrossViTForImageClassification(config)

    def preprocess(batch: dict[str, list]) -> dict[str, Any]:
        return {**processor(batch["image"], return_tensors="pt"), "labels": batch["label"]}

    def augment(batch: dict[str, list]) -> dict[str, Any]:
        shift = v2.Compose([v2.Resize(SIDE, v2.InterpolationMode.BICUBIC), v2.RandomCrop(SIDE, padding=2)])
        return preprocess({**batch, "image": [shift(image) for image in batch["image"]]})

    digits = load_digits()
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
            remove_unused_columns=False,  # "image" becomes `pixel_values` as it is read
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            seed=seed,
        ),
        train_dataset=digits["train"].with_transform(augment),
        eval_dataset=digits["test"].with_transform(preprocess),
        compute_metrics=lambda prediction: {
            "accuracy": accuracy_score(prediction.label_ids, np.argmax(prediction.predictions, axis=-1))
        },
    )
    print(f"Training {model.num_parameters():,} weights on {len(digits['train'])} handwritten digits ...", flush=True)
    metrics = trainer.train().metrics | trainer.evaluate()
    model.save_pretrained(output)
    processor.save_pretrained(output)
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2))
    print(
        f"Trained in {metrics['train_runtime']:.0f} seconds. Accuracy on {len(digits['test'])} held-out digits:"
        f" {metrics['eval_accuracy']:.1%}. Saved in {output}",
        PURPOSE,
        sep="\n",
        flush=True,
    )


def classify(model_name: str, paths: list[str], output: Path) -> None:
    """Classifies the images, or else the held-out digits, and draws some of them."""
    from transformers import pipeline

    from crossvit.interpretability import AttentionMaps, ImageCell, ScoreCell, draw_attention, draw_rows
    from crossvit.interpretability.plotting import ORANGE, shorten

    images, labels = [open_image(path) for path in paths], [None] * len(paths)
    model, processor = load_checkpoint(model_name)
    if not paths:
        if list(model.config.id2label.values()) != LABELS:
            raise CommandError(f"--model {model_name}: its labels are not the digits; give it images with --image")
        digits = load_digits()["test"]
        images, labels = list(digits["image"]), [LABELS[label] for label in digits["label"]]

    classifier = pipeline("image-classification", model=model, image_processor=processor)
    predictions = classifier(images, top_k=3, batch_size=8)
    (output / "predictions.json").write_text(json.dumps(predictions, indent=2))
    correct = [label in (None, prediction[0]["label"]) for label, prediction in zip(labels, predictions)]
    if paths:
        for path, prediction in zip(paths, predictions):
            print(path, *(f"{entry['label']} {entry['score']:.1%}" for entry in prediction), sep="  ")
    else:
        print(f"Loaded {model_name} in a new process: {sum(correct)} of {len(images)} held-out digits are correct")

    mistakes = [number for number in range(len(images)) if not correct[number]]
    shown = [*mistakes[:2], *(number for number in range(len(images)) if correct[number])][:MAX_ROWS]
    names = [shorten(Path(path).name, 20) for path in paths] or [f"is {label}" for label in labels]
    for number in mistakes:
        names[number] += f",\npredicted {predictions[number][0]['label']}"
    rows: list[list[Any]] = []
    for number in shown:
        maps = AttentionMaps(model, processor, images[number])
        titles = ["image", "prediction"] if not rows else ["", ""]
        row: list[Any] = [ImageCell(images[number], titles[0], names[number], None if correct[number] else ORANGE)]
        row += [ScoreCell(predictions[number], titles[1], correct[number]), None]
        for title, attention in maps.class_token_maps().items():
            picture, peak = draw_attention(images[number], attention)
            row.append(ImageCell(picture, peak if rows else f"{title}\n{peak}"))
        rows.append(row)
    figure = draw_rows(rows, heat=True)
    if mistakes:
        first = len(mistakes[:2])
        note = f"First rows (orange): {first} of the {len(mistakes)} misclassified digits"
        figure.suptitle(note)
        print(note)
    figure.savefig(output / "quickstart.png")
    print(f"Drew {len(rows)} of them and what the model attends to in {output / 'quickstart.png'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="classify these instead of the digits")
    parser.add_argument("--model", help="folder or Hub ID of a CrossViT to use instead of training one")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"), help="default: %(default)s")
    parser.add_argument("--write_digits", type=Path, metavar="FOLDER", help="write the digits as image files, and end")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    if args.write_digits is not None:
        return write_digits(args.write_digits)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.model is not None:
        return classify(args.model, args.image, args.output)
    for path in args.image:
        open_image(path)  # before the training, so that a mistyped name does not cost it
    train(args.output, args.seed)
    # In a new process, as a user of the saved model would. Ctrl-C reaches only this process, which then ends the other
    command = [sys.executable, __file__, "--model", str(args.output), "--output", str(args.output)]
    command += ["--image", *args.image] if args.image else []
    sys.exit(subprocess.run(command, start_new_session=True).returncode)


if __name__ == "__main__":
    run_command(main)
