"""The example on guided attention, with so few images that it only shows that everything runs."""

import re

import PIL.Image

from crossvit import CrossViTForImageClassification


def test_example_trains_two_models_and_draws_them(example, tmp_path):
    output, _ = example("guided_attention", "--images", 32, "--epochs", 1, "--output", tmp_path / "new")
    assert len(re.findall(r"accuracy [\d.]+%, IoU 0\.\d\d$", output, flags=re.MULTILINE)) == 2
    with PIL.Image.open(tmp_path / "new" / "guided_attention.png") as picture:
        assert picture.width > picture.height > 600
    assert CrossViTForImageClassification.from_pretrained(tmp_path / "new").config.id2label[2] == "triangle"
