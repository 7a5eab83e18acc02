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
"""The image processors against timm's evaluation transform, the preprocessing of the published checkpoints."""

import json
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config
from torchvision.transforms import functional as F
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from crossvit.image_processing_crossvit import CrossViTImageProcessor
from crossvit.image_processing_pil_crossvit import CrossViTImageProcessorPil


BACKENDS = [CrossViTImageProcessor, CrossViTImageProcessorPil]
OPTIONS = {
    240: {},
    408: {"size": {"shortest_edge": 408}, "crop_size": {"height": 408, "width": 408}},
}
# Margins of every remainder modulo 4 (their halves are rounded to even), both orientations, extreme aspect ratios.
SIZES = [(301, 275), (275, 301), (302, 275), (303, 275), (304, 275), (274, 277), (1, 1), (3, 2), (1000, 3), (3, 200)]
SIZES += [tuple(size) for size in np.random.default_rng(0).integers(1, 500, (12, 2)).tolist()]


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


def timm_transform(side: int):
    return create_transform(**resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(CHECKPOINTS[side]).to_dict()))


CHECKPOINTS = {240: "crossvit_15_240.in1k", 408: "crossvit_15_dagger_408.in1k"}
TRANSFORMS = {side: timm_transform(side) for side in CHECKPOINTS}


def pixel_values(processor, images) -> torch.Tensor:
    return processor(images, return_tensors="pt").pixel_values


def byte_difference(values: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How far normalised pixels are apart in steps of the byte scale."""
    assert values.shape == expected.shape and values.dtype == expected.dtype == torch.float32
    return (values - expected).abs() * torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1) * 255


def assert_equals_timm(processor, image: PIL.Image.Image, transform) -> None:
    values, expected = pixel_values(processor, image)[0], transform(image.convert("RGB"))
    if processor.backend == "pil":
        assert torch.equal(values, expected)
    else:
        # torchvision's bicubic filter rounds differently from PIL's. Measured over all pictures of this file, with and
        # without AVX2: 2 bytes at most (0.0350 normalised), 0.00019 normalised on average. A crop one pixel beside
        # moves the noise of 301x275 by 253 bytes at most and by 1.03 normalised on average.
        assert byte_difference(values, expected).max() < 2.01
        assert (values - expected).abs().mean() < 0.0004


# --- against timm ---


def test_timm_has_two_preprocessings():
    """So the two checkpoints compared with here stand for all eleven."""
    configs = [
        resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        for name in timm.list_pretrained("crossvit*")
    ]
    assert len(configs) == 11
    assert {
        (*config["input_size"], config["crop_pct"], config["interpolation"], config["crop_mode"]) for config in configs
    } == {
        (3, 240, 240, 0.875, "bicubic", "center"),
        (3, 408, 408, 1.0, "bicubic", "center"),
    }
    assert {(config["mean"], config["std"]) for config in configs} == {
        (tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD))
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("side", "kind"), [(240, "noise"), (240, "black and white"), (240, "photo"), (408, "black and white")]
)
def test_equals_timm(side, kind, backend):
    processor = backend(**OPTIONS[side])
    for height, width in SIZES:
        assert_equals_timm(processor, picture(height, width, kind), TRANSFORMS[side])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
def test_modes_equal_timm(mode, backend):
    """Transformers 5.23 blends alpha onto white by default, timm's loader drops it."""
    image = picture(301, 275, "photo")
    if mode in ("LA", "RGBA"):
        image.putalpha(picture(301, 275).convert("L"))
    if mode == "I;16":
        image = PIL.Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 3)  # beyond a byte
    image = image.convert(mode)
    assert image.mode == mode
    assert_equals_timm(backend(), image, TRANSFORMS[240])


@pytest.mark.parametrize("backend", BACKENDS)
def test_transparent_palette_equals_timm(backend):
    image = picture(301, 275, "photo").convert("P")
    image.info["transparency"] = image.getpixel((0, 0))
    assert_equals_timm(backend(), image, TRANSFORMS[240])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shortest_edge", [117, 118, 119, 120, 239])
