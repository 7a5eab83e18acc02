"""The eleven published checkpoints."""

import json
from pathlib import Path
from typing import Any

from crossvit import CrossViTConfig


VARIANTS: dict[str, dict[str, Any]] = {
    variant["name"]: variant for variant in json.loads((Path(__file__).parent / "variants.json").read_text("utf-8"))
}
IBM_RELEASE = "https://github.com/IBM/CrossViT/releases/download/weights-0.1/"


def variant_config(variant: dict[str, Any]) -> CrossViTConfig:
    return CrossViTConfig(**variant["config"])


def timm_name(variant: dict[str, Any]) -> str:
    """The name of a variant's architecture in timm: `crossvit_15_240`."""
    return variant["timm_id"].removeprefix("timm/").split(".")[0]
