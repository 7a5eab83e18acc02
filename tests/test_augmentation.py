"""Training images are a function of the seed, the draw and the image; evaluation images are the processor's."""

import pickle
import random

import numpy as np
import PIL.Image
import pytest
import torch
from image_folders import encoded, image_bytes
from torchvision.transforms import v2

from crossvit import CrossViTImageProcessor
from crossvit.training.augmentation import AugmentationArguments, ImageCollator
from crossvit.training.errors import ImageDatasetError
from crossvit.training.image_files import read_image


NOTHING = {"crop_scale": [1.0, 1.0], "horizontal_flip": 0.0}
EVERYTHING = {"randaugment_layers": 2, "random_erasing": 0.5}


def noise(seed: int, size: tuple[int, int] = (20, 20)) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BILINEAR)


def row(number: int = 0, draw: tuple[int, int] | None = (0, 0), labels=1, size: tuple[int, int] = (20, 20)) -> dict:
    example = {"image": {"bytes": encoded(noise(number, size)), "path": f"{number}.png"}, "labels": labels}
    return example if draw is None else {**example, "draw": draw}


def processor_of(height: int = 16, width: int = 16) -> CrossViTImageProcessor:
    return CrossViTImageProcessor(
        size={"shortest_edge": 18}, crop_size={"height": height, "width": width}, image_mean=[0.1, 0.4, 0.7]
    )


def collator(height: int = 16, width: int = 16, seed: int = 0, multi_label: bool = False, **options) -> ImageCollator:
    return ImageCollator(processor_of(height, width), 3, multi_label, AugmentationArguments(**options), seed)