def test_padding_equals_timm(shortest_edge, backend):
    """A crop larger than the resized image is padded with zeros, in one direction or in both."""
    transform = create_transform((3, 240, 240), interpolation="bicubic", crop_pct=240 / shortest_edge)
    assert transform.transforms[0].size == shortest_edge
    processor = backend(size={"shortest_edge": shortest_edge})
    for height, width in [(130, 121), (121, 133), (400, 99), (99, 401)]:
        assert_equals_timm(processor, picture(height, width), transform)


@pytest.mark.parametrize("size", SIZES)
def test_torchvision_geometry_is_exact(size):
    """The resized sides are torchvision's, and without a filter (do_resize=False) only float32 rounding is left."""
    processor, image = CrossViTImageProcessor(), picture(*size)
    resized = processor.resize(F.pil_to_tensor(image), processor.size, processor.resample)
    assert resized.shape[-2:] == F.resize(image, 274).size[::-1]

    cropped = F.center_crop(image, 240)
    expected = F.normalize(F.to_tensor(cropped), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    values = processor(image, do_resize=False, return_tensors="pt").pixel_values[0]
    # Measured 2.4e-7: bytes are divided by 255 * std in one step.
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_byte_in_every_channel(backend):
    """Rescaling and normalising is exact in the PIL backend, not only after the filter's rounding."""
    image = PIL.Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2))
    options = {"do_resize": False, "do_center_crop": False}
    expected = F.normalize(F.to_tensor(image), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    values = pixel_values(backend(**options), image)[0]
    if backend is CrossViTImageProcessorPil:
        assert torch.equal(values, expected)
    else:
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)  # measured 2.4e-7

    bytes_themselves = pixel_values(backend(**options, rescale_factor=0.5, do_normalize=False), image)[0]
    assert torch.equal(bytes_themselves, F.pil_to_tensor(image) / 2)


# --- inputs ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_equal_their_images(backend):
    processor, image = backend(), picture(301, 275)
    last = np.array(image)
    first = last.transpose(2, 0, 1).copy()
    expected = pixel_values(processor, image)
    assert expected.shape == (1, 3, 240, 240) and expected.dtype == torch.float32
    for array in (last, first, torch.from_numpy(last), torch.from_numpy(first), [image], [first], [[image]]):
        assert torch.equal(pixel_values(processor, array), expected)
    for batch in (np.stack([first, first]), torch.from_numpy(np.stack([last, last])), [last, torch.from_numpy(first)]):
        assert torch.equal(pixel_values(processor, batch), expected.repeat(2, 1, 1, 1))
    numpy_values = processor(image, return_tensors="np").pixel_values
    assert isinstance(numpy_values, np.ndarray) and np.array_equal(numpy_values, expected.numpy())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_arrays_of_other_channels_equal_their_images(mode, backend):
    processor, image = backend(), picture(301, 275)
    image.putalpha(128)
    image = image.convert(mode)
    last = np.atleast_3d(np.array(image))
    expected = pixel_values(processor, image)
    for array in (last, last.transpose(2, 0, 1).copy(), torch.from_numpy(last)):
        assert torch.equal(pixel_values(processor, array), expected)
    assert torch.equal(processor(last, input_data_format="channels_last", return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_of_mixed_sizes_keeps_the_order(backend):
    processor = backend()
    images = [picture(*size) for size in [(301, 275), (33, 57), (301, 275), (57, 33)]]
    images[2] = PIL.ImageOps.invert(images[2])
    expected = torch.cat([pixel_values(processor, image) for image in images])
    assert torch.equal(pixel_values(processor, images), expected)


FILES = {
    "rgb.jpg": "RGB", "cmyk.jpg": "CMYK", "grey.png": "L", "alpha.png": "RGBA", "palette.gif": "P", "one.bmp": "1",
    "rgb.tiff": "RGB", "rgb.webp": "RGB", "sixteen.png": "I;16",
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "mode"), FILES.items())
def test_path_equals_its_image(name, mode, backend, tmp_path):
    """The stock torchvision backend of 5.23 decodes by itself: no BMP, no TIFF, and 16 bits without scaling."""
    image = picture(301, 275, "photo")
    if mode == "I;16":
        image = PIL.Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 3)
    path = str(tmp_path / name)
    image.convert(mode).save(path)
    with PIL.Image.open(path) as opened:
        assert opened.mode == mode
        expected = pixel_values(backend(), opened)
    assert torch.equal(pixel_values(backend(), path), expected)
    assert torch.equal(pixel_values(backend(), [path, path]), expected.repeat(2, 1, 1, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_path_is_turned_upright(backend, tmp_path):
    """As `load_image` and the pipelines do; an image that the caller has opened is taken as it is, as timm does."""
    image, path = picture(301, 275, "photo"), str(tmp_path / "turned.png")
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    image.save(path, exif=exif)
    with PIL.Image.open(path) as opened:
        assert torch.equal(pixel_values(backend(), path), pixel_values(backend(), PIL.ImageOps.exif_transpose(opened)))
        assert_equals_timm(backend(), opened, TRANSFORMS[240])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0, 124, 255])
