"""Checkpoints of Transformers, as the commands read them."""

from collections.abc import Callable
from pathlib import Path

import torch
from commands import ConversionError
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from weight_names import from_transformers_name

from crossvit import CrossViTConfig, CrossViTForImageClassification


def load_checkpoint(checkpoint: str, revision: str | None = None) -> CrossViTForImageClassification:
    """
    Loads a classifier from a folder or repository, whole, with safetensors alone and in the type of its weights.

    Raises:
        `ConversionError`: for what is no such checkpoint, or has other tensors than its config says.
    """
    try:
        config = CrossViTConfig.get_config_dict(checkpoint, revision=revision)[0]
        if config.get("model_type") != CrossViTConfig.model_type:
            raise ConversionError(f"{checkpoint} has the model type {config.get('model_type')!r}, not 'crossvit'")
        from_pretrained: Callable = CrossViTForImageClassification.from_pretrained
        model, loading = from_pretrained(
            checkpoint,
            revision=revision,
            dtype="auto",
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, with the other problems
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        raise ConversionError(f"{checkpoint} cannot be loaded: {str(error).splitlines()[0]}") from error
    for problem, names in loading.items():
        if names:
            raise ConversionError(f"{checkpoint} does not fit its config.json: {problem} {sorted(names)[:3]}")
    return model.eval()


def open_checkpoint(folder: Path) -> CrossViTForImageClassification:
    """The classifier of a folder, its weights left on the disk until they are used."""
    with torch.device("meta"):
        model = CrossViTForImageClassification(CrossViTConfig.from_pretrained(folder))
    model.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    return model.eval()


def reference_tensors(model: CrossViTForImageClassification, format_name: str = "timm") -> dict[str, torch.Tensor]:
    """The weights of a model by the names that they have in a format of the reference."""
    return {
        from_transformers_name(name, model.config, format_name): tensor for name, tensor in model.state_dict().items()
    }
