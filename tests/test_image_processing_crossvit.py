"""The image processors against timm's evaluation transform, the preprocessing of the published checkpoints."""

import json

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config
from transformers.image_utils import IMAGENET_DEFAULT_STD

from crossvit.image_processing_crossvit import CrossViTImageProcessor
from crossvit.image_processing_pil_crossvit import CrossViTImageProcessorPil


BACKENDS = [CrossViTImageProcessor, CrossViTImageProcessorPil]
OPTIONS = {
    240: {},
    408: {"size": {"shortest_edge": 408}, "crop_size": {"height": 408, "width": 408}},
}
# Margins of every remainder modulo 4, whose halves are rounded to even, both orientations, extreme aspect ratios
SIZES = [(301, 275), (275, 302), (303, 275), (304, 275), (274, 277), (1, 1), (61, 3), (3, 40), (487, 391)]


def picture(height: int, width: int, kind: str = "noise") -> PIL.Image.Image:
    """Noise in bytes, in black and white (the filter overshoots most), or a photo-like picture: waves with grain."""
    rng = np.random.default_rng(height * 10_000 + width)
    pixels = rng.integers(0, 256, (height, width, 3))
    if kind == "black and white":
        pixels = pixels // 128 * 255
    elif kind == "photo":
        row, column, channel = np.mgrid[:height, :width, :3]
        pixels = (127 + 120 * np.sin(column / 17 + row / 29 + channel) + pixels / 10).clip(0, 255)
    return PIL.Image.fromarray(pixels.astype(np.uint8))


def timm_transform(checkpoint: str):
    return create_transform(**resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(checkpoint).to_dict()))


TRANSFORMS = {240: timm_transform("crossvit_15_240.in1k"), 408: timm_transform("crossvit_15_dagger_408.in1k")}


def pixel_values(processor, images) -> torch.Tensor:
    return processor(images, return_tensors="pt").pixel_values


def assert_equals_timm(processor, image: PIL.Image.Image, transform):
    values, expected = pixel_values(processor, image)[0], transform(image.convert("RGB"))
    assert values.shape == expected.shape and values.dtype == expected.dtype == torch.float32
    if processor.backend == "pil":
        assert torch.equal(values, expected)
        return
    # torchvision's bicubic filter rounds differently from PIL's. Measured over all pictures of this file, with and
    # without AVX2: 2 bytes at most (0.0350 normalized), 0.00019 normalized on average. A crop that is off by a pixel
    # moves the noise of 301x275 by 253 bytes at most and by 1.03 normalized on average.
    difference = (values - expected).abs()
    assert (difference * torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1) * 255).max() < 2.01
    assert difference.mean() < 0.0004


# Against timm


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("side", "kind"), [(240, "noise"), (240, "black and white"), (240, "photo"), (408, "black and white")]
)
def test_equals_timm(side, kind, backend):
    processor = backend(**OPTIONS[side])
    for height, width in SIZES:
        assert_equals_timm(processor, picture(height, width, kind), TRANSFORMS[side])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "transparent P"])
def test_modes_equal_timm(mode, backend):
    """The stock processors blend alpha onto white by default, timm's loader drops it."""
    image = picture(301, 275, "photo")
    if mode in ("LA", "RGBA"):
        image.putalpha(picture(301, 275).convert("L"))
    image = image.convert(mode.removeprefix("transparent "))
    if mode == "transparent P":
        image.info["transparency"] = image.getpixel((0, 0))
    assert_equals_timm(backend(), image, TRANSFORMS[240])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shortest_edge", [117, 118, 119, 239])
def test_padding_equals_timm(shortest_edge, backend):
    """A crop larger than the resized image is padded with zeros, in one direction or in both."""
    transform = create_transform((3, 240, 240), interpolation="bicubic", crop_pct=240 / shortest_edge)
    assert transform.transforms[0].size == shortest_edge
    processor = backend(size={"shortest_edge": shortest_edge})
    for height, width in [(130, 121), (121, 133), (99, 401)]:
        assert_equals_timm(processor, picture(height, width), transform)


# Inputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_arrays_equal_their_images(mode, backend):
    processor, image = backend(), picture(301, 275)
    if mode == "RGBA":
        image.putalpha(128)
    image = image.convert(mode)
    last = np.atleast_3d(np.array(image))
    first = last.transpose(2, 0, 1).copy()
    expected = pixel_values(processor, image)
    for array in (last, first, torch.from_numpy(last), torch.from_numpy(first)):
        assert torch.equal(pixel_values(processor, array), expected)
    assert torch.equal(processor(last, input_data_format="channels_last", return_tensors="pt").pixel_values, expected)
    assert torch.equal(pixel_values(processor, np.stack([first, first])), expected.repeat(2, 1, 1, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"do_resize": False},
        {"do_resize": False, "do_center_crop": False},
        {"size": {"height": 40, "width": 90}, "do_center_crop": False},
        {"size": {"shortest_edge": 40, "longest_edge": 50}, "do_center_crop": False},
        {"size": {"max_height": 40, "max_width": 50}, "do_center_crop": False},
    ],
    ids=["no resizing", "no resizing or cropping", "height and width", "both edges", "maxima"],
)
def test_images_equal_their_arrays_with_other_sizes(options, backend):
    """The PIL backend resizes images before they are arrays, and arrays as the base class does."""
    image, processor = picture(61, 83), backend(**options)
    values = pixel_values(processor, image)
    assert torch.equal(values, pixel_values(processor, np.array(image)))
    assert processor.do_center_crop or values.shape[2:] != (240, 240)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["rgb.jpg", "cmyk.jpg", "palette.gif", "rgb.bmp", "rgb.tiff"])
