"""Whether a converted model computes what the reference does: both run side by side on fixed images."""

from typing import Any

import torch
from architecture import find_variant
from commands import ConversionError, in_one_line
from memory import page_out
from torch import nn
from variants import timm_name

from crossvit import CrossViTConfig, CrossViTForImageClassification


# How far logits may be apart. Compared in float64, where any error of a conversion is larger by orders of magnitude.
# In float32 the bound would depend on the weights: logits of some tens differ by 1e-5 by rounding alone.
TOLERANCE = 1e-9


def build_reference(config: CrossViTConfig, timm_config: dict[str, Any] | None = None) -> nn.Module | None:
    """
    timm's model of the source, without weights (on the meta device), or `None` if timm cannot build it. Not built from
    our configuration where there is another one, so that a mistake in ours shows: as the config.json of a source of
    timm's says, and a published variant by its name.
    """
    try:
        import timm
        from timm.models.crossvit import CrossVit
    except ImportError as error:
        raise ConversionError(
            "timm, whose CrossViT is the proof of the conversion, is not installed: pip install -e '.[conversion]'"
        ) from error

    if timm_config:
        return build_from_timm_config(timm_config)
    variant = find_variant(config)
    options = timm_options(config)
    with torch.device("meta"):
        if variant:
            return timm.create_model(
                timm_name(variant), num_classes=config.num_labels, in_chans=config.num_channels
            ).eval()
        if options is None:
            return None
        try:
            return CrossVit(**options, num_classes=config.num_labels, in_chans=config.num_channels).eval()
        except IndexError:  # it runs out of drop path rates where the first branch is deeper than the second
            return None


def build_from_timm_config(timm_config: dict[str, Any]) -> nn.Module:
    """timm's model for its own config.json, as `timm.create_model("local-dir:...")` builds it, on the meta device."""
    import timm

    pretrained_cfg = dict(timm_config["pretrained_cfg"])
    if "num_classes" in timm_config:
        pretrained_cfg["num_classes"] = timm_config["num_classes"]
    model_args = {"global_pool": timm_config.get("global_pool", "token"), **timm_config["model_args"]}
    try:
        with torch.device("meta"):
            return timm.create_model(timm_config["architecture"], pretrained_cfg=pretrained_cfg, **model_args).eval()
    except Exception as error:  # of all kinds, for what may be in a file
        raise ConversionError(f"timm cannot build what config.json describes: {in_one_line(error)}") from error


def timm_options(config: CrossViTConfig) -> dict[str, Any] | None:
    """The arguments of timm's `CrossVit` for an architecture, or `None` if timm cannot build it."""
    scales = image_scales(config)
    if config.num_branches != 2 or scales is None:
        return None
    names = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "multi_conv", "qkv_bias")
    return {
        "img_size": config.image_sizes[0],
        "img_scale": scales,
        **{name: getattr(config, name) for name in names},
    }


def image_scales(config: CrossViTConfig) -> tuple[float, ...] | None:
    """timm's `img_scale`, by which a branch's image size is the first one's, rounded down; `None` if there is none."""
    scales = []
    for size in config.image_sizes:
        ratios = [(side / first, (side + 1) / first) for side, first in zip(size, config.image_sizes[0])]
        lowest, end = max(low for low, _ in ratios), min(high for _, high in ratios)
        # Away from the edges, where the rounding of a product could go either way
        scale = 1.0 if size == config.image_sizes[0] else (lowest + end) / 2
        if tuple(int(side * scale) for side in config.image_sizes[0]) != size:
            return None
        scales.append(scale)
    return tuple(scales)


def fixed_images(config: CrossViTConfig) -> torch.Tensor:
    """Two images (2, channels, height, width) as a processor makes them, of noise and always the same."""
    generator = torch.Generator().manual_seed(2103_14899)
    return torch.randn(2, config.num_channels, *config.image_sizes[0], generator=generator)


@torch.no_grad()
def logits(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    The logits (images, classes) that a model computes in `dtype`, whatever the type of its weights. A module has its
    weights in that type, and in memory, only while it runs.
    """

    def widen(module: Any, args: Any):
        module.stored_parameters = dict(module._parameters)
        for name, parameter in module.stored_parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to(dtype), requires_grad=False)

    def restore(module: Any, args: Any, output: Any):
        module._parameters.update(module.stored_parameters)
        for parameter in module.stored_parameters.values():
            if parameter is not None:
                page_out(parameter)

    handles = []
    for module in model.modules():
        if module._parameters:
            handles += [module.register_forward_pre_hook(widen), module.register_forward_hook(restore)]
    outputs = model(images.to(dtype))
    for handle in handles:
        handle.remove()
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def largest_differences(
    model: CrossViTForImageClassification,
    tensors: dict[str, torch.Tensor],
    timm_config: dict[str, Any] | None = None,
) -> dict[str, float] | None:
    """
    Runs the model and timm's with `tensors` (by timm's names) on the same images.

    Args:
        model (`CrossViTForImageClassification`): the model to compare.
        tensors (`dict[str, torch.Tensor]`): the weights of the reference.
        timm_config (`dict`, *optional*): what the config.json of timm's beside them says.

    Returns:
        `dict[str, float]` or `None`: the largest difference between any two logits in "float32" and in "float64", or
        `None` if timm cannot build the model.

    Raises:
        `ConversionError`: if the weights do not fit timm's model, or logits are NaN or infinite.
    """
    reference = build_reference(model.config, timm_config)
    if reference is None:
        return None
    try:
        reference.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ConversionError(f"timm's model does not take the weights: {in_one_line(error)}") from error

    images = fixed_images(model.config)
    found = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        ours, theirs = logits(model, images, dtype), logits(reference, images, dtype)
        if not (ours.isfinite().all() and theirs.isfinite().all()):
            raise ConversionError("the logits are NaN or infinite: the weights are damaged")
        found[name] = (ours - theirs).abs().max().item()
    return found


def check_differences(found: dict[str, float] | None):
    """Raises `ConversionError` if the logits were compared and are not equal within `TOLERANCE`."""
    if found is not None and not found["float64"] <= TOLERANCE:
        raise ConversionError(f"the logits are not the reference's, {in_words(found)}: nothing is written")


def in_words(found: dict[str, float] | None) -> str:
    """The result of `largest_differences` for users."""
    if found is None:
        return "UNPROVEN: timm cannot build a model of this shape to compare the logits with"
    return (
        f"largest difference from timm's logits {found['float32']:.1e} in float32, {found['float64']:.1e} in float64"
    )
