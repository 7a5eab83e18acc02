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
"""Checkpoints of timm and of the authors, read as they are: the names of their weights and timm's config.json."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling


def _architecture(
    embed_dim: tuple[int, int],
    num_layers: int,
    num_heads: int,
    mlp_ratio: float,
    multi_conv: bool = False,
    image_size: tuple[int, int] = (240, 224),
) -> dict[str, Any]:
    """What the eleven architectures do not have in common; the layers are those of the second branch in each stage."""
    return {
        "image_size": image_size,
        "patch_size": (12, 16),
        "embed_dim": embed_dim,
        "depth": ((1, num_layers, 0),) * 3,
        "num_heads": (num_heads,) * 2,
        "mlp_ratio": (mlp_ratio, mlp_ratio, 1.0),
        "multi_conv": multi_conv,
    }


# The published architectures by timm's names (timm/models/crossvit.py), as arguments of `CrossViTConfig`
ARCHITECTURES = {
    "crossvit_tiny_240": _architecture((96, 192), 4, 3, 4.0),
    "crossvit_small_240": _architecture((192, 384), 4, 6, 4.0),
    "crossvit_base_240": _architecture((384, 768), 4, 12, 4.0),
    "crossvit_9_240": _architecture((128, 256), 3, 4, 3.0),
    "crossvit_15_240": _architecture((192, 384), 5, 6, 3.0),
    "crossvit_18_240": _architecture((224, 448), 6, 7, 3.0),
    "crossvit_9_dagger_240": _architecture((128, 256), 3, 4, 3.0, multi_conv=True),
    "crossvit_15_dagger_240": _architecture((192, 384), 5, 6, 3.0, multi_conv=True),
    "crossvit_18_dagger_240": _architecture((224, 448), 6, 7, 3.0, multi_conv=True),
    "crossvit_15_dagger_408": _architecture((192, 384), 5, 6, 3.0, multi_conv=True, image_size=(408, 384)),
    "crossvit_18_dagger_408": _architecture((224, 448), 6, 7, 3.0, multi_conv=True, image_size=(408, 384)),
}

# Arguments of timm's `CrossVit` that have a counterpart in `CrossViTConfig`, and its name
ARGUMENT_NAMES = {
    "patch_size": "patch_size",
    "embed_dim": "embed_dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "multi_conv": "multi_conv",
    "qkv_bias": "qkv_bias",
    "drop_path_rate": "drop_path_rate",
    "attn_drop_rate": "attention_probs_dropout_prob",
}
# Arguments from which sizes and labels follow
INPUT_ARGUMENTS = {"img_size", "img_scale", "in_chans", "num_classes"}
# Dropout without a counterpart, which makes no difference to what a trained model computes
TRAINING_ARGUMENTS = {"drop_rate", "pos_drop_rate", "proj_drop_rate"}
# Arguments that must have the only value that is implemented here
FIXED_ARGUMENTS = {"global_pool": "token", "crop_scale": False}

# The names of the weights in timm, in the authors' code (`cls_token.0` for `cls_token_0`) and in lucid-dl's files
# (`stages` for the outer `blocks`). `from_pretrained` applies the replacements one after the other. No pattern matches
# a name of ours. Replacements may refer to one group, `\1`, and act on the first text that reads like the match, hence
# the inner `blocks` before the outer ones.
KEY_MAPPING = {
    r"^cls_token[_.](\d+)$": r"embeddings.\1.cls_token",
    r"^pos_embed[_.](\d+)$": r"embeddings.\1.position_embeddings",
    # The dagger variants have a ReLU after each convolution, hence every other index
    r"^patch_embed\.(\d+)\.proj\.0": r"embeddings.\1.patch_embeddings.convolutions.0",
    r"^patch_embed\.(\d+)\.proj\.2": r"embeddings.\1.patch_embeddings.convolutions.1",
    r"^patch_embed\.(\d+)\.proj\.4": r"embeddings.\1.patch_embeddings.convolutions.2",
    r"^patch_embed\.(\d+)\.proj": r"embeddings.\1.patch_embeddings.projection",
    r"\.blocks\.(\d+)": r".branches.\1.layers",
    r"^blocks\.": "stages.",
    r"\.projs\.(\d+)\.0": r".fusions.\1.projection.layernorm",
    r"\.projs\.(\d+)\.2": r".fusions.\1.projection.dense",
    r"\.revert_projs\.(\d+)\.0": r".fusions.\1.reverse_projection.layernorm",
    r"\.revert_projs\.(\d+)\.2": r".fusions.\1.reverse_projection.dense",
    # One cross-attention layer without an index where `depth` says 0, indexed layers where it says 1 or more
    r"\.fusion\.(\d+)\.norm1": r".fusions.\1.layers.0.layernorm",
    r"\.fusion\.(\d+)\.attn": r".fusions.\1.layers.0.attn",
    r"\.fusion\.(\d+\.\d+)\.norm1": r".fusion.\1.layernorm",
    r"\.fusion\.(\d+)": r".fusions.\1.layers",
    r"\.norm1": ".layernorm_before",
    r"\.norm2": ".layernorm_after",
    r"\.attn\.qkv": ".attention.qkv",
    r"\.attn\.w([qkv])": r".attention.\1_proj",
    r"\.attn\.proj": ".attention.o_proj",
    r"^norm\.": "layernorms.",
    r"^head\.": "classifier.heads.",
}


def is_timm_config(config: dict[str, Any]) -> bool:
    """Whether the contents of a config.json are timm's: those of Transformers have `architectures`."""
    return "architecture" in config


