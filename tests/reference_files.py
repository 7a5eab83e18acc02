"""For the tests of the conversion: checkpoints of the reference as users hold them, and comparisons with them."""

import json
from pathlib import Path

import timm
import torch
from timm.models.crossvit import CrossVit
from timm_reference import perturb
from weight_names import FORMATS, WEIGHT_NAMES, translations

from crossvit import CrossViTForImageClassification


# Two small branches that differ in every number. The heads are 2 and 4, which only the user can know.
SMALL = {
    "img_size": 36,
    "img_scale": (1.0, 32 / 36),
    "patch_size": (6, 8),
    "embed_dim": (24, 32),
    "depth": ((1, 2, 0), (2, 2, 0)),
    "num_heads": (2, 4),
    "mlp_ratio": (2.0, 3.0),
    "num_classes": 5,
}
HEADS = ("--num-heads", 2, 4)


def small_timm(**options) -> CrossVit:
    return perturb(timm.create_model("crossvit_15_240", **{**SMALL, **options})).eval()


def renamed(model: torch.nn.Module, format_name: str) -> dict[str, torch.Tensor]:
    """The weights of a model of timm's by the names of another format."""
    rows = [(template, FORMATS[format_name].get(template, template)) for template in WEIGHT_NAMES]
    return {next(translations(name, rows)): weight for name, weight in model.state_dict().items()}


def save_timm_folder(model: torch.nn.Module, folder: Path, **changes) -> Path:
    """A folder as timm publishes it, with some changes of its config.json."""
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def assert_equal_logits(checkpoint: Path, reference: torch.nn.Module):
    model = CrossViTForImageClassification.from_pretrained(checkpoint).eval().float()
    size = model.config.image_sizes[0]
    for height, width in (size, (50, 70)):
        pixel_values = torch.randn(2, model.config.num_channels, height, width)
        # The same bound as in test_parity_timm.py, which says why
        torch.testing.assert_close(
            model(pixel_values).logits, reference.float()(pixel_values), atol=1e-5, rtol=0, check_dtype=False
        )


def assert_same_bytes(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape
        assert torch.equal(tensor.view(torch.uint8), expected[name].contiguous().view(torch.uint8)), name
