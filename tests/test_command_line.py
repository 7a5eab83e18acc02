"""What the commands of examples/ share: which image files they read, and that wrong options cost little time."""

import os
import subprocess
import sys
from pathlib import Path

import PIL.EpsImagePlugin
import PIL.Image
import pytest
from benchmarks import benchmark
from command_line import find_images, open_image
from examples_in_process import EXAMPLES
from image_folders import image_bytes, write_files, write_images

from crossvit.training.data import ImageSource, LabelledImages
from crossvit.training.errors import CommandError
from crossvit.training.images import IMAGE_FORMATS, decode_image


@pytest.fixture
def no_ghostscript(monkeypatch):
    def fail(*args, **kwargs):
        pytest.fail("Ghostscript is started")

    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", fail)


def test_images_are_upright_and_rgb(tmp_path):
    image = PIL.Image.new("LA", (8, 4), (100, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # taken with a turned camera
    image.save(tmp_path / "turned.png", exif=exif)
    opened = open_image(tmp_path / "turned.png")
    assert opened.mode == "RGB" and opened.size == (4, 8) and opened.getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize("format", IMAGE_FORMATS)
def test_formats_of_photos_are_read(tmp_path, format):
    PIL.Image.init()
    if format not in PIL.Image.SAVE:
        pytest.skip("a version of Pillow without this format")
    suffix = next(suffix for suffix, name in PIL.Image.registered_extensions().items() if name == format)
    PIL.Image.new("RGB", (8, 4), (200, 100, 50)).save(tmp_path / f"photo{suffix.upper()}", format)
    assert find_images(tmp_path) == [tmp_path / f"photo{suffix.upper()}"]
    assert open_image(tmp_path / f"photo{suffix.upper()}").size == (8, 4)


@pytest.mark.parametrize("name", ["poster.eps", "poster.png"])
def test_ghostscript_is_not_started(no_ghostscript, tmp_path, name):
    write_files(write_images(tmp_path), {f"ant/{name}": image_bytes(format="EPS")})
    with pytest.raises(CommandError, match=rf"{name}: not an image of the formats JPEG, PNG, .*GIF, PPM$"):
        open_image(tmp_path / "ant" / name)
    with pytest.raises(CommandError, match=rf"1 of 13 images of 'train' cannot be read: .*{name}: not an image of"):
        LabelledImages.load(ImageSource(str(tmp_path))).check_images()


@pytest.mark.parametrize("streaming", [False, True])
def test_ghostscript_is_not_started_where_images_are_not_checked(no_ghostscript, tmp_path, streaming):
    write_files(tmp_path, {f"{name}/poster.png": image_bytes(format="EPS") for name in ("ant", "bee")})
    rows = LabelledImages.load(ImageSource(str(tmp_path), streaming=streaming)).splits["train"]
    with pytest.raises(CommandError, match=r"poster\.png: not an image of"):
        decode_image(next(iter(rows))["image"])


def test_unreadable_images_are_named(tmp_path):
    content = image_bytes(size=(64, 64), color=(1, 2, 3), format="JPEG")
    write_files(tmp_path, {"cut.jpg": content[: len(content) // 2], "text.jpg": b"text", "empty.jpg": b""})
    for name in ("cut.jpg", "text.jpg", "empty.jpg", "missing.jpg"):
        with pytest.raises(CommandError, match=name):
            open_image(tmp_path / name)


def test_too_many_pixels_are_refused(monkeypatch, tmp_path):
    write_files(tmp_path, {"large.png": image_bytes(size=(64, 64))})
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    with pytest.raises(CommandError, match=r"large\.png: .*decompression bomb"):
        open_image(tmp_path / "large.png")


def test_images_of_a_folder(tmp_path):
    names = ("b.JPG", "a/c.png", "a/b/d.webp", ".hidden/e.png", "a/._c.png", "poster.eps", "notes.txt")
    write_files(tmp_path, dict.fromkeys(names, b""))
    assert find_images(tmp_path) == [tmp_path / "a" / "b" / "d.webp", tmp_path / "a" / "c.png", tmp_path / "b.JPG"]


@pytest.mark.parametrize(
    "script",
    [
        *(
            EXAMPLES / f"{name}.py"
            for name in ("app", "classify", "explain", "export", "quickstart", "retrieve", "segment")
        ),
        Path(benchmark.__file__),
    ],
    ids=lambda script: script.stem,
)
def test_options_are_parsed_before_torch_is_imported(script):
    code = """
import runpy, sys
sys.modules["torch"] = None  # so that importing it fails
sys.argv[0] = sys.argv.pop(1)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    process = subprocess.run(
        [sys.executable, "-c", code, script, "--typo"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2 and f"usage: {script.name}" in process.stderr, process.stderr
