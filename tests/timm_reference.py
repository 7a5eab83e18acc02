"""The reference of the tests: timm's CrossViT, the same weights under our names, and the authors' learning rates."""

import timm
import torch
from reference import timm_arguments, to_transformers_name
from timm.models.crossvit import CrossVit
from timm.scheduler import CosineLRScheduler

from crossvit import CrossViTConfig


class TimmCrossViT(CrossVit):
    """timm's CrossViT, which also takes an image for each branch: (batch, branches, channels, height, width)."""

    def _embed(self, x: torch.Tensor) -> list[torch.Tensor]:
        embed = super()._embed
        return embed(x) if x.ndim == 4 else [embed(images)[branch] for branch, images in enumerate(x.unbind(1))]


def our_state_dict(timm_model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {to_transformers_name(name): weight for name, weight in timm_model.state_dict().items()}


def perturb(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Moves every parameter: fresh norms are one and biases zero, which would mask that two of them were swapped."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def timm_variant(variant: dict, seed: int = 0, **kwargs) -> torch.nn.Module:
    """timm's model of an entry of variants.json with random weights, in evaluation mode."""
    with torch.device("meta"):  # timm's initialization takes longer than most tests
        model = timm.create_model(variant["timm_id"].removeprefix("timm/"), **kwargs)
    model.to_empty(device="cpu")
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            torch.nn.init.zeros_(parameter)
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.ones_(module.weight)
    return perturb(model, seed).eval()


def timm_of_config(config: CrossViTConfig, **kwargs) -> torch.nn.Module:
    """timm's model of a configuration of two branches."""
    options = {**timm_arguments(config), "num_classes": config.num_labels, "drop_path_rate": config.drop_path_rate}
    return perturb(TimmCrossViT(**options, **kwargs)).eval()


def authors_learning_rates(
    epochs: int, warmup_epochs: int, peak: float, warmup: float = 1e-6, end: float = 1e-5
) -> list[float]:
    """Of each epoch: timm's scheduler, which the script steps after each epoch with the number of that epoch."""
    optimizer = torch.optim.SGD([torch.zeros(1)], peak)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=epochs, lr_min=end, warmup_t=warmup_epochs, warmup_lr_init=warmup, cycle_limit=1
    )
    rates = []
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)
    return rates
