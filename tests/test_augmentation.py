"""Batches are what the recipe says, in the size of the model, and evaluation images are the processor's."""

import itertools
import pickle
from typing import Any

import numpy as np
import PIL.Image
import pytest
import timm.data
import torch
from accelerate.data_loader import BatchSamplerShard
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
        {"color_jitter": -0.1},
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
    transform = TrainingTransform(AugmentationArguments(**PAPER), processor_of())
    crop, flip, policy, _, normalize, erasing = timm.data.create_transform(
        16, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", re_prob=0.25,
        re_mode="pixel", re_count=1, mean=(0.1, 0.4, 0.7), std=(0.229, 0.224, 0.225),
    ).transforms  # fmt: skip
    found_crop, found_flip = transform.geometric.transforms
    for name in ("size", "scale", "ratio", "interpolation"):
        expected = getattr(crop, name)
        assert type(expected)(getattr(found_crop, name)) == expected
    assert found_flip.p == flip.p == 0.5
    _, found_policy, *_, found_normalize, found_erasing = transform.photometric.transforms
    assert str(found_policy.transforms[0]) == str(policy)
    assert [operation.hparams for operation in found_policy.transforms[0].ops] == [op.hparams for op in policy.ops]
    assert found_normalize.mean == pytest.approx((255 * normalize.mean).tolist())
    assert found_normalize.std == pytest.approx((255 * normalize.std).tolist())
    assert vars(found_erasing) == vars(erasing) and erasing.probability == 0.25


def test_augmentation_at_full_strength():
    """timm's posterization keeps no bits then, which newer releases of Pillow refuse."""
    transform = TrainingTransform(AugmentationArguments(auto_augment="rand-m10-n30-inc1"), processor_of())
    for _ in range(5):  # 150 operations, one in 15 of them this one
        transform({"image": [noise()], "labels": [0]})


def test_whole_images_are_resized_and_normalized():
    args = AugmentationArguments(crop_scale=[1.0, 1.0], horizontal_flip=0.0)
    image = noise((30, 20))
    rows = {"image": [image], "labels": [0]}
    (found,) = TrainingTransform(args, processor_of(12, 24))(rows)["pixel_values"]
    expected = v2.functional.pil_to_tensor(image.resize((24, 12), PIL.Image.Resampling.BICUBIC)) / 255
    mean, std = torch.tensor([[0.1, 0.4, 0.7], [0.229, 0.224, 0.225]])[..., None, None]
    # torchvision rounds differently: by 1 of 255
    torch.testing.assert_close(found * std + mean, expected, atol=1.01 / 255, rtol=0)


def test_an_empty_policy_changes_nothing():
    options: dict[str, Any] = {"crop_scale": [1.0, 1.0], "horizontal_flip": 0.0}
    rows = {"image": [noise((30, 20))], "labels": [0]}
    plain, augmented = (
        TrainingTransform(AugmentationArguments(**options, auto_augment=policy), processor_of())(rows)["pixel_values"]
        for policy in (None, "rand-m9-n0")
    )
    assert torch.equal(plain[0], augmented[0])


def ramp(size: tuple[int, int] = (64, 64)) -> PIL.Image.Image:
    """Red is the column of a pixel, green its row, from 0 to 255."""
    rows, columns = np.mgrid[0:255:64j, 0:255:64j]
    pixels = np.stack([columns, rows, np.zeros((64, 64))], axis=-1).astype(np.uint8)
    return PIL.Image.fromarray(pixels).resize(size)


