"""The reference of the tests: timm's CrossViT, and the same weights under our names."""

import re

import timm
import torch
from timm.models.crossvit import CrossVit

from crossvit import CrossViTConfig


# timm's names -> ours; the first row that matches the whole name
WEIGHT_NAMES = [
    (r"cls_token_(\d+)", r"crossvit.embeddings.\1.cls_token"),
    (r"pos_embed_(\d+)", r"crossvit.embeddings.\1.position_embeddings"),
    (r"patch_embed\.(\d+)\.proj\.(weight|bias)", r"crossvit.embeddings.\1.patch_embeddings.projection.\2"),
    (r"patch_embed\.(\d+)\.proj\.0\.(.+)", r"crossvit.embeddings.\1.patch_embeddings.convolutions.0.\2"),
    (r"patch_embed\.(\d+)\.proj\.2\.(.+)", r"crossvit.embeddings.\1.patch_embeddings.convolutions.1.\2"),
    (r"patch_embed\.(\d+)\.proj\.4\.(.+)", r"crossvit.embeddings.\1.patch_embeddings.convolutions.2.\2"),
    (r"blocks\.(\d+)\.blocks\.(\d+)\.(\d+)\.(.+)", r"crossvit.stages.\1.branches.\2.layers.\3.\4"),
    (r"blocks\.(\d+)\.projs\.(\d+)\.(.+)", r"crossvit.stages.\1.fusions.\2.projection.\3"),
    (r"blocks\.(\d+)\.revert_projs\.(\d+)\.(.+)", r"crossvit.stages.\1.fusions.\2.reverse_projection.\3"),
    (r"blocks\.(\d+)\.fusion\.(\d+)\.(\d+)\.(.+)", r"crossvit.stages.\1.fusions.\2.layers.\3.\4"),
    (r"blocks\.(\d+)\.fusion\.(\d+)\.(.+)", r"crossvit.stages.\1.fusions.\2.layers.0.\3"),
    (r"norm\.(\d+)\.(.+)", r"crossvit.layernorms.\1.\2"),
    (r"head\.(\d+)\.(.+)", r"classifier.heads.\1.\2"),
]
# Inside a layer, a fusion and a projection
MODULE_NAMES = [
    (r"(branches.+)\.norm1", r"\1.layernorm_before"),
    (r"(branches.+)\.norm2", r"\1.layernorm_after"),
    (r"(fusions.+)\.norm1", r"\1.layernorm"),
    (r"(projection)\.0", r"\1.layernorm"),
    (r"(projection)\.2", r"\1.dense"),
    (r"attn\.qkv", "attention.qkv"),
    (r"attn\.w([qkv])", r"attention.\1_proj"),
    (r"attn\.proj", "attention.o_proj"),
]


def our_name(timm_name: str) -> str:
    """The name of one of timm's weights in `CrossViTForImageClassification`."""
    name = next(
        re.sub(pattern, target, timm_name) for pattern, target in WEIGHT_NAMES if re.fullmatch(pattern, timm_name)
    )
    for pattern, target in MODULE_NAMES:
        name = re.sub(pattern, target, name)
    return name


def our_state_dict(timm_model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {our_name(name): weight for name, weight in timm_model.state_dict().items()}


def perturb(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Moves every parameter: fresh norms are one and biases zero, which would hide that two of them were swapped."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def timm_variant(variant: dict, **kwargs) -> torch.nn.Module:
    """timm's model of an entry of variants.json, with every weight moved, in evaluation mode."""
    return perturb(timm.create_model(variant["timm_id"].removeprefix("timm/"), **kwargs)).eval()


def timm_of_config(config: CrossViTConfig, **kwargs) -> torch.nn.Module:
    """timm's model of a configuration of two square branches."""
    (size, _), (second_size, _) = config.image_sizes
    return perturb(
        CrossVit(
            img_size=size,
            img_scale=(1.0, second_size / size),
            patch_size=config.patch_size,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            multi_conv=config.multi_conv,
            qkv_bias=config.qkv_bias,
            num_classes=config.num_labels,
            drop_path_rate=config.drop_path_rate,
            **kwargs,
        )
    ).eval()
