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
"""From images to batches: augmentation by torchvision and, for its policies, timm; none for evaluation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
import torch
from timm.data import Mixup, auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from torch import nn
from torch.utils.data import default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2


BICUBIC = v2.InterpolationMode.BICUBIC


@dataclass
class AugmentationArguments:
    """How images are augmented. The defaults suit fine-tuning on photos."""

    crop_scale: list[float] = field(
        default_factory=lambda: [0.35, 1.0],
        metadata={"help": "Area range of the random resized crop, as fractions of the image; 1 1 for whole images."},
    )
    horizontal_flip: float = field(default=0.5, metadata={"help": "Horizontal flip probability."})
    color_jitter: float = field(
        default=0.0, metadata={"help": "Strength of the brightness, contrast and saturation jitter."}
    )
    auto_augment: str | None = field(
        default=None, metadata={"help": "Augmentation policy of timm, such as rand-m9-mstd0.5-inc1."}
    )
    random_erasing: float = field(default=0.0, metadata={"help": "Random erasing probability."})
    mixup_alpha: float = field(
        default=0.0,
        metadata={"help": "Mixup alpha, 0 disables it; with CutMix also on, one is chosen at random per batch."},
    )
    cutmix_alpha: float = field(default=0.0, metadata={"help": "CutMix alpha, 0 disables it."})
    augmentation_repeats: int = field(
        default=1, metadata={"help": "Number of copies of each sampled image (repeated augmentation)."}
    )

    def __post_init__(self):
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"`crop_scale` must be two shares of an image, such as 0.35 1.0, got {self.crop_scale}.")
        for name in ("horizontal_flip", "random_erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be a probability, got {getattr(self, name)}.")
        if self.color_jitter < 0 or (self.color_jitter and self.auto_augment):
            raise ValueError(f"`color_jitter` must be 0 or more, and 0 with `auto_augment`, got {self.color_jitter}.")
        if self.augmentation_repeats < 1:
            raise ValueError(f"`augmentation_repeats` must be 1 or more, got {self.augmentation_repeats}.")

    def mixup(self, num_classes: int) -> Mixup | None:
        """Mixup and CutMix of the images of a batch, whose labels become probabilities; `None` if both are off."""
        if self.mixup_alpha <= 0 and self.cutmix_alpha <= 0:
            return None
        # The loss smooths the labels
        return Mixup(self.mixup_alpha, self.cutmix_alpha, label_smoothing=0.0, num_classes=num_classes)


class TrainingTransform:
    """
    Augments the images of rows, for `set_transform` and `map` of `datasets`.

    Cropping, flipping and color jitter are torchvision's, on tensors of bytes, which are resized in half of Pillow's
    time; the policies of `auto_augment` and random erasing are timm's, as in the paper. The random crop and flip are
    the same for all images of a row and its mask, which are resized to the first image beforehand; colors and erased
    rectangles are sampled independently for each image.

    Args:
        args ([`AugmentationArguments`]): the augmentation.
        processor ([`CrossViTImageProcessor`]): the image processor, for the size and the normalization.
        image_columns (`Sequence[str]`): the column of images for all branches, or those of each branch.
        mask_column (`str`, *optional*): the column of masks, of which the objects are white. It may be one of the
            above.

    A call takes rows as `dict[str, Iterable]`: "labels", and the columns of images and masks, PIL images. If they are
    decoded as they are iterated over, one row is in memory at a time.

    Returns of a call:
        `dict[str, list]`: "pixel_values", of each row (channels, height, width), or (branches, channels, height,
        width) if there are several columns of images; "labels"; and with masks "mask", of each row (height, width)
        from 0 to 1.

    Raises:
        `ValueError`: for `auto_augment` with several images or masks, which would be moved in different ways.
    """

    def __init__(
        self,
        args: AugmentationArguments,
        processor: Any,
        image_columns: Sequence[str] = ("image",),
        mask_column: str | None = None,
    ):
        if args.auto_augment and (len(image_columns) > 1 or mask_column):
            raise ValueError(
                f"`auto_augment` {args.auto_augment} moves each image in its own way, so it works neither with"
                " several images per row nor with masks: leave it out, or use `color_jitter`."
            )
        self.processor, self.image_columns, self.mask_column = processor, image_columns, mask_column
        size = output_size(processor)
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
        crop: Any = v2.Resize(size, BICUBIC)
        if args.crop_scale[0] < 1:
            crop = v2.RandomResizedCrop(size, args.crop_scale, interpolation=BICUBIC)
        self.geometric = v2.Compose([crop, v2.RandomHorizontalFlip(args.horizontal_flip)])
        colors: list[Any] = []
        if args.auto_augment:
            colors = [to_pil_image, timm_policy(args.auto_augment, size, mean), v2.PILToTensor()]
        elif args.color_jitter:
            colors = [v2.ColorJitter(args.color_jitter, args.color_jitter, args.color_jitter)]
        self.photometric = v2.Compose(
            [
                *colors,
                to_float,
                # Of bytes, which saves dividing by 255
                v2.Normalize([255 * value for value in mean], [255 * value for value in std], inplace=True),
                RandomErasing(args.random_erasing, mode="pixel", device="cpu"),
            ]
        )

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        batch: dict[str, list[Any]] = {"pixel_values": [], "labels": rows["labels"]}
        if self.mask_column is not None:
            batch["mask"] = []
        for row_images in iterate_rows(rows, self.image_columns, self.mask_column):
            first = row_images[self.image_columns[0]]
            # torchvision moves several images together only if they have the same size
            images = [v2.functional.to_image(as_rgb(row_images[column])) for column in self.image_columns]
            row = self.processor.match_first(images)
            if self.mask_column is not None:
                mask = as_mask(row_images[self.mask_column], first)
                row.append(tv_tensors.Mask(v2.functional.pil_to_tensor(mask)))
            row = self.geometric(row)
            if self.mask_column is not None:
                batch["mask"].append(row.pop()[0] / 255)
            pixel_values = [self.photometric(image) for image in row]
            batch["pixel_values"].append(torch.stack(pixel_values) if len(row) > 1 else pixel_values[0])
        return batch


def iterate_rows(
    rows: dict[str, Any], image_columns: Sequence[str], mask_column: str | None
) -> Iterator[dict[str, PIL.Image.Image]]:
    """The images of each row by their columns; a mask may be an image too."""
    columns = dict.fromkeys([*image_columns, *([mask_column] if mask_column else [])])
    for images in zip(*(rows[column] for column in columns)):
        yield dict(zip(columns, images))


def as_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def as_mask(mask: PIL.Image.Image, image: PIL.Image.Image) -> PIL.Image.Image:
    """A mask in gray and in the size of its image."""
    return mask.convert("L").resize(image.size, PIL.Image.Resampling.NEAREST)


def timm_policy(name: str, size: tuple[int, int], mean: tuple[float, ...]) -> Any:
    """A policy of timm as its training transforms have it, for images of that size; the mean fills what is vacated."""
    _, policy, _ = create_transform(
        (3, *size), is_training=True, auto_augment=name, interpolation="bicubic", mean=mean, separate=True
    )
    for step in policy.transforms:
        for operation in getattr(step, "ops", []):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = posterize
    return policy


def posterize(image: PIL.Image.Image, bits: int, **kwargs) -> PIL.Image.Image:
    """Keeps one bit where timm (1.0.31) asks for none, at full strength, which Pillow refuses since its release 13."""
    return auto_augment.posterize(image, max(bits, 1))


def to_pil_image(image: torch.Tensor) -> PIL.Image.Image:
    """
    An image of bytes (3, height, width). Merging its channels takes a fifth of the time of `v2.ToPILImage`, which
    interleaves them.
    """
    return PIL.Image.merge("RGB", [PIL.Image.fromarray(channel) for channel in image.numpy()])


def to_float(image: torch.Tensor) -> torch.Tensor:
    """The bytes of an image as floats, contiguous: PIL's interleaved channels would take longer from here on."""
    return image.as_subclass(torch.Tensor).to(torch.float32, memory_format=torch.contiguous_format)