def unnormalized(pixel_values: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor([[0.1, 0.4, 0.7], [0.229, 0.224, 0.225]])[..., None, None]
    return pixel_values * std + mean


def test_all_images_of_a_row_and_its_mask_are_moved_alike():
    args = AugmentationArguments(crop_scale=[0.2, 0.6])
    transform = TrainingTransform(args, processor_of(24, 24), ["photo", "scan"], "mask")
    # The second image is smaller, and the mask is the column of a pixel
    mask = ramp((128, 128)).getchannel("R")
    images = {"photo": ramp(), "scan": ramp((32, 32)), "mask": mask}
    rows = transform({**{column: [image] * 20 for column, image in images.items()}, "labels": [0] * 20})
    batch = Collator(2)([dict(zip(rows, row)) for row in zip(*rows.values())])
    assert batch["pixel_values"].shape == (20, 2, 3, 24, 24) and batch["mask"].shape == (20, 24, 24)
    photos, scans = unnormalized(batch["pixel_values"]).unbind(dim=1)
    # One pixel of the ramp is 0.016, of the small one 0.032; by 0.015 and 0.009 they differed
    torch.testing.assert_close(scans, photos, atol=0.03, rtol=0)
    torch.testing.assert_close(batch["mask"], photos[:, 0], atol=0.02, rtol=0)
    mirrored = photos[:, 0, 12, 0] > photos[:, 0, 12, -1]
    assert 0 < mirrored.sum() < 20 and photos[:, 1, 0, 12].unique().numel() > 10


def test_colors_and_erased_rectangles_are_those_of_each_image():
    images = [PIL.Image.new("RGB", (24, 24), (100, 150, 200))] * 8
    columns, rows = ["photo", "scan"], {"photo": images, "scan": images, "mask": images, "labels": [0] * 8}

    def augmented(**options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = TrainingTransform(AugmentationArguments(**options), processor_of(), columns, "mask")(rows)
        return *torch.stack(batch["pixel_values"]).unbind(dim=1), torch.stack(batch["mask"])

    photos, scans, masks = augmented()
    assert torch.equal(photos, scans)
    for options in ({"color_jitter": 0.5}, {"random_erasing": 1.0}):
        photos, scans, others = augmented(**options)
        assert torch.equal(others, masks) and photos.ne(scans).flatten(1).any(dim=1).all()


def test_random_policies_are_refused_with_several_images_or_masks():
    args = AugmentationArguments(auto_augment="rand-m9-mstd0.5-inc1")
    for columns in ((["photo", "scan"],), (["photo"], "mask")):
        with pytest.raises(ValueError, match=r"`auto_augment` rand-m9-mstd0\.5-inc1 moves each image in its own way"):
            TrainingTransform(args, processor_of(), *columns)
    with pytest.raises(ValueError, match="`color_jitter` must be 0 or more, and 0 with `auto_augment`"):
        AugmentationArguments(auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4)


@pytest.mark.parametrize("columns", [["photo"], ["photo", "scan"]], ids=len)
def test_images_and_masks_are_evaluated_by_the_processor(columns):
    photos, scans = [noise(), noise((30, 40))], [noise((25, 20)), noise((40, 30))]
    # A mask of the left quarter of each photo, of another size and shape: the processor crops as of the photo
    masks = [PIL.Image.new("1", (60, 40)), PIL.Image.new("1", (60, 60))]
    for mask in masks:
        mask.paste(1, (0, 0, 15, 60))
    rows = {"photo": photos, "scan": scans, "mask": masks}
    found = EvaluationTransform(processor_of(), columns, "mask")({**rows, "labels": [1, 2]})
    expected = processor_of()(photos if columns == ["photo"] else list(zip(photos, scans)), return_tensors="pt")
    assert torch.equal(torch.stack(found["pixel_values"]), expected["pixel_values"]) and found["labels"] == [1, 2]
    for mask in found["mask"]:
        assert mask.shape == (16, 16) and mask[:, :2].eq(1).all() and mask[:, 6:].eq(0).all()
        assert mask.min() == 0 and mask.max() == 1


def scene(width: int, height: int, pixels: int = 1200) -> PIL.Image.Image:
    """Bright stripes in both directions, of other widths, in an image of any size: a shift shows."""
    row, column = (np.linspace(0, 1, pixels)[:, None], np.linspace(0, 1, pixels)[None])
    waves = [np.sin(23 * row**2 + 0 * column), np.sin(31 * column**2 + 0 * row), np.sin(17 * row * column)]
    image = PIL.Image.fromarray(np.uint8(127 + 120 * np.stack(waves, axis=-1)))
    return image.resize((width, height), PIL.Image.Resampling.LANCZOS)


@pytest.mark.parametrize("crop_scale", [None, [1.0, 1.0], [0.2, 1.0]], ids=["evaluation", "whole", "random crop"])
def test_images_of_other_shapes_and_masks_keep_their_places(crop_scale):
    """The same scene in the first image, in one of another aspect ratio, and in the mask."""
    torch.manual_seed(0)
    processor = CrossViTImageProcessor(size={"shortest_edge": 110}, crop_size={"height": 96, "width": 96})
    columns = (["photo", "scan"], "mask")
    transform = EvaluationTransform(processor, *columns)
    if crop_scale is not None:
        transform = TrainingTransform(AugmentationArguments(crop_scale=crop_scale), processor, *columns)
    mask = scene(500, 200).split()[0].point(lambda value: 255 * (value > 127))
    rows = {"photo": [scene(320, 240)] * 8, "scan": [scene(300, 900)] * 8, "mask": [mask] * 8, "labels": [0] * 8}
    batch = transform(rows)
    for (photo, scan), mask in zip(batch["pixel_values"], batch["mask"]):
        # Interpolating twice costs up to 0.0034. A shift by a pixel costs 0.10, cropping the scan by itself 1.5
        assert (photo - scan).abs().mean() < 0.01
        stripes = photo[0] * processor.image_std[0] + processor.image_mean[0] > 0.5
        # The mask is resized without interpolation, so up to 5.3 % of the pixels are on the other side of an edge
        assert (stripes != (mask > 0.5)).float().mean() < 0.08


def test_a_processor_of_no_fixed_size_is_refused():
    processor = CrossViTImageProcessor(size={"shortest_edge": 20}, do_center_crop=False)
    with pytest.raises(ValueError, match="must make images of one size"):
        TrainingTransform(AugmentationArguments(), processor)


def test_labels_of_several_classes_become_rows():
    rows = [{"pixel_values": torch.zeros(3, 2, 2), "labels": labels} for labels in ([0, 2], [], [1])]
    assert Collator(3, multi_label=True)(rows)["labels"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 3, 8, 8)], ids=["one image", "an image for each branch"])
