"""Checkpoints of the reference as users hold them: small models of timm, their folders, and the names of others."""

import json
import re
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.models.crossvit import CrossVit
from timm_reference import perturb


# Two small branches that differ in every number
SMALL = {
    "img_size": 36,
    "img_scale": (1.0, 32 / 36),
    "patch_size": (6, 8),
    "embed_dim": (24, 32),
    "depth": ((1, 2, 0), (2, 2, 0)),
    "num_heads": (2, 4),
    "mlp_ratio": (2.0, 3.0),
    "num_classes": 5,
}


def small_timm(**options) -> CrossVit:
    return perturb(timm.create_model("crossvit_15_240", **{**SMALL, **options})).eval()


def ibm_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by the names of the authors' code."""
    return {re.sub(r"^(cls_token|pos_embed)_", r"\1.", name): tensor for name, tensor in tensors.items()}


def lucid_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by lucid-dl's names."""
    return {re.sub(r"^blocks\.", "stages.", name): tensor for name, tensor in tensors.items()}


def save_timm_folder(model: torch.nn.Module, folder: Path, **changes) -> Path:
    """A folder as timm publishes it, with some changes of its config.json."""
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) and name in config else value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def published_config(architecture: str) -> dict[str, Any]:
    """What config.json says in the repositories that timm publishes."""
    pretrained_cfg = timm.models.get_pretrained_cfg(architecture).to_dict()
    return {
        "architecture": pretrained_cfg.pop("architecture"),
        "num_classes": 1000,
        "pretrained_cfg": pretrained_cfg,
    }


def timm_repository(model: torch.nn.Module) -> dict[str, bytes]:
    """The files of a repository that timm publishes."""
    config = published_config(model.pretrained_cfg["architecture"])
    return {"config.json": json.dumps(config).encode(), "model.safetensors": save(model.state_dict())}


def assert_same_weights(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
