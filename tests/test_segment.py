"""CrossViT as the backbone of a segmentation model."""

import json
import os
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from examples_in_process import EXAMPLES
from timm_reference import perturb
from transformers import AutoModelForSemanticSegmentation, UperNetConfig, UperNetForSemanticSegmentation

from crossvit import CrossViTBackbone, CrossViTConfig, CrossViTForImageClassification


def segmentation_config(small_config, out_features) -> UperNetConfig:
    config = CrossViTConfig(**{**small_config.to_dict(), "out_features": out_features})
    return UperNetConfig(backbone_config=config, hidden_size=16, use_auxiliary_head=False, num_labels=3)


@pytest.mark.parametrize(
    "out_features",
    [["stage2_0", "stage2_1"], ["stem_0", "stage1_0", "stage1_1", "stage2_1"], ["stage2_1"]],
)
@pytest.mark.parametrize("size", [(36, 36), (72, 54), (50, 41)])
def test_upernet_takes_maps_of_any_stage_and_branch_at_any_resolution(small_config, out_features, size):
    model = UperNetForSemanticSegmentation(segmentation_config(small_config, out_features))
    pixel_values, labels = torch.randn(2, 3, *size), torch.randint(0, 3, (2, *size))
    outputs = model(pixel_values, labels=labels)
    assert outputs.logits.shape == (2, 3, *size)
    outputs.loss.backward()
    # Only what comes before the last chosen feature map gets gradients
    last = max(small_config.stage_names.index(name) for name in out_features)
    stage = last // 2 - 1
    for name, parameter in model.backbone.named_parameters():
        if "stages" in name and int(name.split("stages.")[1].split(".")[0]) > stage:
            assert parameter.grad is None or not parameter.grad.any(), name
    assert model.backbone.crossvit.embeddings[last % 2].position_embeddings.grad.any()


def test_save_load_keeps_masks(small_config, tmp_path):
    model = perturb(UperNetForSemanticSegmentation(segmentation_config(small_config, ["stage2_0", "stage2_1"]))).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert isinstance(loaded.backbone, CrossViTBackbone)
    pixel_values = torch.randn(1, 3, 48, 36)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    with torch.no_grad():
        # The same weights elsewhere in memory: up to 3.6e-7 apart
        torch.testing.assert_close(loaded(pixel_values).logits, model(pixel_values).logits, atol=1e-5, rtol=0)


def test_weights_of_a_classifier_start_a_segmentation(small_config, tmp_path):
    classifier = perturb(CrossViTForImageClassification(small_config))
    classifier.save_pretrained(tmp_path)
    model = UperNetForSemanticSegmentation(segmentation_config(small_config, ["stage2_0", "stage2_1"]))
    model.backbone = CrossViTBackbone.from_pretrained(tmp_path, out_features=["stage2_0", "stage2_1"])
    weights = classifier.crossvit.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.backbone.crossvit.state_dict().items())
    assert model.eval()(torch.randn(1, 3, 36, 36)).logits.shape == (1, 3, 36, 36)


def test_masks_are_those_of_the_shapes():
    """Labelled pixels are bright, and the ground is of one color up to noise."""
    draw_sample = runpy.run_path(str(EXAMPLES / "segment.py"))["draw_sample"]
    seen = set()
    for index in range(40):
        image, mask = draw_sample(np.random.default_rng(index))
        assert mask.shape == (64, 64) and image.size == (64, 64)
        seen |= set(np.unique(mask).tolist())
        pixels = np.asarray(image, dtype=float)
        ground = pixels[mask == 0]
        assert ground.std(axis=0).max() < 15  # the noise has 12, of which values below 0 are cut off
        assert pixels[mask > 0].mean() > ground.mean()
    assert seen == {0, 1, 2, 3}


def test_a_short_training_leaves_a_model_and_a_picture(example, tmp_path):
    output, _ = example("segment", "--images", 32, "--epochs", 1, "--output", tmp_path / "shapes")
    assert re.search(r"Mean IoU on 200 other images: 0\.\d+", output)
    assert {"config.json", "model.safetensors", "metrics.json", "segment.png"} <= set(os.listdir(tmp_path / "shapes"))


@pytest.mark.slow
def test_shapes_are_found(tmp_path):
    process = subprocess.run([sys.executable, EXAMPLES / "segment.py"], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    metrics = json.loads((tmp_path / "outputs" / "segment" / "metrics.json").read_text())
    assert metrics["eval_mean_iou"] > 0.85