@pytest.mark.parametrize("name", ["mixup_alpha", "cutmix_alpha"])
def test_images_are_mixed_as_their_labels(name, shape):
    """Every pixel of an image is its label, so that the mean of a mixed one is that of its labels."""
    collator = Collator(4, mixup=AugmentationArguments(**{name: 1.0}).mixup(4))
    rows = [{"pixel_values": torch.full(shape, float(label)), "labels": label} for label in range(4)]
    mixed = 0
    for _ in range(8):
        batch = collator(rows)
        pixel_values, labels = batch["pixel_values"], batch["labels"]
        assert pixel_values.shape == (4, *shape)
        torch.testing.assert_close(labels.sum(dim=1), torch.ones(4))
        torch.testing.assert_close(pixel_values.flatten(1).mean(dim=1), labels @ torch.arange(4.0))
        # All images of a row are mixed alike, in a rectangle of pixels, not of channels
        channels = pixel_values.flatten(1, -3)
        assert torch.equal(channels, channels[:, :1].expand_as(channels))
        mixed += (labels > 0).sum() > 4
    assert mixed >= 4
    # timm mixes pairs
    odd = collator(rows[:3])
    assert odd["labels"].tolist() == torch.eye(4)[:3].tolist() and odd["pixel_values"][2].eq(2).all()


def test_images_are_not_mixed_by_default():
    assert AugmentationArguments().mixup(4) is None


def ra_sampler(num_images: int, repeats: int, num_replicas: int, rank: int, seed: int) -> list[int]:
    """What the `RASampler` of the authors' script draws, but for their multiple of 256 and the fixed 3 repeats."""
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed)).tolist()
    repeated = [image for image in order for _ in range(repeats)]
    return repeated[rank::num_replicas][: num_images // num_replicas]


@pytest.mark.parametrize(
    "num_images, repeats, batch_size, processes, accumulated",
    [(24, 3, 4, 2, 1), (25, 3, 4, 1, 3), (100, 3, 2, 4, 3), (50, 2, 8, 1, 1), (50, 1, 3, 2, 2), (70, 3, 1, 5, 2)],
)
def test_processes_draw_what_as_many_processes_as_batches_draw(
    num_images, repeats, batch_size, processes, accumulated
):
    replicas = processes * accumulated
    sampler = RepeatedAugmentationSampler(num_images, repeats, batch_size, replicas, seed=5)
    batches = torch.utils.data.BatchSampler(sampler, batch_size, drop_last=False)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        drawn = [list(BatchSamplerShard(batches, processes, process)) for process in range(processes)]
        for process, batch in itertools.product(range(processes), range(accumulated)):
            expected = ra_sampler(num_images, repeats, replicas, process + batch * processes, seed=5 + epoch)
            steps = len(expected) // batch_size  # as `drop_last` of their data loader
            found = list(itertools.chain(*drawn[process][batch::accumulated]))
            assert found == expected[: steps * batch_size]
            assert len(drawn[process]) == steps * accumulated and steps == num_images // (batch_size * replicas)
        assert len(sampler) == len(list(sampler)) == steps * batch_size * replicas
        epochs.append(list(sampler))
    assert epochs[0] != epochs[1] != epochs[2]


def test_fewer_images_than_a_step_are_refused():
    with pytest.raises(ValueError, match=r"A step takes 24 images \(3 batches of 8\), and there are only 23"):
        RepeatedAugmentationSampler(23, 1, 8, 3, seed=0)
    assert len(RepeatedAugmentationSampler(24, 1, 8, 3, seed=0)) == 24
