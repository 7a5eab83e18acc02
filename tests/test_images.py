"""Image files are found, and decoded as `datasets` does it, but only formats of photos; errors name the file."""

import io
import os
import zipfile

import datasets
import fsspec
import numpy as np
import PIL.EpsImagePlugin
import PIL.features
import PIL.Image
import pytest
from common.data_sources import ImageSource
from common.errors import CommandError
from common.images import IMAGE_FORMATS, decode_image, find_images, open_image
from common.labelled_images import LabelledImages
from image_folders import encoded, image_bytes, write_files, write_images


def photo(mode: str = "RGB", size: tuple[int, int] = (21, 13)) -> PIL.Image.Image:
    """A smooth image, whose corners differ."""
    rows, columns = np.mgrid[0 : 255 : size[1] * 1j, 0 : 255 : size[0] * 1j]
    pixels = np.stack([columns, rows, 255 - columns], axis=-1).astype(np.uint8)
    image = PIL.Image.fromarray(pixels)
    if mode in ("LA", "RGBA"):
        image.putalpha(PIL.Image.fromarray(rows.astype(np.uint8)))
    return image.convert(mode)


def rotated(orientation: int, format: str) -> bytes:
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = orientation
    return encoded(photo(), format, exif=exif)


def palette_with_transparency() -> bytes:
    return encoded(photo("P"), transparency=3)


def animated() -> bytes:
    return encoded(photo("P"), "GIF", save_all=True, append_images=[photo("P").rotate(180)])


FILES = {
    **{f"JPEG {mode}": encoded(photo(mode), "JPEG") for mode in ("RGB", "L", "CMYK")},
    **{f"PNG {mode}": encoded(photo(mode)) for mode in ("RGB", "RGBA", "L", "LA", "1", "P")},
    **{f"JPEG, orientation {number}": rotated(number, "JPEG") for number in range(1, 9)},
    **{f"{format}, orientation 6": rotated(6, format) for format in ("PNG", "WEBP")},
    "PNG P, transparent": palette_with_transparency(),
    "WebP RGBA": encoded(photo("RGBA"), "WEBP", lossless=True),
    "GIF animated": animated(),
    **{format: encoded(photo(), format) for format in ("BMP", "TIFF", "PPM")},
}
if PIL.features.check("avif"):
    FILES |= {"AVIF": encoded(photo(), "AVIF"), "AVIF, orientation 6": rotated(6, "AVIF")}


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_datasets(tmp_path, name):
    (tmp_path / "photo").write_bytes(FILES[name])
    expected = datasets.Image(mode="RGB").decode_example({"bytes": FILES[name], "path": None})
    assert expected.size == ((13, 21) if name[-1] in "5678" else (21, 13))
    for row in ({"bytes": FILES[name], "path": None}, {"bytes": None, "path": str(tmp_path / "photo")}):
        found = decode_image(row)
        assert found.mode == "RGB" and np.array_equal(found, expected)
    assert np.array_equal(open_image(tmp_path / "photo"), expected)
    assert np.array_equal(open_image(io.BytesIO(FILES[name])), expected)


def test_images_may_lie_in_archives_and_other_file_systems(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("ant/0.png", encoded(photo()))
    fsspec.filesystem("memory").pipe("/photos/0.png", encoded(photo()))
    for path in (f"zip://ant/0.png::{tmp_path}/photos.zip", "memory://photos/0.png"):
        assert np.array_equal(decode_image({"bytes": None, "path": path}), photo())


@pytest.mark.parametrize(
    "content, message",
    [
        (b"text", "not an image of the formats JPEG, PNG, "),
        (b"", "not an image of the formats JPEG, PNG, "),
        (image_bytes(format="EPS"), "not an image of the formats JPEG, PNG, "),
        (encoded(photo("RGB", (64, 64)), "JPEG")[:-300], r"cannot be read as an image \(.*truncated"),
        (encoded(PIL.Image.effect_noise((64, 64), 90))[:-2000], r"cannot be read as an image \(.*truncated"),
    ],
    ids=["text", "empty", "other format", "truncated JPEG", "truncated PNG"],
)
def test_unreadable_files_are_named(tmp_path, content, message):
    path = tmp_path / "ant" / "0.jpg"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(CommandError, match=f"^{path}: {message}"):
        decode_image({"bytes": None, "path": str(path)})
    with pytest.raises(CommandError, match=rf"^0\.jpg: {message}"):
        decode_image({"bytes": content, "path": "0.jpg"})
    with pytest.raises(CommandError, match=f"^an image: {message}"):
        decode_image({"bytes": content, "path": None})


def test_missing_images_are_named(tmp_path):
    with pytest.raises(CommandError, match=rf"^{tmp_path}/0\.png: cannot be read as an image \(.*No such file"):
        decode_image({"bytes": None, "path": f"{tmp_path}/0.png"})
    for row in (None, {"bytes": None, "path": None}):
        with pytest.raises(CommandError, match="an image is missing"):
            decode_image(row)


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


def test_too_many_pixels_are_refused(monkeypatch, tmp_path):
    write_files(tmp_path, {"large.png": image_bytes(size=(64, 64))})
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    with pytest.raises(CommandError, match=r"large\.png: .*decompression bomb"):
        open_image(tmp_path / "large.png")


def test_images_of_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    names = ("b.JPG", "a/c.png", "a/b/d.webp", ".hidden/e.png", "a/._c.png", "poster.eps", "notes.txt")
    write_files(tmp_path, dict.fromkeys(names, b""))
    assert find_images(tmp_path) == [tmp_path / "a" / "b" / "d.webp", tmp_path / "a" / "c.png", tmp_path / "b.JPG"]


def test_what_is_not_a_regular_file_is_skipped(tmp_path):
    """Reading a named pipe would wait for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    write_files(tmp_path, {"a.png": b""})
    assert find_images(tmp_path) == [tmp_path / "a.png"]
    for path in (tmp_path / "pipe.png", tmp_path):
        with pytest.raises(CommandError, match=f"{path}: not a file"):
            open_image(path)
