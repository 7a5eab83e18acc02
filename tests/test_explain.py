"""The command that draws what a model attends to."""

import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from examples_in_process import EXAMPLES
from timm_reference import perturb

from crossvit import CrossViTConfig, CrossViTForImageClassification, CrossViTImageProcessor, interpretability


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


def test_each_map_is_drawn_on_the_image_of_its_branch(example, small_config, tmp_path, monkeypatch):
    rows = []
    draw_rows = interpretability.draw_rows
    monkeypatch.setattr(interpretability, "draw_rows", lambda cells, **options: rows.extend(cells) or draw_rows(cells))
    images = [tmp_path / "photo.png", tmp_path / "mask.png"]
    PIL.Image.new("RGB", (90, 60), "red").save(images[0])
    PIL.Image.new("L", (40, 80), "white").save(images[1])
    checkpoint = save_checkpoint(small_config, tmp_path / "checkpoint")
    status, output, errors = example("explain", *images, "--model", checkpoint, "--output", tmp_path / "explained.png")
    assert status == 0 and (tmp_path / "explained.png").is_file(), errors
    assert output.startswith(f"{images[0]}  {images[1]}  LABEL_")
    # (width, height) of the pictures
    photo, mask = (480, 320), (240, 480)
    sizes = [[cell.image.size for cell in row if isinstance(cell, interpretability.Picture)] for row in rows]
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
    checkpoint = save_checkpoint(config, tmp_path / "checkpoint")
    PIL.Image.new("RGB", (50, 40), "red").save(tmp_path / "image.png")
    options = ("--model", checkpoint, "--output", tmp_path / "explained.pdf")
    status, _, errors = example("explain", tmp_path / "image.png", *options)
    assert status == 0 and (tmp_path / "explained.pdf").read_bytes().startswith(b"%PDF"), errors


def test_user_errors_end_with_one_line(example, small_config, tmp_path, capsys):
    checkpoint = save_checkpoint(small_config, tmp_path / "checkpoint")
    capsys.readouterr()  # the progress of saving it
    (tmp_path / "text.png").write_text("not an image")
    PIL.Image.new("RGB", (50, 40)).save(tmp_path / "image.png")
    for arguments, message in (
        (("typo.png",), "typo.png"),
        ((tmp_path / "text.png",), "text.png: not an image of the formats"),
        ((tmp_path / "image.png", "--model", tmp_path / "typo"), "typo: no CrossViT"),
        ((*[tmp_path / "image.png"] * 3, "--model", checkpoint), "one image or 2"),
    ):
        status, output, errors = example("explain", *arguments)
        assert status == 1 and message in errors and len(errors.splitlines()) == 1, errors
        assert output == ""


def test_without_network_the_default_model_is_named_with_the_remedy(tmp_path):
    PIL.Image.new("RGB", (50, 40)).save(tmp_path / "image.png")
    process = subprocess.run(
        [sys.executable, EXAMPLES / "explain.py", tmp_path / "image.png"],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1 and len(process.stderr.splitlines()) == 1, process.stderr
    assert "--model timm/crossvit_15_dagger_240.in1k" in process.stderr