def read_model_config(config: dict[str, Any]) -> dict[str, Any]:
    """
    The arguments of [`CrossViTConfig`] for the model that a config.json of timm's describes.

    Args:
        config (`dict[str, Any]`): its contents, in the present form or the old one without `pretrained_cfg`.

    Raises:
        `ValueError`: if it describes an unsupported architecture.
    """
    name, arguments = config["architecture"], get_model_args(config)
    if name not in ARCHITECTURES:
        raise ValueError(f"config.json is of timm's architecture {name!r}, CrossViT has {', '.join(ARCHITECTURES)}.")
    fixed = {"global_pool": config.get("global_pool", "token"), **arguments}
    for argument, value in FIXED_ARGUMENTS.items():
        if fixed.get(argument, value) != value:
            raise ValueError(
                f"config.json has {argument}={fixed[argument]!r}, which this CrossViT does not implement: only"
                f" {argument}={value!r} can be loaded."
            )
    known = ARGUMENT_NAMES.keys() | INPUT_ARGUMENTS | TRAINING_ARGUMENTS | FIXED_ARGUMENTS.keys()
    if unknown := arguments.keys() - known:
        raise ValueError(f"config.json has model_args that this CrossViT does not know: {', '.join(sorted(unknown))}.")

    architecture = ARCHITECTURES[name]
    num_channels, height, width = get_input_size(config)
    native_sizes = architecture["image_size"]
    scales = arguments.get("img_scale") or [size / native_sizes[0] for size in native_sizes]
    image_sizes = [(int(height * scale), int(width * scale)) for scale in scales]
    for (rows, columns), patch in zip(image_sizes, arguments.get("patch_size", architecture["patch_size"])):
        # timm counts the position embeddings in this order
        if rows // patch * columns // patch != (rows // patch) * (columns // patch):
            raise ValueError(
                f"config.json has images of {height}x{width}, of which a branch makes {rows}x{columns}. timm has not"
                f" as many position embeddings as patches of {patch} pixels there and cannot run the model either."
            )
    id2label = dict(enumerate(get_class_names(config)))
    return {
        "model_type": "crossvit",
        **architecture,
        **{ours: arguments[timms] for timms, ours in ARGUMENT_NAMES.items() if timms in arguments},
        "image_size": image_sizes,
        "num_channels": num_channels,
        "id2label": id2label,
        "label2id": {label: index for index, label in id2label.items()},
    }