class EvaluationTransform:
    """As [`TrainingTransform`], by the image processor and without augmentation."""

    def __init__(self, processor: Any, image_columns: Sequence[str] = ("image",), mask_column: str | None = None):
        self.processor, self.image_columns, self.mask_column = processor, image_columns, mask_column

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        rows_of_images = list(iterate_rows(rows, self.image_columns, self.mask_column))
        first = self.image_columns[0]
        images: list[Any] = [row[first] for row in rows_of_images]
        if len(self.image_columns) > 1:
            images = [tuple(row[column] for column in self.image_columns) for row in rows_of_images]
        batch = {"pixel_values": self.processor(images, return_tensors="pt")["pixel_values"], "labels": rows["labels"]}
        if self.mask_column is not None:
            masks = [as_mask(row[self.mask_column], row[first]) for row in rows_of_images]
            processed = self.processor(masks, do_convert_rgb=True, do_normalize=False, return_tensors="pt")
            batch["mask"] = processed["pixel_values"][:, 0]
        return {name: list(values) for name, values in batch.items()}


class Collator:
    """
    Makes a batch of transformed rows.

    Args:
        num_classes (`int`): number of classes.
        multi_label (`bool`): whether labels are lists, which become rows of zeros and ones.
        mixup ([`~timm.data.Mixup`], *optional*): mixes images with one label each.

    Returns of a call:
        `dict[str, torch.Tensor]`: "pixel_values" (batch, channels, height, width) or (batch, branches, channels,
        height, width); "labels": classes (batch), or (batch, classes) zeros and ones if `multi_label`, probabilities
        if images are mixed; and "mask" (batch, height, width) if the rows have masks.
    """

    def __init__(self, num_classes: int, multi_label: bool = False, mixup: Mixup | None = None):
        self.num_classes, self.multi_label, self.mixup = num_classes, multi_label, mixup

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixel_values = default_collate([row["pixel_values"] for row in rows])  # in a worker, into shared memory
        if self.multi_label:
            labels = torch.zeros(len(rows), self.num_classes)
            for row, ones in zip(rows, labels):
                ones[row["labels"]] = 1
        else:
            labels = torch.tensor([row["labels"] for row in rows])
        if self.mixup is not None and len(rows) % 2 == 0:
            # timm knows four dimensions: the branches are channels meanwhile
            mixed, labels = self.mixup(pixel_values.flatten(1, -3), labels)
            pixel_values = mixed.view_as(pixel_values)
        elif self.mixup is not None:  # timm mixes pairs: a last batch of odd length stays as it is
            labels = nn.functional.one_hot(labels, self.num_classes).to(pixel_values.dtype)
        batch = {"pixel_values": pixel_values, "labels": labels}
        if "mask" in rows[0]:
            batch["mask"] = torch.stack([row["mask"] for row in rows])
        return batch