def test_constant_image_stays_constant(value, backend):
    image = PIL.Image.new("RGB", (37, 23), (value,) * 3)
    values = pixel_values(backend(), image)[0]
    expected = (value / 255 - torch.tensor(IMAGENET_DEFAULT_MEAN)) / torch.tensor(IMAGENET_DEFAULT_STD)
    # Measured 2.4e-7 (one step); NaN and infinity fail, too.
    torch.testing.assert_close(values, expected.view(3, 1, 1).expand_as(values), rtol=0, atol=1e-6)


# --- errors ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (None, TypeError, "An image is a PIL image.*got None"),
        (3, TypeError, "An image is a PIL image.*got 3"),
        ([1, 2], TypeError, "An image is a PIL image.*got 1"),
        ([picture(9, 9), None], TypeError, "An image is a PIL image.*got None"),
        ("/no/such/file.png", ValueError, "a valid path to an image file.*Got /no/such/file.png"),
        (np.zeros(9, np.uint8), ValueError, r"\(channels, height, width\) or .* shape \(9,\)"),
        (np.zeros((8, 9), np.uint8), ValueError, r"\(channels, height, width\) or .* shape \(8, 9\)"),
        (torch.zeros(1, 1, 3, 8, 9), ValueError, r"\(channels, height, width\) or .* shape \(1, 1, 3, 8, 9\)"),
        (np.zeros((8, 9, 2), np.uint8), ValueError, r"1 \(grey\), 3 \(RGB\) or 4 .* shape \(8, 9, 2\)"),
        (torch.zeros(5, 8, 9), ValueError, r"1 \(grey\), 3 \(RGB\) or 4 .* shape \(5, 8, 9\)"),
        (PIL.Image.new("RGB", (0, 5)), ValueError, r"at least one pixel.*\(3, 5, 0\)"),
        (np.zeros((0, 5, 3), np.uint8), ValueError, r"at least one pixel.*\(3, 0, 5\)"),
    ],
)  # fmt: skip
def test_bad_image(images, error, message, backend):
    with pytest.raises(error, match=message):
        backend()(images, return_tensors="pt")


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_channels_with_a_given_format(backend):
    with pytest.raises(ValueError, match=r"1 \(grey\), 3 \(RGB\) or 4 .* shape \(3, 9, 5\)"):
        backend()(np.zeros((3, 9, 5), np.uint8), input_data_format="channels_last")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["text.png", "truncated.jpg", "truncated.png", "broken.png"])
def test_bad_file(name, backend, tmp_path):
    path = tmp_path / name
    if name == "text.png":
        path.write_text("not an image")
    else:
        picture(200, 200).save(path)
        content = path.read_bytes()
        # A broken chunk amid the pixels is a SyntaxError to PIL
        head, separator, tail = content.rpartition(b"IDAT")
        path.write_bytes(head + b"\xff" * len(separator) + tail if name == "broken.png" else content[:1500])
    with pytest.raises(OSError, match=f"Cannot read an image from '.*{name}'"):
        backend()([str(path)], return_tensors="pt")


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_options(backend):
    image = picture(9, 9)
    with pytest.raises(ValueError, match=r"`image_std` .* must not hold 0, got \(0\.2, 0\.0, 0\.2\)"):
        backend()(image, image_std=[0.2, 0.0, 0.2])
    with pytest.raises(ValueError, match=r"`crop_size` must give .* got {'shortest_edge': 240}"):
        backend()(image, crop_size={"shortest_edge": 240})
    backend()(image, image_std=[0.0] * 3, do_normalize=False, crop_size={"shortest_edge": 240}, do_center_crop=False)


# --- options and serialisation ---