def read_image_processor_config(config: dict[str, Any]) -> dict[str, Any]:
    """
    The arguments of [`CrossViTImageProcessor`] for the evaluation transform that a config.json of timm's describes.

    Args:
        config (`dict[str, Any]`): its contents, in the present form or the old one without `pretrained_cfg`.

    Raises:
        `ValueError`: if the image processor cannot do what it describes.
    """
    source = config.get("pretrained_cfg", config)
    num_channels, height, width = get_input_size(config)
    crop_pct, crop_mode = source.get("crop_pct") or 0.875, source.get("crop_mode") or "center"
    interpolation = source.get("interpolation") or "bicubic"
    # timm resizes to this size, or its shortest edge, and crops the center
    size = {"height": math.floor(height / crop_pct), "width": math.floor(width / crop_pct)}
    if crop_mode == "center" and height == width:
        size = {"shortest_edge": size["height"]}
    elif crop_mode != "squash":
        raise ValueError(
            f"config.json has crop_mode={crop_mode!r} for images of {height}x{width}, which the image processor cannot"
            " do: it takes 'center' for square images and 'squash'. Create it with `size` and `crop_size` instead."
        )
    if interpolation.upper() not in PILImageResampling.__members__:
        raise ValueError(
            f"config.json has interpolation={interpolation!r}, which the image processor cannot do: it takes"
            f" {', '.join(PILImageResampling.__members__).lower()}."
        )
    return {
        "size": size,
        "crop_size": {"height": height, "width": width},
        "resample": getattr(PILImageResampling, interpolation.upper()),
        "image_mean": per_channel(source.get("mean") or IMAGENET_DEFAULT_MEAN, num_channels),
        "image_std": per_channel(source.get("std") or IMAGENET_DEFAULT_STD, num_channels),
        "do_convert_rgb": num_channels == 3,
    }


def get_model_args(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("model_args") or {}


def get_input_size(config: dict[str, Any]) -> tuple[int, int, int]:
    """The channels, height and width of the images that timm's model takes."""
    num_channels, *size = config.get("pretrained_cfg", config)["input_size"]
    arguments = get_model_args(config)
    size = arguments.get("img_size") or size
    height, width = (size, size) if isinstance(size, int) else size
    return arguments.get("in_chans", num_channels), height, width


def get_class_names(config: dict[str, Any]) -> list[str]:
    """
    The names of all classes, in their order: their descriptions where there are any, and those of ImageNet where there
    are 1000 classes without names, as in timm.
    """
    settings = {**config.get("pretrained_cfg", {}), **config, **get_model_args(config)}
    num_classes = settings["num_classes"]
    names = settings.get("label_names") or settings.get("labels")
    descriptions = settings.get("label_descriptions") or {}
    if descriptions and not names:
        raise ValueError("config.json has label_descriptions but no label_names, so their order is unknown.")
    # Checkpoints that carry their code do not carry the list, as their config.json has the names
    imagenet_classes = Path(__file__).with_name("imagenet_classes.txt")
    if names is None and num_classes == 1000 and imagenet_classes.is_file():
        names = imagenet_classes.read_text(encoding="utf-8").splitlines()
    if names is None or isinstance(names, dict):  # which may have gaps
        names = [(names or {}).get(str(index), f"LABEL_{index}") for index in range(num_classes)]
    if len(names) != num_classes:
        raise ValueError(f"config.json has {len(names)} label_names for {num_classes} classes.")
    return [descriptions.get(name, name) for name in names]


def per_channel(values: Sequence[float], num_channels: int) -> list[float]:
    """Statistics of images with other channels are averaged, as in timm."""
    return list(values) if len(values) == num_channels else [sum(values) / len(values)] * num_channels