@pytest.mark.parametrize(
    "options",
    [
        {"crop_scale": [0.5]},
        {"crop_scale": [0.2, 0.5, 1.0]},
        {"crop_scale": [0.0, 1.0]},
        {"crop_scale": [0.9, 0.5]},
        {"crop_scale": [0.5, 1.1]},
        {"crop_scale": [float("nan"), 1.0]},
        {"horizontal_flip": -0.1},
        {"horizontal_flip": 1.1},
        {"random_erasing": 2.0},
        {"random_erasing": float("nan")},
        {"randaugment_magnitude": 11},
        {"randaugment_magnitude": -1},
        {"augmentation_repeats": 0},
        {"randaugment_layers": -1},
        {"mixup_alpha": -0.1},
        {"cutmix_alpha": -1.0},
    ],
    ids=str,
)
def test_wrong_options_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}`"):
        AugmentationArguments(**options)


@pytest.mark.parametrize("height, width", [(16, 16), (12, 24), (30, 10)])
def test_without_augmentation_images_are_resized_and_normalized(height, width):
    (batch,) = collator(height, width, **NOTHING)([row(3)])["pixel_values"]
    expected = v2.functional.resize(noise(3), [height, width], v2.InterpolationMode.BICUBIC)
    expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255
    mean, std = torch.tensor([[0.1, 0.4, 0.7], [0.229, 0.224, 0.225]])[..., None, None]
    torch.testing.assert_close(batch, (expected - mean) / std)
    plain = ImageCollator(processor_of(height, width), 3)([row(3)])["pixel_values"]
    torch.testing.assert_close(plain[0], batch, rtol=0, atol=0)


def test_images_keep_their_sides_without_augmentation():
    # Black to the left, white to the right, a stripe at either end
    pixels = np.zeros((8, 64, 3), np.uint8)
    pixels[:, -8:] = 255
    row = {"image": {"bytes": encoded(PIL.Image.fromarray(pixels)), "path": None}, "labels": 0, "draw": (0, 0)}
    (image,) = ImageCollator(CrossViTImageProcessor(crop_size={"height": 16, "width": 16}), 3)([row])["pixel_values"]
    assert image[0, 8, -1] > 2


def test_a_processor_of_no_fixed_size_is_refused():
    processor = CrossViTImageProcessor(size={"shortest_edge": 20}, do_center_crop=False)
    with pytest.raises(ValueError, match="must make images of one size"):
        ImageCollator(processor, 3)


@pytest.mark.parametrize("size", [(20, 20), (1, 1), (3, 200), (200, 3), (61, 47)])
def test_all_images_get_the_size_of_the_model(size):
    batch = collator(12, 24, **EVERYTHING)([row(number, size=size) for number in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 12, 24) and batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].isfinite().all() and batch["labels"].tolist() == [1, 1, 1]


def test_sizes_of_processors_that_cut_nothing_out():
    processor = CrossViTImageProcessor(size={"height": 12, "width": 24}, do_center_crop=False)
    assert ImageCollator(processor, 3)([row()])["pixel_values"].shape == (1, 3, 12, 24)


def test_flips_mirror_images():
    flipped = collator(20, 20, crop_scale=[1.0, 1.0], horizontal_flip=1.0)([row(5)])["pixel_values"]
    plain = collator(20, 20, **NOTHING)([row(5)])["pixel_values"]
    torch.testing.assert_close(flipped, plain.flip(-1), rtol=0, atol=0)
    half = [collator(20, 20, crop_scale=[1.0, 1.0])([row(5, (0, repeat))])["pixel_values"] for repeat in range(40)]
    assert 5 < sum(torch.equal(image, flipped) for image in half) < 35


def test_crops_are_parts_of_the_image():
    # The value of a pixel tells its column
    pixels = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None], (200, 200, 3))
    example = {"image": {"bytes": encoded(PIL.Image.fromarray(np.ascontiguousarray(pixels))), "path": None}}
    crop = collator(200, 200, crop_scale=[0.25, 0.25], horizontal_flip=0.0)
    widths = []
    for repeat in range(20):
        (image,) = crop([{**example, "labels": 0, "draw": (0, repeat)}])["pixel_values"]
        columns = (image[0] * 0.229 + 0.1) * 255
        widths.append((columns.max() - columns.min()).item())
    # Of a quarter of the area, with sides of 3:4 to 4:3
    assert 80 < min(widths) < max(widths) < 120


def test_erased_rectangles_become_noise():
    example = {"image": {"bytes": image_bytes(size=(16, 16)), "path": None}, "labels": 0, "draw": (0, 0)}
    (plain,) = collator(**NOTHING)([example])["pixel_values"]
    (erased,) = collator(random_erasing=1.0, **NOTHING)([example])["pixel_values"]
    changed = erased[:, (erased != plain).any(dim=0)]
    assert 0.02 * 256 < changed.shape[1] < 0.35 * 256 and changed.std() > 0.5


def test_randaugment_alters_images_half_the_time():
    plain = collator(**NOTHING)([row(0)])["pixel_values"]
    for layers, least, most in [(0, 0, 0), (1, 10, 42), (3, 40, 60)]:
        augment = collator(randaugment_layers=layers, **NOTHING)
        images = [augment([row(0, (0, repeat))])["pixel_values"] for repeat in range(60)]
        assert least <= sum(not torch.equal(image, plain) for image in images) <= most


def test_augmentation_depends_on_the_draw_and_the_image_alone():
    augment = collator(**EVERYTHING)
    rows = [row(number, (2, repeat)) for repeat in range(2) for number in range(4)]
    images = augment(rows)["pixel_values"]
    backwards = augment(rows[::-1])["pixel_values"].flip(0)
    alone = torch.cat([collator(**EVERYTHING)([example])["pixel_values"] for example in rows])
    torch.testing.assert_close(backwards, images, rtol=0, atol=0)
    torch.testing.assert_close(alone, images, rtol=0, atol=0)


def test_draws_and_seeds_differ():
    variations = [
        collator(seed=seed, **EVERYTHING)([row(0, draw)])["pixel_values"]
        for seed, draw in [(0, (0, 0)), (0, (1, 0)), (0, (0, 1)), (0, (2, 0)), (1, (0, 0)), (1, (1, 0))]
    ]
    for first, image in enumerate(variations):
        assert not any(torch.equal(image, other) for other in variations[first + 1 :])
    # Images of a draw are not all altered alike: as large a part cut out of the same place
    gradient = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None], (100, 100, 3)).copy()
    crops = []
    for blue in range(4):
        gradient[..., 2] = blue
        example = {"image": {"bytes": encoded(PIL.Image.fromarray(gradient)), "path": None}, "labels": 0}
        crops.append(collator(horizontal_flip=0.0)([{**example, "draw": (0, 0)}])["pixel_values"][0, 0, 0, 0])
    assert len({crop.item() for crop in crops}) > 1


def test_files_and_rows_are_altered_alike(tmp_path):
    content = encoded(noise(0))
    (tmp_path / "image.png").write_bytes(content)
    batches = [
        collator(**EVERYTHING)([{"image": image, "labels": 0, "draw": (0, 0)}])["pixel_values"]
        for image in ({"bytes": content, "path": "a"}, {"bytes": None, "path": str(tmp_path / "image.png")})
    ]
    torch.testing.assert_close(*batches, rtol=0, atol=0)


def test_random_numbers_of_others_go_on():
    augment = collator(mixup_alpha=0.8, cutmix_alpha=1.0, **EVERYTHING)

    def numbers():
        return random.random(), np.random.rand(), torch.rand(()).item()

    def seed(value):
        random.seed(value), np.random.seed(value), torch.manual_seed(value)

    seed(0)
    expected = [numbers() for _ in range(3)]
    seed(0)
    found = []
    for draw in range(3):
        found.append(numbers())
        augment([row(0, (draw, 0)), row(1, (draw, 0))])
    assert found == expected
    # Nor does a batch depend on them
    batches = []
    for value in (1, 2):
        seed(value)
        batches.append(augment([row(0), row(1)])["pixel_values"])
    torch.testing.assert_close(*batches, rtol=0, atol=0)


def test_random_numbers_go_on_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(ImageDatasetError):
        collator()([{"image": {"bytes": b"x", "path": "broken.png"}, "labels": 0, "draw": (0, 0)}])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mixing", [v2.MixUp, v2.CutMix])
def test_mixing_is_that_of_torchvision(mixing):
    rows = [row(number, labels=number % 3) for number in range(6)]
    name = f"{mixing.__name__.lower()}_alpha"
    batch = collator(**{name: 0.8}, **NOTHING)(rows)
    plain = collator(**NOTHING)(rows)
    assert plain["labels"].tolist() == [0, 1, 2, 0, 1, 2]
    assert batch["labels"].shape == (6, 3) and not torch.equal(batch["pixel_values"], plain["pixel_values"])
    torch.testing.assert_close(batch["labels"].sum(dim=1), torch.ones(6))
    # Of the image before there is as much as of its label
    share = batch["labels"][0, 0]
    torch.testing.assert_close(batch["labels"][0], torch.tensor([share, 0, 1 - share]))
    mixed, others = batch["pixel_values"], plain["pixel_values"].roll(1, 0)
    if mixing is v2.MixUp:
        expected = share * plain["pixel_values"] + (1 - share) * others
        torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)
    else:
        kept = (mixed == plain["pixel_values"]).all(dim=1)
        assert ((mixed == others).all(dim=1) | kept).all()
        torch.testing.assert_close(kept[0].float().mean(), share)


@pytest.mark.parametrize("mixing", [v2.MixUp, v2.CutMix])
def test_mixing_under_the_same_seed(mixing):
    rows = [row(number, labels=number % 3) for number in range(4)]
    plain = collator(**NOTHING)(rows)
    arguments = AugmentationArguments(**{f"{mixing.__name__.lower()}_alpha": 0.8})
    expected = mixing(alpha=0.8, num_classes=3)
    torch.manual_seed(5)
    found = arguments.mixing(3)(plain["pixel_values"], plain["labels"])
    torch.manual_seed(5)
    torch.multinomial(torch.ones(1), 1)  # which of both
    for tensor, other in zip(found, expected(plain["pixel_values"], plain["labels"])):
        torch.testing.assert_close(tensor, other, rtol=0, atol=0)


def test_mixing_takes_turns():
    rows = [row(number, labels=number) for number in range(3)]
    kinds = set()
    for epoch in range(12):
        rows = [{**example, "draw": (epoch, 0)} for example in rows]
        mixed = collator(mixup_alpha=1.0, cutmix_alpha=1.0, **NOTHING)(rows)
        plain = collator(**NOTHING)(rows)
        again = collator(mixup_alpha=1.0, cutmix_alpha=1.0, **NOTHING)(rows)
        assert all(torch.equal(mixed[key], again[key]) for key in mixed)
        pixels, others = plain["pixel_values"], plain["pixel_values"].roll(1, 0)
        kinds.add(((mixed["pixel_values"] == pixels) | (mixed["pixel_values"] == others)).all().item())
    assert kinds == {True, False}
    assert AugmentationArguments().mixing(3) is None


def test_rows_of_several_labels():
    rows = [row(0, labels=[0, 2]), row(1, labels=[]), row(2, labels=[1])]
    for draw in (True, False):
        examples = rows if draw else [{key: example[key] for key in ("image", "labels")} for example in rows]
        labels = collator(multi_label=True)(examples)["labels"]
        assert labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]] and labels.dtype == torch.float32
    for name in ("mixup_alpha", "cutmix_alpha"):
        with pytest.raises(ValueError, match=name):
            collator(multi_label=True, **{name: 0.5})


@pytest.mark.parametrize("labels, multi_label", [(3, False), (-1, False), (None, False), ([0, 3], True), ([-1], True)])
@pytest.mark.parametrize("draw", [None, (0, 0)])
def test_labels_outside_the_range_are_named(labels, multi_label, draw):
    with pytest.raises(ImageDatasetError, match=r"^7\.png: label .* outside the range of 3 classes$"):
        collator(multi_label=multi_label)([row(0, draw, [] if multi_label else 0), row(7, draw, labels)])


@pytest.mark.parametrize("draw", [None, (0, 0)])
def test_damaged_images_are_named(draw):
    example = row(0, draw)
    example["image"]["bytes"] = example["image"]["bytes"][:200]
    with pytest.raises(ImageDatasetError, match=r"^0\.png: "):
        collator()([row(1, draw), example])


def test_evaluation_is_that_of_the_processor():
    rows = [row(number, None, labels=number, size=(30 + number, 20)) for number in range(3)]
    rows[2]["image"]["bytes"] = image_bytes((9, 99), (25, 40), mode="LA")
    batch = collator(mixup_alpha=1.0, **EVERYTHING)(rows)
    images = [read_image(example["image"]) for example in rows]
    expected = processor_of()(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected, rtol=0, atol=0)
    assert batch["labels"].tolist() == [0, 1, 2] and expected.shape == (3, 3, 16, 16)


def test_batches_that_are_passed_over_are_empty():
    assert collator()([None, None]) == {}


def test_collators_reach_workers():
    augment = collator(mixup_alpha=0.8, **EVERYTHING)
    copy = pickle.loads(pickle.dumps(augment))
    rows = [row(number) for number in range(4)]
    expected, found = augment(rows), copy(rows)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    loader = torch.utils.data.DataLoader(rows, 2, num_workers=1, collate_fn=augment, multiprocessing_context="fork")
    batches = list(loader)
    torch.testing.assert_close(batches[1]["pixel_values"], augment(rows[2:])["pixel_values"], rtol=0, atol=0)