class StockDefaults:
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 274}
    default_to_square = False
    crop_size = {"height": 240, "width": 240}
    do_resize = do_center_crop = do_rescale = do_normalize = do_convert_rgb = True


class StockImageProcessor(StockDefaults, TorchvisionBackend):
    pass


class StockImageProcessorPil(StockDefaults, PilBackend):
    pass


STOCK_PAIRS = [(CrossViTImageProcessor, StockImageProcessor), (CrossViTImageProcessorPil, StockImageProcessorPil)]


@pytest.mark.parametrize("pair", STOCK_PAIRS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_resize": False},
        {"do_center_crop": False},
        {"size": {"height": 250, "width": 260}, "resample": PILImageResampling.BILINEAR},
        {"size": {"shortest_edge": 250, "longest_edge": 300}},
        {"size": 250, "crop_size": 200},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_convert_rgb": False},
        {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "rescale_factor": 1 / 127.5},
        {"do_pad": True, "pad_size": {"height": 250, "width": 250}},
    ],
    ids=str,
)  # fmt: skip
def test_other_options_are_those_of_every_processor(options, pair):
    """Where margins are even, the rounding of the crop plays no part and the stock processor must give the same."""
    image = picture(320, 300)
    ours, stock = (processor()(image, return_tensors="pt", **options).pixel_values for processor in pair)
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("pair", STOCK_PAIRS)
def test_grey_stays_grey_without_rgb_conversion(pair):
    options = {"do_convert_rgb": False, "image_mean": [0.5], "image_std": [0.25]}
    ours, stock = (pixel_values(processor(**options), picture(320, 300).convert("L")) for processor in pair)
    assert ours.shape == (1, 1, 240, 240) and torch.equal(ours, stock)


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


# --- remote code ---


LOAD_WITHOUT_THE_PACKAGE = """
import sys

sys.modules["crossvit"] = None  # as if it were not installed
import numpy as np
from transformers import AutoImageProcessor

image = np.load("image.npy")
for saved in ("torchvision", "pil"):
    for backend in (None, "torchvision", "pil"):
        processor = AutoImageProcessor.from_pretrained(saved, trust_remote_code=True, backend=backend)
        assert type(processor).__module__.startswith("transformers_modules."), type(processor)
        print(saved, backend, type(processor).__name__, processor.crop_size.height)
        np.save(f"{saved}_{backend}.npy", processor(image, return_tensors="np").pixel_values)
        processor.save_pretrained(f"again_{saved}")  # the files travel on
    processor = AutoImageProcessor.from_pretrained(f"again_{saved}", trust_remote_code=True, backend="torchvision")
    print(saved, "again", type(processor).__name__, processor.crop_size.height)
"""


def test_remote_code_loads_both_backends_without_the_package(tmp_path, monkeypatch):
    processors = {"torchvision": CrossViTImageProcessor(), "pil": CrossViTImageProcessorPil()}
    for name, processor in processors.items():
        monkeypatch.setattr(type(processor), "_auto_class", None)  # undone after the test
        processor.register_for_auto_class()
        processor.save_pretrained(tmp_path / name)
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            "preprocessor_config.json",
            "image_processing_crossvit.py",
            "image_processing_pil_crossvit.py",
        }
    image = np.array(picture(301, 275))
    np.save(tmp_path / "image.npy", image)
    child = subprocess.run(
        [sys.executable, "-I", "-c", LOAD_WITHOUT_THE_PACKAGE],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines() == [
        f"{saved} {line}"
        for saved in processors
        for line in (
            "None CrossViTImageProcessor 240",
            "torchvision CrossViTImageProcessor 240",
            "pil CrossViTImageProcessorPil 240",
            "again CrossViTImageProcessor 240",
        )
    ]
    for saved in processors:
        for name, processor in processors.items():
            values = np.load(tmp_path / f"{saved}_{name}.npy")
            assert np.array_equal(values, processor(image, return_tensors="np").pixel_values)


def test_remote_code_of_a_subclass_names_the_subclass(tmp_path, monkeypatch):
    class OwnImageProcessor(CrossViTImageProcessor):
        pass

    OwnImageProcessor.register_for_auto_class()
    OwnImageProcessor().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["auto_map"] == {"AutoImageProcessor": f"{__name__.split('.')[-1]}.OwnImageProcessor"}
