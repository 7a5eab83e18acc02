"""Batches are what the recipe says, in the size of the model, and evaluation images are the processor's."""

import pickle
from collections import Counter

import numpy as np
import PIL.Image
import pytest
import timm.data
import torch
from torchvision.transforms import v2

from crossvit import CrossViTImageProcessor
from crossvit.training.augmentation import (
    AugmentationArguments,
    Collator,
    EvaluationTransform,
    RepeatedAugmentationSampler,
    TrainingTransform,
)


PAPER = {"crop_scale": [0.08, 1.0], "auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25}


def noise(size: tuple[int, int] = (20, 20)) -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def processor_of(height: int = 16, width: int = 16) -> CrossViTImageProcessor:
    return CrossViTImageProcessor(
        size={"shortest_edge": 18}, crop_size={"height": height, "width": width}, image_mean=[0.1, 0.4, 0.7]
    )


@pytest.mark.parametrize(
    "options",
    [
        {"crop_scale": [0.5]},
        {"crop_scale": [0.9, 0.5]},
        {"crop_scale": [0.5, 1.1]},
        {"horizontal_flip": -0.1},
        {"random_erasing": float("nan")},
        {"augmentation_repeats": 0},
    ],
    ids=str,
)
def test_wrong_options_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}`"):
        AugmentationArguments(**options)


@pytest.mark.parametrize("options", [{}, PAPER, {"crop_scale": [1.0, 1.0]}], ids=["fine-tuning", "paper", "whole"])
@pytest.mark.parametrize("size", [(20, 20), (1, 1), (3, 200), (61, 47)], ids=str)
def test_all_images_get_the_size_of_the_model(options, size):
    transform = pickle.loads(pickle.dumps(TrainingTransform(AugmentationArguments(**options), processor_of(12, 24))))
    rows = transform({"image": [noise(size)] * 4, "labels": [0, 1, 2, 0]})
    batch = Collator(3)([dict(zip(rows, row)) for row in zip(*rows.values())])
    assert batch["pixel_values"].shape == (4, 3, 12, 24) and batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].isfinite().all() and batch["labels"].tolist() == [0, 1, 2, 0]


def test_the_transform_of_the_paper_is_timms():
    """That of DeiT's training, of which CrossViT's took its augmentation."""
    transform = TrainingTransform(AugmentationArguments(**PAPER), processor_of()).finish
    expected = timm.data.create_transform(
        16, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", re_prob=0.25,
        re_mode="pixel", re_count=1, mean=(0.1, 0.4, 0.7), std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    assert [str(step) for step in transform.transforms] == [str(step) for step in expected.transforms]
    assert transform.transforms[-1].probability == 0.25 and transform.transforms[-1].rand_color is False


def test_augmentation_at_full_strength():
    """timm's posterization keeps no bits then, which newer releases of Pillow refuse."""
    transform = TrainingTransform(AugmentationArguments(auto_augment="rand-m10-n30-inc1"), processor_of())
    for _ in range(5):  # 150 operations, one in 15 of them this one
        transform({"image": [noise()], "labels": [0]})


def test_whole_images_are_resized_and_normalized():
    args = AugmentationArguments(crop_scale=[1.0, 1.0], horizontal_flip=0.0)
    (found,) = TrainingTransform(args, processor_of(12, 24))({"image": [noise()], "labels": [0]})["pixel_values"]
    expected = v2.functional.pil_to_tensor(noise().resize((24, 12), PIL.Image.Resampling.BICUBIC)) / 255
    mean, std = torch.tensor([[0.1, 0.4, 0.7], [0.229, 0.224, 0.225]])[..., None, None]
    torch.testing.assert_close(found, (expected - mean) / std)


def test_evaluation_is_that_of_the_processor():
    images = [noise(), noise((30, 40))]
    found = EvaluationTransform(processor_of())({"image": images, "labels": [1, 2]})
    expected = processor_of()(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.stack(found["pixel_values"]), expected) and found["labels"] == [1, 2]


def test_a_processor_of_no_fixed_size_is_refused():
    processor = CrossViTImageProcessor(size={"shortest_edge": 20}, do_center_crop=False)
    with pytest.raises(ValueError, match="must make images of one size"):
        TrainingTransform(AugmentationArguments(), processor)


def test_labels_of_several_classes_become_rows():
    rows = [{"pixel_values": torch.zeros(3, 2, 2), "labels": labels} for labels in ([0, 2], [], [1])]
    assert Collator(3, multi_label=True)(rows)["labels"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("name", ["mixup_alpha", "cutmix_alpha"])
def test_images_are_mixed_as_their_labels(name):
    """Each image has one value: the mean of a mixed one says how much of which image it has."""
    args = AugmentationArguments(**{name: 1.0})
    collator = Collator(4, mixup=args.mixup(4))
    rows = [{"pixel_values": torch.full((3, 8, 8), float(label)), "labels": label} for label in range(4)]
    mixed = 0
    for _ in range(8):
        batch = collator(rows)
        torch.testing.assert_close(batch["labels"].sum(dim=1), torch.ones(4))
        expected = batch["labels"] @ torch.arange(4.0)
        torch.testing.assert_close(batch["pixel_values"].mean(dim=(1, 2, 3)), expected)
        mixed += (batch["labels"] > 0).sum() > 4
    assert mixed >= 4
    # timm mixes pairs
    odd = collator(rows[:3])
    assert odd["labels"].tolist() == torch.eye(4)[:3].tolist() and odd["pixel_values"][2].eq(2).all()
    assert AugmentationArguments().mixup(4) is None


@pytest.mark.parametrize("length, repeats, batch_size", [(24, 3, 4), (25, 3, 4), (10, 2, 16)])
def test_repeated_images_are_in_different_batches(length, repeats, batch_size):
    sampler = RepeatedAugmentationSampler(length, repeats, batch_size, seed=0)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert len(epochs[-1]) == len(sampler) == length and list(sampler) == epochs[-1]
        if length > batch_size:
            batches = [epochs[-1][start : start + batch_size] for start in range(0, length, batch_size)]
            assert all(len(set(batch)) == len(batch) for batch in batches)
            counts = Counter(epochs[-1])
            assert sum(count == repeats for count in counts.values()) >= length // (repeats * batch_size) * batch_size
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(RepeatedAugmentationSampler(length, repeats, batch_size, seed=1)) != epochs[0]
