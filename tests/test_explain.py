"""The command that draws what a model attends to."""

import numpy as np
import PIL.Image
import pytest
from examples_in_process import save_checkpoint

from crossvit import CrossViTConfig
from crossvit.interpretability import ImageCell


@pytest.mark.parametrize("size", [(90, 60), (1, 1), (3, 400)])
def test_picture_of_every_stage(example, checkpoint, tmp_path, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "image.png")
    picture = tmp_path / "new" / "explained.png"
    output, _ = example("explain", tmp_path / "image.png", "--model", checkpoint, "--output", picture)
    first_line = output.splitlines()[0]
    assert first_line.startswith(str(tmp_path / "image.png")) and first_line.count("LABEL_") == 5
    with PIL.Image.open(picture) as drawn:
        assert min(drawn.size) > 500


def test_each_map_is_drawn_on_the_image_of_its_branch(example, drawn_rows, checkpoint, tmp_path):
    images = [tmp_path / "photo.png", tmp_path / "mask.png"]
    PIL.Image.new("RGB", (90, 60), "red").save(images[0])
    PIL.Image.new("L", (40, 80), "white").save(images[1])
    output, _ = example("explain", *images, "--model", checkpoint, "--output", tmp_path / "explained.png")
    assert output.startswith(f"{images[0]}  {images[1]}  LABEL_")
    # (width, height) of the pictures
    photo, mask = (480, 320), (240, 480)
    sizes = [[cell.image.size for cell in row if isinstance(cell, ImageCell)] for row in drawn_rows]
    # The inputs; rollout; in each stage self-attention, then cross-attention to the other branch
    assert sizes == [[photo, mask], [photo, mask], [photo, mask, mask, photo], [photo, mask, mask, photo]]


def test_three_branches_and_a_branch_without_layers(example, tmp_path):
    config = CrossViTConfig(
        image_size=(36, 32, 40),
        patch_size=(6, 8, 10),
        embed_dim=(24, 32, 16),
        depth=((1, 0, 1, 2), (2, 1, 1, 0)),
        num_heads=(2, 4, 2),
        mlp_ratio=(2.0, 3.0, 1.0, 1.0),
    )
    options = ("--model", save_checkpoint(config, tmp_path / "checkpoint"), "--output", tmp_path / "explained.pdf")
    PIL.Image.new("RGB", (50, 40), "red").save(tmp_path / "image.png")
    example("explain", tmp_path / "image.png", *options)
    assert (tmp_path / "explained.pdf").read_bytes().startswith(b"%PDF")


def test_what_is_wrong_is_named(failure, checkpoint, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    PIL.Image.new("RGB", (50, 40)).save(tmp_path / "image.png")
    for arguments, message in (
        (("typo.png",), "typo.png"),
        ((tmp_path / "text.png",), "text.png: not an image of the formats"),
        ((tmp_path / "image.png", "--model", tmp_path / "typo"), "typo: not a CrossViT checkpoint"),
        ((*[tmp_path / "image.png"] * 3, "--model", checkpoint), "one image or 2"),
    ):
        assert message in failure("explain", *arguments)


def test_without_network_the_default_model_is_named_with_the_remedy(failure, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    PIL.Image.new("RGB", (50, 40)).save(tmp_path / "image.png")
    assert "--model timm/crossvit_15_dagger_240.in1k" in failure("explain", tmp_path / "image.png")