def test_paths_equal_their_images(name, backend, tmp_path):
    """The stock torchvision backend decodes by itself: no BMP, no TIFF."""
    image, path = picture(301, 275, "photo"), str(tmp_path / name)
    image.convert({"cmyk.jpg": "CMYK", "palette.gif": "P"}.get(name, image.mode)).save(path)
    with PIL.Image.open(path) as opened:
        expected = pixel_values(backend(), opened)
    assert torch.equal(pixel_values(backend(), [path, path]), expected.repeat(2, 1, 1, 1))


SIXTEEN_BITS = PIL.Image.fromarray(np.asarray(picture(99, 88).convert("L")).astype(np.uint16) * 200)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (SIXTEEN_BITS, "mode I(;16)?"),  # Pillow 10 opens files as I
        (SIXTEEN_BITS.convert("I"), "mode I"),
        (SIXTEEN_BITS.convert("F"), "mode F"),
        (np.asarray(SIXTEEN_BITS), "uint16"),
        (torch.ones(3, 9, 8, dtype=torch.int64), "int64"),
        (np.ones((9, 8, 3), bool), "bool"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_depths_than_8_bits_are_refused(backend, image, kind, tmp_path):
    """PIL would clip them to white, and the other types are ambiguous."""
    inputs = [image, [image, image], [(picture(99, 88), image)]]
    if image is SIXTEEN_BITS:
        image.save(tmp_path / "image.png")
        inputs.append(str(tmp_path / "image.png"))
    for value in inputs:
        with pytest.raises(ValueError, match=f"{kind} instead of 8 bits per channel. Scale the values"):
            backend()(value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_floats_out_of_range_are_refused(backend):
    image = np.asarray(picture(99, 88), np.float32)
    for wrong in (image - 0.1, image + 1, image * np.nan, torch.from_numpy(image + 1)):
        for do_rescale in (True, False):
            with pytest.raises(
                ValueError, match=r"must be in \[0, 1\] with `do_rescale=False`, or in \[0, 255\], got"
            ):
                backend()(wrong, do_rescale=do_rescale)
    with pytest.raises(ValueError, match=r"in \[0, 1\], which `do_rescale` would divide by 255"):
        backend()(image / 255)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_floats_equal_bytes(backend, dtype):
    processor, image = backend(), np.array(picture(301, 275, "photo"))
    expected = pixel_values(processor, image)
    for floats, do_rescale in ((image.astype(dtype), True), (image.astype(dtype) / dtype(255), False)):
        for array in (floats, floats.transpose(2, 0, 1), torch.from_numpy(floats)):
            values = processor(array, do_rescale=do_rescale, return_tensors="pt").pixel_values
            # Bytes are rounded and clipped after resizing, between rows and columns too: 0.058 at most
            torch.testing.assert_close(values.float(), expected, atol=0.08, rtol=0)


@pytest.mark.parametrize("channels", [2, 5])
@pytest.mark.parametrize("kind", ["bytes", "floats"])
def test_any_number_of_channels(channels, kind):
    rng = np.random.default_rng(0)
    image = np.stack([np.asarray(picture(99, 88, "photo").convert("L")) // (index + 1) for index in range(channels)])
    mean, std = rng.uniform(0.2, 0.5, (2, channels)).round(2).tolist()
    options = {"image_mean": mean, "image_std": std, "do_convert_rgb": False, "do_rescale": kind == "bytes"}
    image = image if kind == "bytes" else np.float32(image / 255)
    values = {}
    for backend in BACKENDS:
        processor = backend(**options)
        values[backend] = pixel_values(processor, image)
        for other in (image.transpose(1, 2, 0), torch.from_numpy(image)):
            assert torch.equal(pixel_values(processor, other), values[backend])
        for index in range(channels):  # each as a gray image
            gray = backend(**{**options, "image_mean": [mean[index]], "image_std": [std[index]]})
            assert torch.equal(pixel_values(gray, image[index : index + 1])[0, 0], values[backend][0, index])
        with pytest.raises(ValueError, match=f"must have {channels} channels, first or last, got an array of shape"):
            processor(np.zeros((9, 8, 3), np.uint8))
        with pytest.raises(ValueError, match=rf"have {channels} values, and an image has 1 channels"):
            processor(np.zeros((9, 8, 1), np.uint8), input_data_format="channels_last")
    # The two filters differ by 2 of 255 at most for bytes, and by 3e-6 for floats
    torch.testing.assert_close(*values.values(), atol=0.05 if kind == "bytes" else 1e-4, rtol=0)


@pytest.mark.parametrize("row", [tuple, list])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tuples_of_images_equal_each_image(backend, row, tmp_path):
    processor, path = backend(), str(tmp_path / "image.png")
    picture(303, 275).save(path)
    with_alpha = picture(303, 275)
    with_alpha.putalpha(128)
    depth = picture(301, 275, "photo").convert("L")
    images = [picture(301, 275), depth, with_alpha, path, np.array(picture(280, 290)), torch.zeros(3, 280, 290).byte()]
    rows = [row(images[start : start + 2]) for start in (0, 2, 4)]
    expected = torch.cat([pixel_values(processor, image) for image in images])

    assert torch.equal(pixel_values(processor, images), expected)
    expected = expected.unflatten(0, (3, 2))
    assert torch.equal(pixel_values(processor, rows), expected)
    arrays = processor(rows, return_tensors="np").pixel_values
    assert isinstance(arrays, np.ndarray) and np.array_equal(arrays, expected)
    each_row = processor(rows).pixel_values  # not a batch, but the arrays of each row are stacked as those of an image
    assert isinstance(each_row, list) and type(each_row[0]) is type(processor(depth).pixel_values[0])
    assert len(each_row) == 3 and all(np.array_equal(*pair) for pair in zip(each_row, expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(301, 275), (150, 137), (400, 900), (602, 300)])
def test_later_images_take_the_geometry_of_the_first(backend, size):
    """The same scene in other sizes and aspect ratios: what lies on top of each other stays so."""
    scene = picture(301, 420, "photo").resize((210, 150)).resize((420, 301))  # without the grain
    later = scene.resize(size[::-1], PIL.Image.Resampling.BICUBIC)
    for kind in (lambda image: image, np.array):
        first, second = pixel_values(backend(), [(scene, kind(later))])[0]
        # Interpolating twice costs up to 0.018. Cropped by itself, the later image differs by 1.6
        assert (first - second).abs().mean() < 0.03


IMAGE = PIL.Image.new("RGB", (9, 8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "images, message",
    [
        ([(IMAGE, IMAGE), (IMAGE,)], "one image for each branch, got a tuple of 2, a tuple of 1"),
        ([(IMAGE, IMAGE), IMAGE], "got a tuple of 2, a single image"),
        ([IMAGE, (IMAGE, IMAGE)], "got a single image, a tuple of 2"),
        ([IMAGE, ()], "got a single image, a tuple of 0"),
        ([(), ()], "got a tuple of 0"),
        ([[(IMAGE, IMAGE)]], "single images, got batches"),
        ([(np.zeros((2, 3, 9, 8), np.uint8), np.zeros((2, 3, 9, 8), np.uint8))], "single images, got batches"),
    ],
)
def test_other_tuples_are_refused(backend, images, message):
    with pytest.raises(ValueError, match=message):
        backend()(images)


@pytest.mark.parametrize("backend", BACKENDS)
def test_number_of_channels_is_named(backend):
    with pytest.raises(
        ValueError, match=r"1 \(gray\), 3 \(RGB\) or 4 \(RGBA\) channels, first or last, got .* \(8, 9, 5\)"
    ):
        backend()(np.zeros((8, 9, 5), np.uint8), input_data_format="channels_last")


@pytest.mark.parametrize("side", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_save_load_keeps_pixel_values(backend, side, tmp_path):
    processor = backend(**OPTIONS[side])
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved == {
        "image_processor_type": "CrossViTImageProcessor",  # of both: Transformers' convention
        "size": {"shortest_edge": {240: 274, 408: 408}[side]},
        "crop_size": {"height": side, "width": side},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        **dict.fromkeys(["do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"], True),
    }
    image = picture(301, 275)
    for loader in BACKENDS:
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is loader and json.loads(loaded.to_json_string()) == saved
    loaded = backend.from_pretrained(tmp_path)
    assert torch.equal(pixel_values(loaded, image), pixel_values(processor, image))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": {"shortest_edge": 41, "longest_edge": 60}},
        {"size": {"height": 30, "width": 28}},
        {"do_resize": False},
    ],
)
@pytest.mark.parametrize("size", [(50, 44), (44, 50), (7, 290), (333, 91), (64, 64), (1, 3)])
def test_the_size_after_resizing_is_known(backend, options, size):
    processor = backend(do_center_crop=False, **options)
    assert processor.get_resized_size(*size) == pixel_values(processor, picture(*size)).shape[-2:]
    assert processor.get_crop_box(*size) == (0, 0, *size)
