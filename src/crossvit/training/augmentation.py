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
"""Batches of images for CrossViT: augmented with torchvision's transforms for training, plain for evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torchvision.transforms import v2

from .image_files import check_labels, name_of, read_bytes, read_image
from .sampling import augmentation_seed


@dataclass
class AugmentationArguments:
    """How images are altered for training, as options of a command. The defaults suit fine-tuning on photos."""

    crop_scale: list[float] = field(
        default_factory=lambda: [0.35, 1.0], metadata={"help": "Least and largest part of an image that is cut out."}
    )
    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of a mirror image."})
    randaugment_layers: int = field(default=0, metadata={"help": "Operations of RandAugment, used half the time."})
    randaugment_magnitude: int = field(default=9, metadata={"help": "Their strength, of 10."})
    random_erasing: float = field(default=0.0, metadata={"help": "Probability that a rectangle becomes noise."})
    mixup_alpha: float = field(default=0.0, metadata={"help": "Mixup, 0 for none; with cutmix, one of both."})
    cutmix_alpha: float = field(default=0.0, metadata={"help": "Cutmix, 0 for none."})
    augmentation_repeats: int = field(default=1, metadata={"help": "Times that an image is drawn in a row."})

    def __post_init__(self):
        if (
            not isinstance(self.crop_scale, list)
            or len(self.crop_scale) != 2
            or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1
        ):
            raise ValueError(f"`crop_scale` must be two parts of an image, such as 0.35 1.0, got {self.crop_scale}.")
        for name in ("horizontal_flip", "random_erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be a probability, got {getattr(self, name)}.")
        if not 0 <= self.randaugment_magnitude <= 10:
            raise ValueError(f"`randaugment_magnitude` must be from 0 to 10, got {self.randaugment_magnitude}.")
        for name in ("randaugment_layers", "mixup_alpha", "cutmix_alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}.")
        if self.augmentation_repeats < 1:
            raise ValueError(f"`augmentation_repeats` must be 1 or more, got {self.augmentation_repeats}.")

    def transform(self, size: tuple[int, int], mean: list[float], std: list[float]) -> v2.Transform:
        """
        The transform of one image for training, in the order of timm's and DeiT's.

        RandAugment is torchvision's. As in timm's "rand-m9-mstd0.5-inc1" an operation is used half the time, and the
        strength varies by one step of ten with the probabilities of a normal distribution of deviation 0.5. Unlike
        there, one of the operations is to do nothing, inversion and added solarization are not among them, and
        posterization keeps four bits or more.

        Args:
            size (`tuple[int, int]`): height and width in pixels of what comes out.
            mean (`list[float]`), std (`list[float]`): of the channels, of pixels between 0 and 1.
        """
        strengths = [min(max(self.randaugment_magnitude + step, 0), 10) for step in (-1, 0, 1)]
        operation = v2.RandomChoice(
            [v2.RandAugment(num_ops=1, magnitude=strength, num_magnitude_bins=11) for strength in strengths],
            p=[0.1573, 0.6827, 0.16],
        )
        return v2.Compose(
            [
                # All of an image has its own sides; a part gets sides like those of the result
                v2.Resize(size, v2.InterpolationMode.BICUBIC)
                if self.crop_scale[0] == 1
                else v2.RandomResizedCrop(
                    size, scale=tuple(self.crop_scale), interpolation=v2.InterpolationMode.BICUBIC
                ),
                v2.RandomHorizontalFlip(self.horizontal_flip),
                *[v2.RandomApply([operation], p=0.5)] * self.randaugment_layers,
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean, std),
                v2.RandomErasing(self.random_erasing, value="random"),
            ]
        )

    def mixing(self, num_classes: int) -> v2.Transform | None:
        """The transform that mixes the images of a batch and their labels, which become probabilities, or none."""
        mixings: list[v2.Transform] = []
        if self.mixup_alpha > 0:
            mixings.append(v2.MixUp(alpha=self.mixup_alpha, num_classes=num_classes))
        if self.cutmix_alpha > 0:
            mixings.append(v2.CutMix(alpha=self.cutmix_alpha, num_classes=num_classes))
        return v2.RandomChoice(mixings) if mixings else None


class ImageCollator:
    """
    Makes a batch of rows of an [`ImageDataset`] or [`ImageStream`]:
    those that were drawn for training are augmented, the others go through the image processor alone.

    An augmentation is a function of the seed, the epoch and the image (mixing: of the last image of the batch): the
    same in any worker or process, from disk and from a stream, and after a restart.

    Args:
        processor ([`CrossViTImageProcessor`]): of the model; training images get its size and normalization.
        num_classes (`int`): the labels are smaller.
        multi_label (`bool`): whether labels are lists, which become rows of zeros and ones.
        augmentation ([`AugmentationArguments`], *optional*): none if absent.
        seed (`int`): of the augmentation.

    Returns of a call:
        `dict[str, torch.Tensor]`: "pixel_values" (batch, channels, height, width), and "labels": (batch) classes;
        (batch, classes) ones for each label of an image, or probabilities if images were mixed.
    """

    def __init__(
        self,
        processor: Any,
        num_classes: int,
        multi_label: bool = False,
        augmentation: AugmentationArguments | None = None,
        seed: int = 0,
    ):
        augmentation = augmentation or AugmentationArguments(crop_scale=[1.0, 1.0], horizontal_flip=0.0)
        self.processor, self.num_classes, self.multi_label, self.seed = processor, num_classes, multi_label, seed
        self.transform = augmentation.transform(output_size(processor), processor.image_mean, processor.image_std)
        self.mixing = augmentation.mixing(num_classes)
        if multi_label and self.mixing:
            raise ValueError("`mixup_alpha` and `cutmix_alpha` mix images with one label each: set them to 0.")

    def __call__(self, examples: list[dict[str, Any] | None]) -> dict[str, torch.Tensor]:
        if examples[0] is None:  # of a batch that a resumed stream passes over
            return {}
        for example in examples:
            check_labels(example["labels"], self.num_classes, name_of(example, "an image without a name"))
        labels = self.labels([example["labels"] for example in examples])
        if "draw" not in examples[0]:
            images = [read_image(example["image"]) for example in examples]
            return {"pixel_values": self.processor(images, return_tensors="pt")["pixel_values"], "labels": labels}

        pixel_values = []
        for example in examples:
            content = read_bytes(example["image"])
            seed = augmentation_seed(self.seed, example["draw"], content)
            with random_numbers(seed):
                pixel_values.append(self.transform(read_image(example["image"], content)))
        batch = torch.stack(pixel_values)
        if self.mixing:
            with random_numbers(seed + 1):
                batch, labels = self.mixing(batch, labels)
        return {"pixel_values": batch, "labels": labels}

    def labels(self, labels: list[Any]) -> torch.Tensor:
        if not self.multi_label:
            return torch.tensor(labels)
        rows = torch.zeros(len(labels), self.num_classes)
        for row, indices in zip(rows, labels):
            row[indices] = 1
        return rows


def output_size(processor: Any) -> tuple[int, int]:
    """The height and width in pixels of what an image processor makes."""
    size = processor.crop_size if processor.do_center_crop else processor.size
    if not size.get("height") or not size.get("width"):
        raise ValueError(f"The image processor must make images of one size, got {size}: set `do_center_crop`.")
    return size["height"], size["width"]


@contextmanager
def random_numbers(seed: int) -> Iterator[None]:
    """The random numbers of the CPU from this seed; afterwards they go on as if nothing had been."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would reach the accelerators too
    try:
        yield
    finally:
        torch.set_rng_state(state)


__all__ = ["AugmentationArguments", "ImageCollator"]
