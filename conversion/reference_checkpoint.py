"""A checkpoint of the reference, read, recognised and checked: everything that is known before it is converted."""

import argparse
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from architecture import add_architecture_options, check_shapes, find_variant, infer_config
from commands import ConversionError
from sources import Source, add_source_options, check_sha256, check_values, find_source, read_tensors
from variants import VARIANTS, timm_name
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
    check_values(named_tensors)
    format_name, timm_names = to_timm_names(named_tensors)
    # Weights of several types are all brought to the widest, which holds them exactly
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in named_tensors.values()))
    tensors = {timm_names[name]: tensor.to(dtype).contiguous() for name, tensor in named_tensors.items()}

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    model_args = source.timm_config.get("model_args", {})
    config = infer_config(
        shapes, options.num_heads or model_args.get("num_heads"), options.image_size, options.patch_size
    )
    check_shapes(shapes, config)

    variant = find_variant(config)
    if source_name in VARIANTS and VARIANTS[source_name] != variant:
        raise ConversionError(f"{source} has other weights than those of {source_name}")
    architecture = source.timm_config.get("architecture")
    if variant and architecture and not model_args and architecture != timm_name(variant):
        raise ConversionError(
            f"config.json says that the weights are of {architecture}, and their shapes are those of"
            f" {timm_name(variant)}"
        )
    record = {**source.record, "sha256": digest, "format": format_name}
    if entry is not None:
        record["entry"] = entry
    return ReferenceCheckpoint(source, record, config, variant, tensors)
