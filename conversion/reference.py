# Copyright 2026 The CrossViT for Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Code shared by both conversions: timm's CrossViT, the names of its weights, and the comparison of the logits."""

import copy
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from crossvit import CrossViTConfig
from crossvit.timm_checkpoints import ARCHITECTURES, KEY_MAPPING


# The eleven published models by name: architecture, preprocessing, size and published accuracy
VARIANTS = {variant["name"]: variant for variant in json.loads(Path(__file__).with_name("variants.json").read_text())}

# Bound on the difference of logits in float64, where rounding causes 1e-13. In float32 it causes up to 1e-5, depending
# on the weights.
TOLERANCE = 1e-9


class ConversionError(Exception):
    """A checkpoint that cannot be converted, or options that do not fit it."""


def run(command: Callable[[], None]) -> None:
    """Runs a command. An error ends the process with status 1 and one line, Ctrl-C with status 130."""
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(130)
    # Exceptions of all kinds, for what may be in a file; most libraries word them well
    except Exception as error:
        kind = "" if isinstance(error, (ConversionError, OSError, ValueError)) else f"{type(error).__name__}: "
        print(f"error: {kind}{' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


def shorten_list(items: list[str], limit: int = 3) -> str:
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def to_timm_name(name: str) -> str:
    """timm's name of a weight that has the authors' or lucid-dl's, or was wrapped for training or compilation."""
    name = re.sub(r"^((module|_orig_mod)\.)+", "", name)
    return re.sub(r"^(cls_token|pos_embed)\.(\d+)$", r"\1_\2", name).replace("stages.", "blocks.", 1)


def to_transformers_name(timm_name: str) -> str:
    """The name in `CrossViTForImageClassification` of a weight of timm's, as `from_pretrained` finds it."""
    name = timm_name
    for pattern, replacement in KEY_MAPPING.items():
        name = re.sub(pattern, replacement, name)
    return name if name.startswith("classifier.") else f"crossvit.{name}"


def find_variant(config: CrossViTConfig) -> dict[str, Any] | None:
    """The published variant with the architecture of a configuration, whatever its classes, channels and dropout."""
    for variant in VARIANTS.values():
        architecture = ARCHITECTURES[variant["architecture"]]
        published = CrossViTConfig(**architecture)
        names = {"image_sizes", "qkv_bias", "layer_norm_eps", *architecture} - {"image_size"}
        if all(getattr(config, name) == getattr(published, name) for name in names):
            return variant
    return None


def timm_arguments(config: CrossViTConfig) -> dict[str, Any]:
    """
    The arguments of timm's `CrossVit` for the architecture of a configuration.

    Raises:
        `ConversionError`: for an architecture that timm does not have.
    """
    for name, value in (("num_branches", 2), ("hidden_act", "gelu"), ("layer_norm_eps", 1e-6)):
        if getattr(config, name) != value:
            raise ConversionError(f"the model has {name}={getattr(config, name)!r}, timm's CrossViT has {value!r}")
    if any(0 in layers for *layers, _ in config.depth) or any(first > second for first, second, _ in config.depth):
        raise ConversionError(
            f"timm requires 1 <= layers of branch 0 <= layers of branch 1 in every stage, got depth {config.depth}"
        )
    names = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "multi_conv", "qkv_bias")
    first, second = config.image_sizes
    # timm rounds the product of the scale and each side of the first image size down
    lowest = max(side / first_side for side, first_side in zip(second, first))
    highest = min((side + 1) / first_side for side, first_side in zip(second, first))
    scale = 1.0 if first == second else (lowest + highest) / 2
    if tuple(int(side * scale) for side in first) != second:
        raise ConversionError(f"timm has one scale for both sides of an image, not image sizes {config.image_sizes}")
    return {"img_size": first, "img_scale": (1.0, scale), **{name: getattr(config, name) for name in names}}


def create_timm_model(config: CrossViTConfig) -> nn.Module:
    """timm's model of the architecture of a configuration, without weights (on the meta device)."""
    variant, arguments = find_variant(config), {}
    if variant is None:
        variant = VARIANTS["crossvit_15_dagger" if config.multi_conv else "crossvit_15"]
        arguments = timm_arguments(config)
    with torch.device("meta"):
        return timm.create_model(
            variant["architecture"], num_classes=config.num_labels, in_chans=config.num_channels, **arguments
        )


@torch.no_grad()
def logits_differences(model: nn.Module, timm_model: nn.Module, config: CrossViTConfig) -> dict[str, float]:
    """
    The largest differences between the logits of both models on two images of noise, in float32 and in float64.

    Raises:
        `ConversionError`: if they exceed `TOLERANCE` in float64.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, config.num_channels, *config.image_sizes[0], generator=generator)
    differences = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        ours, theirs = (copy.deepcopy(each).eval().to(dtype)(images.to(dtype)) for each in (model, timm_model))
        differences[name] = (ours.logits - theirs).abs().max().item()
    if not differences["float64"] <= TOLERANCE:  # NaN is not
        raise ConversionError(f"the logits differ from timm's by {differences['float64']:.1e} in float64: not saved")
    return differences
