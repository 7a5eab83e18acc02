"""Small models of different architectures, and the weights of each of their attention layers."""

from typing import Any

import torch
from timm_reference import perturb

from crossvit import CrossViTConfig, CrossViTForImageClassification


# Changes of the small configuration
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "two branches": {},
    "three branches, two cross-attention layers": {
        "image_size": (36, 32, 40),
        "patch_size": (6, 8, 10),
        "embed_dim": (24, 32, 16),
        "depth": ((1, 2, 1, 2), (2, 0, 1, 0)),
        "num_heads": (2, 4, 2),
        "mlp_ratio": (2.0, 3.0, 1.0, 1.0),
    },
    "rectangles": {"image_size": ((36, 24), (32, 40))},
}


def change(config: CrossViTConfig, **options) -> CrossViTConfig:
    return CrossViTConfig(**{**config.to_dict(), **options})


def make_model(config: CrossViTConfig) -> CrossViTForImageClassification:
    """With eager attention and weights that are not those of the initialization, in evaluation mode."""
    model = perturb(CrossViTForImageClassification(config)).eval()
    model.set_attn_implementation("eager")
    return model


def record_weights(model: torch.nn.Module, pixel_values: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
    """The outputs of a model, and the weights (batch, heads, queries, keys) that each attention module returns."""
    weights: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: weights.__setitem__(name, output[1]))
        for name, module in model.named_modules()
        if name.endswith(".attention")
    ]
    outputs = model(pixel_values, output_attentions=True)
    for hook in hooks:
        hook.remove()
    return outputs, weights
