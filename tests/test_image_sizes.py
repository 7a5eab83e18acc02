"""A model and its image processor change to another image size together."""

import PIL.Image
import pytest
import torch

from crossvit import CrossViTForImageClassification, CrossViTImageProcessor
from crossvit.training.image_sizes import make_image_processor, set_image_size


# Branches of 36 and 32 pixels, in patches of 6 and 8
SIZES = [
    (36, 36, ((36, 36), (32, 32))),
    (72, 72, ((72, 72), (64, 64))),
    (54, 54, ((54, 54), (48, 48))),
    (18, 18, ((18, 18), (16, 16))),
    (36, 72, ((36, 72), (32, 64))),
    (90, 54, ((90, 54), (80, 48))),
    # 40 x 62 pixels are 6.7 x 10.3 patches of 6, and at 32 : 36 of that 4.4 x 6.9 patches of 8
    (40, 62, ((42, 60), (32, 56))),
]


@pytest.fixture
def model(small_config):
    return CrossViTForImageClassification(small_config).eval()


@pytest.fixture
def processor(small_config):
    return make_image_processor(small_config)


@pytest.mark.parametrize("height, width, sizes", SIZES)
def test_models_and_processors_agree(model, processor, height, width, sizes):
    set_image_size(model, processor, height, width)
    assert tuple(map(tuple, model.config.image_sizes)) == sizes
    images = [PIL.Image.new("RGB", size) for size in [(100, 60), (30, 90), (5, 5)]]
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (3, 3, *sizes[0])
    assert model(pixel_values).logits.shape == (3, 5)
    for embeddings, size in zip(model.branch_embeddings, sizes):
        rows, columns = size[0] // embeddings.patch_size, size[1] // embeddings.patch_size
        assert embeddings.position_embeddings.shape[1] == 1 + rows * columns


def test_new_sizes_survive_saving(model, processor, tmp_path):
    set_image_size(model, processor, 72, 54)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image = PIL.Image.effect_noise((80, 80), 90)
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    loaded = CrossViTForImageClassification.from_pretrained(tmp_path).eval()
    again = CrossViTImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(again, pixel_values, rtol=0, atol=0)
    torch.testing.assert_close(loaded(again).logits, model(pixel_values).logits)


def test_the_native_size_changes_nothing(model, processor):
    before = model(torch.ones(1, 3, 36, 36)).logits, dict(processor.size), dict(processor.crop_size)
    set_image_size(model, processor, 36, 36)
    torch.testing.assert_close(model(torch.ones(1, 3, 36, 36)).logits, before[0], rtol=0, atol=0)
    assert (dict(processor.size), dict(processor.crop_size)) == before[1:]


def test_the_native_size_changes_no_edge(model):
    changed = []
    for edge in range(36, 100):
        processor = CrossViTImageProcessor(size={"shortest_edge": edge}, crop_size={"height": 36, "width": 36})
        set_image_size(model, processor, 36, 36)
        if processor.size["shortest_edge"] != edge:
            changed.append((edge, processor.size["shortest_edge"]))
    assert changed == []


@pytest.mark.parametrize(
    "edge, crop, new, expected", [(274, 240, 480, 548), (408, 408, 240, 240), (256, 224, 384, 438)]
)
def test_square_images_are_of_the_same_part(small_config, edge, crop, new, expected):
    small_config.image_size, small_config.patch_size = crop, (8, 8)
    model = CrossViTForImageClassification(small_config)
    processor = CrossViTImageProcessor(size={"shortest_edge": edge}, crop_size={"height": crop, "width": crop})
    set_image_size(model, processor, new, new)
    assert dict(processor.size) == {"shortest_edge": expected}
    assert dict(processor.crop_size) == {"height": new, "width": new}


def test_processors_that_cut_nothing_out_go_on_so(model):
    processor = CrossViTImageProcessor(size={"height": 36, "width": 36}, do_center_crop=False)
    set_image_size(model, processor, 72, 72)
    image = PIL.Image.new("RGB", (72, 72))
    image.paste((255, 255, 255), (0, 0, 72, 1))
    (pixels,) = processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, 72, 72) and (pixels[0, 0] > 2).all()


def test_rectangles_show_all_of_an_image(model, processor):
    set_image_size(model, processor, 36, 72)
    image = PIL.Image.new("RGB", (50, 50))
    for box in [(0, 0, 50, 5), (0, 45, 50, 50), (0, 0, 5, 50), (45, 0, 50, 50)]:
        image.paste((255, 255, 255), box)
    (pixels,) = processor(image, return_tensors="pt")["pixel_values"]
    edges = torch.cat([pixels[0, 0], pixels[0, -1], pixels[0, :, 0], pixels[0, :, -1]])
    assert pixels.shape == (3, 36, 72) and (edges > 2).all() and pixels[0, 18, 36] < -2


@pytest.mark.parametrize("size, edge", [((240, 240), 274), ((224, 224), 256), ((384, 384), 438), ((40, 80), None)])
def test_processors_for_models_without_one(small_config, size, edge):
    small_config.patch_size = (8, 8)
    small_config.image_size = (size, size)
    processor = make_image_processor(small_config, image_mean=[0.5, 0.5, 0.5])
    assert dict(processor.crop_size) == {"height": size[0], "width": size[1]}
    assert list(processor.image_mean) == [0.5, 0.5, 0.5] and processor.do_resize and processor.do_center_crop
    # As in the paper and in timm: floor(240 / 0.875)
    assert dict(processor.size) == ({"shortest_edge": edge} if edge else {"height": size[0], "width": size[1]})
    pixel_values = processor(PIL.Image.new("RGB", (300, 200)), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, *size)


@pytest.mark.parametrize("size", [(0, 36), (-6, 36)])
def test_sizes_that_are_none(model, processor, size):
    before = dict(processor.size), dict(processor.crop_size), model.config.image_sizes
    with pytest.raises(ValueError):
        set_image_size(model, processor, *size)
    assert (dict(processor.size), dict(processor.crop_size), model.config.image_sizes) == before