class RepeatedAugmentationSampler(torch.utils.data.Sampler):
    """
    Draws each image several times, to be augmented in different ways (Hoffer et al. 2020, as in DeiT, section 6).

    The draws are those of the `RASampler` in DeiT's and the authors' scripts: the images are put in random order, each
    is repeated in a row, and the replicas take turns to draw one. An epoch has as many draws as there are images, so
    it shows only some of them, and an incomplete last step is dropped.

    A replica is a process or, with gradient accumulation, one of the batches that a process accumulates. The batches
    are therefore the same on any number of devices. A single replica draws all copies of an image.

    The scripts also round the number of images down to a multiple of 256. This matters only if the images of a step
    are not a multiple of 256: they may then drop one more step.

    Args:
        num_images (`int`): number of images.
        repeats (`int`): how often an image is drawn.
        batch_size (`int`): images per replica and step.
        num_replicas (`int`): processes times accumulated batches.
        seed (`int`): the order in epoch `e` is that of the seed `seed + e`.

    Raises:
        `ValueError`: if there are fewer images than in a step.
    """

    def __init__(self, num_images: int, repeats: int, batch_size: int, num_replicas: int, seed: int):
        if num_images < batch_size * num_replicas:
            raise ValueError(
                f"A step takes {batch_size * num_replicas} images ({num_replicas} batches of {batch_size}), and there"
                f" are only {num_images}: reduce the batch size or the gradient accumulation."
            )
        self.num_images, self.repeats, self.seed = num_images, repeats, seed
        self.batch_size, self.num_replicas = batch_size, num_replicas
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        images_per_step = self.batch_size * self.num_replicas
        return self.num_images // images_per_step * images_per_step

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        draws = torch.randperm(self.num_images, generator=generator).repeat_interleave(self.repeats)[: len(self)]
        # (steps, images, replicas) -> (steps, replicas, images): processes take batches in turns
        batches = draws.view(-1, self.batch_size, self.num_replicas).transpose(1, 2)
        return iter(batches.flatten().tolist())


def output_size(processor: Any) -> tuple[int, int]:
    """The height and width in pixels of an image processor's output."""
    size = processor.crop_size if processor.do_center_crop else processor.size
    if not size.get("height") or not size.get("width"):
        raise ValueError(f"The image processor must make images of one size, got {size}: set `do_center_crop`.")
    return size["height"], size["width"]


__all__ = [
    "AugmentationArguments",
    "Collator",
    "EvaluationTransform",
    "RepeatedAugmentationSampler",
    "TrainingTransform",
]
