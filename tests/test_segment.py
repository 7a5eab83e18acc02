"""CrossViT as the backbone of a segmentation model."""

import json
import os
import re

import pytest
import torch
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from crossvit import CrossViTConfig


@pytest.mark.parametrize(
    "out_features, size",
    [
        (["stage2_0", "stage2_1"], (36, 36)),
        (["stem_0", "stage1_0", "stage1_1", "stage2_1"], (72, 54)),
        (["stage2_1"], (50, 41)),
    ],
)
def test_upernet_takes_maps_of_any_stage_and_branch_at_any_resolution(small_config, out_features, size):
    backbone_config = CrossViTConfig(**{**small_config.to_dict(), "out_features": out_features})
    config = UperNetConfig(backbone_config=backbone_config, hidden_size=16, use_auxiliary_head=False, num_labels=3)
    model = UperNetForSemanticSegmentation(config)
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


def test_a_short_training_leaves_a_model_and_a_picture(example, tmp_path):
    output, _ = example("segment", "--images", 32, "--epochs", 1, "--output", tmp_path / "shapes")
    assert re.search(r"Mean IoU on 200 other images: 0\.\d+", output)
    assert {"config.json", "model.safetensors", "metrics.json", "segment.png"} <= set(os.listdir(tmp_path / "shapes"))


@pytest.mark.slow
def test_shapes_are_found(example, tmp_path):
    example("segment", "--epochs", 3, "--output", tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["eval_mean_iou"] > 0.5  # 0.68 was measured
