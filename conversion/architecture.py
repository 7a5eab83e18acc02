"""Which CrossViT some weights make: timm's names and the shapes tell it, the user where these are silent."""

import argparse
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from commands import ConversionError, positive_int, some
from huggingface_hub.errors import StrictDataclassError
from variants import VARIANTS, variant_config
from weight_names import from_transformers_name

from crossvit import CrossViTConfig, CrossViTForImageClassification


Shapes = Mapping[str, tuple[int, ...]]

# What tells one architecture from another, and is compared with the variants
FIELDS = ("embed_dim", "depth", "mlp_ratio", "multi_conv", "qkv_bias", "patch_size", "image_size", "num_heads")


def size_of_branch(text: str) -> int | tuple[int, int]:
    """`240`, or `256x128` for (height, width)."""
    if not (match := re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size in pixels such as 240 or 256x128 (height x width)")
    return (int(match[1]), int(match[2])) if match[2] else int(match[1])


def add_architecture_options(parser: argparse.ArgumentParser):
    """The options for what the tensors do not decide."""
    parser.add_argument("--num-heads", type=positive_int, nargs="+", help="attention heads of each branch")
    parser.add_argument(
        "--image-size", type=size_of_branch, nargs="+", help="image size of each branch, N or HEIGHTxWIDTH"
    )
    parser.add_argument(
        "--patch-size", type=positive_int, nargs="+", help="patch size of each branch of a dagger variant"
    )


def find_variant(config: CrossViTConfig) -> dict[str, Any] | None:
    """The entry of variants.json with the architecture of `config`, the number of classes aside."""
    return next((v for v in VARIANTS.values() if not differences(config, variant_config(v))), None)


def differences(config: CrossViTConfig, other: CrossViTConfig) -> list[str]:
    """Where two architectures differ, in words. A third `mlp_ratio` makes no difference."""
    found = []
    for name in FIELDS:
        value, other_value = getattr(config, name), getattr(other, name)
        if name == "mlp_ratio":
            value, other_value = value[: config.num_branches], other_value[: other.num_branches]
        if name == "image_size":
            value, other_value = config.image_sizes, other.image_sizes
        if value != other_value:
            found.append(f"{name} {value} instead of {other_value}")
    return found


def nearest_variant(config: CrossViTConfig) -> str:
    """The variant that `config` looks most like and where it differs, for messages."""
    name, found = min(
        ((name, differences(config, variant_config(variant))) for name, variant in VARIANTS.items()),
        key=lambda candidate: len(candidate[1]),
    )
    return f"{name}, with {some(found, 2)}" if found else name


def count(shapes: Shapes, name: str) -> int:
    """How many indices, from 0 on, the tensors have where `name` has a `*`."""
    pattern = re.compile(re.escape(name).replace(r"\*", r"(\d+)") + r"(?:\..+)?")
    indices = {match[1] for match in map(pattern.fullmatch, shapes) if match}
    return next(index for index in range(len(indices) + 1) if str(index) not in indices)


def shape(shapes: Shapes, name: str, form: str) -> tuple[int, ...]:
    """The shape of a tensor, which must have as many dimensions as `form` has words."""
    if name not in shapes:
        raise ConversionError(f"the tensor {name} is missing: the file is no whole CrossViT classifier")
    if len(shapes[name]) != len(form.split(", ")) or 0 in shapes[name]:
        raise ConversionError(f"{name} has the shape {tuple(shapes[name])}, which is not ({form})")
    return shapes[name]


def infer_config(
    shapes: Shapes,
    num_heads: list[int] | None = None,
    image_size: list[int | tuple[int, int]] | None = None,
    patch_size: list[int] | None = None,
) -> CrossViTConfig:
    """
    The configuration of the weights with these shapes, by timm's names.

    Args:
        shapes (`Mapping[str, tuple[int, ...]]`): the shape of each tensor.
        num_heads, image_size, patch_size (`list`, *optional*): an entry per branch, for what the shapes do not decide:
            the heads, image sizes that are not square, and the patch sizes of dagger variants. They are known for
            the shapes of the published variants.

    Raises:
        `ConversionError`: for shapes that are no CrossViT's or leave something open.
    """
    branches = count(shapes, "cls_token_*")
    stages = count(shapes, "blocks.*")
    if branches < 2 or stages < 1:
        missing = f"cls_token_{branches}" if branches < 2 else "blocks.0"
        raise ConversionError(f"{missing} is missing: the file is no whole CrossViT classifier")
    for name, values in (("num-heads", num_heads), ("image-size", image_size), ("patch-size", patch_size)):
        if values is not None and len(values) != branches:
            raise ConversionError(
                f"--{name} must have a value for each of the {branches} branches, got {some(values)}"
            )

    embed_dim = tuple(shape(shapes, f"cls_token_{b}", "1, 1, embed_dim")[2] for b in range(branches))
    depth, mlp_ratio = [], [0.0] * branches
    for s in range(stages):
        layers = [count(shapes, f"blocks.{s}.blocks.{b}.*") for b in range(branches)]
        if 0 in layers:
            raise ConversionError(
                f"stage {s} has layers for {branches - layers.count(0)} of the {branches} branches alone: the"
                " reference cannot run such a model"
            )
        depth.append((*layers, count(shapes, f"blocks.{s}.fusion.0.*.norm1")))
    for b, width in enumerate(embed_dim):
        hidden = shape(shapes, f"blocks.0.blocks.{b}.0.mlp.fc1.weight", "hidden, embed_dim")[0]
        # The ratio is multiplied and rounded down in the models
        mlp_ratio[b] = hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width

    multi_conv = any(re.fullmatch(r"patch_embed\.\d+\.proj\.\d\..+", name) for name in shapes)
    known = next(
        (
            config
            for config in map(variant_config, VARIANTS.values())
            if (embed_dim, tuple(depth), tuple(mlp_ratio), multi_conv)
            == (config.embed_dim, config.depth, config.mlp_ratio[:branches], config.multi_conv)
        ),
        None,
    )
    first_projection = "patch_embed.{}.proj.0.weight" if multi_conv else "patch_embed.{}.proj.weight"
    projections = [
        shape(shapes, first_projection.format(b), "embed_dim, channels, height, width") for b in range(branches)
    ]
    if not multi_conv:
        patch_sizes = [projection[2] for projection in projections]
        if patch_size is not None and patch_size != patch_sizes:
            raise ConversionError(f"its patch sizes are {some(patch_sizes)}, not those of --patch-size")
    elif patch_size is not None or known:
        patch_sizes = list(patch_size or known.patch_size)
    else:
        raise ConversionError(
            "the patch sizes of three convolutions (a dagger variant) are not in the tensors, and the widths and"
            " depths are those of no published variant: give --patch-size, such as --patch-size 12 16"
        )

    image_sizes = list(image_size or [])
    for b, patch in enumerate(patch_sizes):
        patches = shape(shapes, f"pos_embed_{b}", "1, 1 + patches, embed_dim")[1] - 1
        if image_size is None:
            side = math.isqrt(patches)
            if side**2 != patches or side == 0:
                raise ConversionError(
                    f"branch {b} has {patches} patches, which make no square: give --image-size, HEIGHTxWIDTH of each"
                    " branch"
                )
            image_sizes.append(side * patch)
        else:
            size = image_size[b]
            height, width = (size, size) if isinstance(size, int) else size
            image_sizes[b] = height if height == width else (height, width)
            if (height // patch) * (width // patch) != patches:
                raise ConversionError(
                    f"branch {b} has {patches} patches of {patch}x{patch} pixels, and an image size of"
                    f" {height}x{width} makes {height // patch}x{width // patch}"
                )

    options: dict[str, Any] = {
        "embed_dim": embed_dim,
        "depth": tuple(depth),
        "mlp_ratio": known.mlp_ratio if known else tuple(mlp_ratio),
        "multi_conv": multi_conv,
        "qkv_bias": "blocks.0.blocks.0.0.attn.qkv.bias" in shapes,
        "patch_size": tuple(patch_sizes),
        "image_size": tuple(image_sizes),
        "num_channels": projections[0][1],
        "num_labels": shape(shapes, "head.0.weight", "classes, embed_dim")[0],
    }
    if num_heads is None and known is None:
        config = CrossViTConfig(**options, num_heads=(1,) * branches)
        raise ConversionError(
            "the number of heads is not in the tensors, and the widths and depths are those of no published variant:"
            f" give --num-heads, one for each of the {branches} branches (it looks most like"
            f" {nearest_variant(config)})"
        )
    try:
        return CrossViTConfig(**options, num_heads=tuple(num_heads or known.num_heads))
    except (ValueError, StrictDataclassError) as error:
        raise ConversionError(f"its shapes make no CrossViT: {error}") from error


def expected_shapes(config: CrossViTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each weight of a model with `config`, by timm's names."""
    with torch.device("meta"):
        model = CrossViTForImageClassification(config)
    return {from_transformers_name(name, config): tuple(w.shape) for name, w in model.state_dict().items()}


def check_shapes(shapes: Shapes, config: CrossViTConfig):
    """Raises `ConversionError` unless the tensors are exactly those of a model with `config`."""
    if found := mismatches(shapes, expected_shapes(config)):
        raise ConversionError(f"it {found}; it looks most like {nearest_variant(config)}")


def mismatches(shapes: Shapes, expected: Shapes) -> str:
    """Where tensors are not the expected ones, in words, or nothing."""
    missing = [name for name in expected if name not in shapes]
    extra = [name for name in shapes if name not in expected]
    wrong = [
        f"{name} ({tuple(shapes[name])} instead of {tuple(expected[name])})"
        for name in expected
        if name in shapes and tuple(shapes[name]) != tuple(expected[name])
    ]
    problems = [("misses", missing), ("has besides", extra), ("has in another shape", wrong)]
    return "; ".join(f"{problem} {some(names)}" for problem, names in problems if names)
