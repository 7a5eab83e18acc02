"""A model and its image processor change to another image size together."""

import PIL.Image
import pytest
import torch

from crossvit import CrossViTForImageClassification, CrossViTImageProcessor
from crossvit.training.image_sizes import make_image_processor, set_image_size


@pytest.fixture
def model(small_config):
    return CrossViTForImageClassification(small_config).eval()


@pytest.fixture
def processor(small_config):
    return make_image_processor(small_config)


# Branches of 36 and 32 pixels, in patches of 6 and 8
@pytest.mark.parametrize(
    "height, width, sizes",
    [
        (36, 36, ((36, 36), (32, 32))),
        (72, 72, ((72, 72), (64, 64))),
        (90, 54, ((90, 54), (80, 48))),
        (40, 62, ((42, 60), (32, 56))),
    ],
)
def test_models_and_processors_agree_and_are_saved(model, processor, tmp_path, height, width, sizes):
    set_image_size(model, processor, height, width)
    assert tuple(map(tuple, model.config.image_sizes)) == sizes
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = CrossViTForImageClassification.from_pretrained(tmp_path)
    images = [PIL.Image.new("RGB", size) for size in [(100, 60), (30, 90), (5, 5)]]
    pixel_values = CrossViTImageProcessor.from_pretrained(tmp_path)(images, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (3, 3, *sizes[0])
    assert loaded(pixel_values).logits.shape == (3, 5)


@pytest.mark.parametrize("edge", [36, 41, 55, 99])
def test_the_native_size_changes_nothing(model, edge):
    processor = CrossViTImageProcessor(size={"shortest_edge": edge}, crop_size={"height": 36, "width": 36})
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    set_image_size(model, processor, 36, 36)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert dict(processor.size) == {"shortest_edge": edge} and processor.crop_size["height"] == 36


@pytest.mark.parametrize(
    "edge, crop, new, expected", [(274, 240, 480, 548), (408, 408, 240, 240), (256, 224, 384, 438)]
)
def test_square_crops_keep_their_share_of_an_image(small_config, edge, crop, new, expected):
    small_config.image_size, small_config.patch_size = crop, (8, 8)
    model = CrossViTForImageClassification(small_config)
    processor = CrossViTImageProcessor(size={"shortest_edge": edge}, crop_size={"height": crop, "width": crop})
    set_image_size(model, processor, new, new)
    assert dict(processor.size) == {"shortest_edge": expected}
    assert dict(processor.crop_size) == {"height": new, "width": new}


def test_rectangles_show_all_of_an_image(model, processor):
    set_image_size(model, processor, 36, 72)
    image = PIL.Image.new("RGB", (50, 50))
    for box in [(0, 0, 50, 5), (0, 45, 50, 50), (0, 0, 5, 50), (45, 0, 50, 50)]:
        image.paste((255, 255, 255), box)
    (pixels,) = processor(image, return_tensors="pt")["pixel_values"]
    edges = torch.cat([pixels[0, 0], pixels[0, -1], pixels[0, :, 0], pixels[0, :, -1]])
    assert pixels.shape == (3, 36, 72) and (edges > 2).all() and pixels[0, 18, 36] < -2


@pytest.mark.parametrize("do_center_crop", [True, False])
def test_resizing_without_a_crop_stays_without(model, do_center_crop):
    """As timm's `crop_mode="squash"`."""
    processor = CrossViTImageProcessor(
        size={"height": 36, "width": 36}, crop_size={"height": 36, "width": 36}, do_center_crop=do_center_crop
    )
    set_image_size(model, processor, 72, 72)
    assert dict(processor.size) == dict(processor.crop_size) == {"height": 72, "width": 72}


@pytest.mark.parametrize("size, edge", [((240, 240), 274), ((224, 224), 256), ((384, 384), 438), ((40, 80), None)])
def test_processors_for_models_without_one(small_config, size, edge):
    small_config.patch_size = (8, 8)
    small_config.image_size = (size, size)
    processor = make_image_processor(small_config)
    # As in the paper and in timm: floor(240 / 0.875)
    assert dict(processor.size) == ({"shortest_edge": edge} if edge else {"height": size[0], "width": size[1]})
    pixel_values = processor(PIL.Image.new("RGB", (300, 200)), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, *size)


def test_a_size_that_is_not_positive_is_refused(model, processor):
    before = dict(processor.size), dict(processor.crop_size), model.config.image_sizes
    with pytest.raises(ValueError, match="must be positive, got 0x36"):
        set_image_size(model, processor, 0, 36)
    assert (dict(processor.size), dict(processor.crop_size), model.config.image_sizes) == before
