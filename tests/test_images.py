"""Image files are decoded as `datasets` does it, but only formats of photos, and errors name the file."""

import io
import zipfile

import datasets
import fsspec
import numpy as np
import PIL.features
import PIL.Image
import pytest
from image_folders import encoded, image_bytes

from crossvit.training.errors import CommandError
from crossvit.training.images import decode_image, open_image


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
