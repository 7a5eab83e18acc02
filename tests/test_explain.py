"""The command that draws where a model looks."""

import numpy as np
import PIL.Image
import pytest
from timm_reference import perturb

from crossvit import CrossViTConfig, CrossViTForImageClassification, CrossViTImageProcessor


def save_checkpoint(config, folder):
    perturb(CrossViTForImageClassification(config)).save_pretrained(folder)
    size = {"height": 36, "width": 36}
    CrossViTImageProcessor(size={"shortest_edge": 36}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("size", [(90, 60), (1, 1), (3, 400)])
def test_picture_of_every_stage(example, small_config, tmp_path, size):
    checkpoint = save_checkpoint(small_config, tmp_path / "checkpoint")
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "image.png")
    picture = tmp_path / "new" / "explained.png"
    status, output, errors = example("explain", tmp_path / "image.png", "--model", checkpoint, "--output", picture)
    assert status == 0, errors
    first_line = output.splitlines()[0]
    assert first_line.startswith(str(tmp_path / "image.png")) and first_line.count("LABEL_") == 5
    with PIL.Image.open(picture) as drawn:
        assert min(drawn.size) > 500 and np.unique(np.asarray(drawn.convert("L"))).size > 50
    assert [path.name for path in picture.parent.iterdir()] == ["explained.png"]


def test_three_branches_and_a_branch_without_layers(example, tmp_path):
    config = CrossViTConfig(
        image_size=(36, 32, 40),
        patch_size=(6, 8, 10),
        embed_dim=(24, 32, 16),
        depth=((1, 0, 1, 2), (2, 1, 1, 0)),
        num_heads=(2, 4, 2),
        mlp_ratio=(2.0, 3.0, 1.0, 1.0),
    )
    checkpoint = save_checkpoint(config, tmp_path / "checkpoint")
    PIL.Image.new("RGB", (50, 40), "red").save(tmp_path / "image.png")
    options = ("--model", checkpoint, "--output", tmp_path / "explained.pdf")
    status, _, errors = example("explain", tmp_path / "image.png", *options)
    assert status == 0 and (tmp_path / "explained.pdf").read_bytes().startswith(b"%PDF"), errors


def test_what_is_wrong_is_named(example, small_config, tmp_path):
    checkpoint = save_checkpoint(small_config, tmp_path / "checkpoint")
    (tmp_path / "text.png").write_text("no image")
    PIL.Image.new("RGB", (50, 40)).save(tmp_path / "image.png")
    for arguments, message in (
        ((tmp_path / "typo.png",), "typo.png: No such file"),
        ((tmp_path / "text.png",), "text.png: not an image"),
        ((tmp_path / "image.png", "--model", tmp_path / "typo"), "typo: no CrossViT in such a folder or on the Hub"),
        ((tmp_path / "image.png", "--model", checkpoint, "--output", tmp_path / "a.txt"), "a.txt: the name of a pict"),
    ):
        status, output, errors = example("explain", *arguments)
        assert status == 1 and message in errors and len(errors.splitlines()) == 1, errors
        assert output == "" and not (tmp_path / "a.txt").exists()
