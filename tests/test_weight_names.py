"""The table of names: complete, unambiguous, and its own inverse."""

import pytest
import timm
import torch
from commands import ConversionError
from timm.models.crossvit import CrossVit
from variants import timm_name
from weight_names import (
    FORMATS,
    WEIGHT_NAMES,
    from_transformers_name,
    pattern,
    to_timm_names,
    to_transformers_name,
)

from crossvit import CrossViTConfig, CrossViTForImageClassification


def timm_shapes(variant: dict) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = timm.create_model(timm_name(variant))
    return {name: weight.shape for name, weight in model.state_dict().items()}


def our_shapes(config: CrossViTConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = CrossViTForImageClassification(config)
    return {name: weight.shape for name, weight in model.state_dict().items()}


def stacked_config(depth) -> CrossViTConfig:
    return CrossViTConfig(embed_dim=(24, 32), num_heads=(2, 4), depth=depth)


def test_every_weight_of_timm_fits_one_row_and_becomes_one_of_ours(variant):
    shapes = timm_shapes(variant)
    for name in shapes:
        assert sum(pattern(template).fullmatch(name) is not None for template in WEIGHT_NAMES) == 1, name
    # Transposed weights of square shape aside, equal shapes under every name leave nothing to chance but the table
    assert {to_transformers_name(name): shape for name, shape in shapes.items()} == our_shapes(
        CrossViTConfig(**variant["config"], num_labels=1000)
    )


def test_every_row_is_used():
    with torch.device("meta"):
        models = [CrossVit(depth=((1, 1, 0), (1, 1, 2))), CrossVit(patch_size=(12, 16), img_size=240, multi_conv=True)]
    names = [name for model in models for name in model.state_dict()]
    for template in WEIGHT_NAMES:
        assert any(pattern(template).fullmatch(name) for name in names), template
    assert {template for names in FORMATS.values() for template in names} < WEIGHT_NAMES.keys()


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("depth", [((1, 2, 0), (1, 1, 0)), ((1, 1, 1),), ((2, 1, 0), (1, 1, 3), (1, 2, 1))])
def test_names_there_and_back(format_name, depth):
    config = stacked_config(depth)
    ours = list(our_shapes(config))
    theirs = [from_transformers_name(name, config, format_name) for name in ours]
    assert len(set(theirs)) == len(ours)
    recognised, timm_names = to_timm_names(theirs)
    assert recognised == format_name
    assert [to_transformers_name(timm_names[name]) for name in theirs] == ours


def test_formats_are_named_as_their_authors_do():
    config = stacked_config(((1, 1, 0), (1, 1, 2)))
    expected = {
        "crossvit.embeddings.1.cls_token": ("cls_token_1", "cls_token.1", "cls_token_1"),
        "crossvit.embeddings.0.position_embeddings": ("pos_embed_0", "pos_embed.0", "pos_embed_0"),
        "crossvit.stages.0.fusions.1.layers.0.attention.q_proj.weight": (
            "blocks.0.fusion.1.attn.wq.weight",
            "blocks.0.fusion.1.attn.wq.weight",
            "stages.0.fusion.1.attn.wq.weight",
        ),
        "crossvit.stages.1.fusions.1.layers.0.attention.q_proj.weight": (
            "blocks.1.fusion.1.0.attn.wq.weight",
            "blocks.1.fusion.1.0.attn.wq.weight",
            "stages.1.fusion.1.0.attn.wq.weight",
        ),
        "crossvit.stages.1.branches.0.layers.0.mlp.fc2.bias": (
            "blocks.1.blocks.0.0.mlp.fc2.bias",
            "blocks.1.blocks.0.0.mlp.fc2.bias",
            "stages.1.blocks.0.0.mlp.fc2.bias",
        ),
    }
    for name, names in expected.items():
        assert tuple(from_transformers_name(name, config, format_name) for format_name in FORMATS) == names


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrapped_models_are_dropped(prefix):
    config = stacked_config(((1, 1, 0),))
    theirs = [from_transformers_name(name, config, "ibm") for name in our_shapes(config)]
    assert to_timm_names(prefix + name for name in theirs)[1] == {
        prefix + name: timm_name for name, timm_name in to_timm_names(theirs)[1].items()
    }


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda names: [*names, "blocks.0.norm1.weight"], "blocks.0.norm1.weight"),
        (lambda names: ["cls_token.0" if name == "cls_token_0" else name for name in names], "cls_token.0"),
        (lambda names: ["module." + names[0], *names[1:]], "module."),
        (lambda names: ["cls_token", "pos_embed", "blocks.0.norm1.weight"], "no CrossViT"),
        (lambda names: [], "no CrossViT"),
    ],
    ids=["one more", "mixed formats", "prefix of one", "ViT", "nothing"],
)
def test_other_names_are_refused(change, message):
    config = stacked_config(((1, 1, 0),))
    names = [from_transformers_name(name, config) for name in our_shapes(config)]
    with pytest.raises(ConversionError, match=message):
        to_timm_names(change(names))
