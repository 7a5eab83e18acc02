"""A checkpoint of the reference, read, recognised and checked: everything that is known before it is converted."""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from architecture import Shapes, add_architecture_options, check_shapes, find_variant, infer_config, mismatches
from commands import ConversionError
from proof import build_from_timm_config
from sources import Source, add_source_options, check_sha256, find_source, of_one_type, read_tensors
from variants import VARIANTS
from weight_names import to_timm_names, to_transformers_name

from crossvit import CrossViTConfig, CrossViTForImageClassification


@dataclass
class ReferenceCheckpoint:
    source: Source
    # What conversion.json says of it
    record: dict[str, Any]
    config: CrossViTConfig
    # The entry of variants.json with this architecture
    variant: dict[str, Any] | None
    # By timm's names, of one type, in memory only where they have been used
    tensors: dict[str, torch.Tensor]

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.tensors.values())).dtype

    @property
    def published(self) -> dict[str, Any] | None:
        """The entry of variants.json whose published weights these are."""
        return self.variant if self.variant and self.source.published == self.variant else None

    def build_model(self) -> CrossViTForImageClassification:
        """Our model with these tensors, which it shares."""
        with torch.device("meta"):
            model = CrossViTForImageClassification(self.config)
        model.load_state_dict({to_transformers_name(name): t for name, t in self.tensors.items()}, assign=True)
        return model.eval()


def add_reference_options(parser: argparse.ArgumentParser):
    """The options of `read_reference`."""
    add_source_options(parser)
    add_architecture_options(parser)


def read_reference(source_name: str, options: argparse.Namespace) -> ReferenceCheckpoint:
    """
    Finds, reads and checks the weights that `source_name` names.

    Raises:
        `ConversionError`: for weights that are not whole, not sound or not CrossViT's, or that leave something open.
    """
    source = find_source(source_name, options.revision, options.filename)
    digest = check_sha256(source.path, options.sha256)
    named_tensors, entry = read_tensors(source.path, options.entry)
    format_name, timm_names = to_timm_names(named_tensors)
    tensors = {timm_names[name]: tensor for name, tensor in of_one_type(named_tensors).items()}

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    known = known_to_timm(source.timm_config, shapes) if source.timm_config else {}
    config = infer_config(
        shapes,
        options.num_heads or known.get("num_heads"),
        options.image_size or known.get("image_size"),
        options.patch_size or known.get("patch_size"),
    )
    check_shapes(shapes, config)

    variant = find_variant(config)
    if source_name in VARIANTS and VARIANTS[source_name] != variant:
        raise ConversionError(f"{source} has other weights than those of {source_name}")
    record = {**source.record, "sha256": digest, "format": format_name}
    if entry is not None:
        record["entry"] = entry
    return ReferenceCheckpoint(source, record, config, variant, tensors)


def known_to_timm(timm_config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """
    What timm knows from its config.json, as `infer_config` takes it: heads, image sizes and patch sizes.

    Raises:
        `ConversionError`: for a config.json of other weights, and for options of timm's that the published models do
            not use and ours does not have.
    """
    model: Any = build_from_timm_config(timm_config)
    if found := mismatches(shapes, {name: weight.shape for name, weight in model.state_dict().items()}):
        raise ConversionError(
            f"config.json is that of a {timm_config['architecture']} of other weights: the file {found} (without"
            " config.json the tensors alone decide)"
        )
    if model.global_pool != "token" or model.crop_scale:
        raise ConversionError(
            f"config.json has global_pool {model.global_pool!r} and crop_scale {model.crop_scale}: this CrossViT reads"
            " the class tokens and resizes images, as the authors' does"
        )
    return {
        "num_heads": [branch[0].attn.num_heads for branch in model.blocks[0].blocks],
        "image_size": [tuple(size) for size in model.img_size_scaled],
        "patch_size": [embedding.patch_size[0] for embedding in model.patch_embed],
    }
