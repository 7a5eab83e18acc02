"""
The names of CrossViT's weights in the reference's checkpoints and in Transformers', in both directions.

`{b}` is a branch, `{s}` a stage, `{l}` a layer, `{n}` a cross-attention layer and `{p}` "weight" or "bias". Every
weight fits exactly one row.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cache

from commands import ConversionError, some
from transformers import PreTrainedConfig


EMBEDDINGS = "crossvit.embeddings.{b}"
LAYER = "crossvit.stages.{s}.branches.{b}.layers.{l}"
FUSION = "crossvit.stages.{s}.fusions.{b}"

WEIGHT_NAMES = {
    # timm: Transformers
    "cls_token_{b}": f"{EMBEDDINGS}.cls_token",
    "pos_embed_{b}": f"{EMBEDDINGS}.position_embeddings",
    "patch_embed.{b}.proj.{p}": f"{EMBEDDINGS}.patch_embeddings.projection.{{p}}",
    # or, in the dagger variants (between the convolutions are ReLUs)
    "patch_embed.{b}.proj.0.{p}": f"{EMBEDDINGS}.patch_embeddings.convolutions.0.{{p}}",
    "patch_embed.{b}.proj.2.{p}": f"{EMBEDDINGS}.patch_embeddings.convolutions.1.{{p}}",
    "patch_embed.{b}.proj.4.{p}": f"{EMBEDDINGS}.patch_embeddings.convolutions.2.{{p}}",
    "blocks.{s}.blocks.{b}.{l}.norm1.{p}": f"{LAYER}.layernorm_before.{{p}}",
    "blocks.{s}.blocks.{b}.{l}.attn.qkv.{p}": f"{LAYER}.attention.qkv.{{p}}",
    "blocks.{s}.blocks.{b}.{l}.attn.proj.{p}": f"{LAYER}.attention.o_proj.{{p}}",
    "blocks.{s}.blocks.{b}.{l}.norm2.{p}": f"{LAYER}.layernorm_after.{{p}}",
    "blocks.{s}.blocks.{b}.{l}.mlp.fc1.{p}": f"{LAYER}.mlp.fc1.{{p}}",
    "blocks.{s}.blocks.{b}.{l}.mlp.fc2.{p}": f"{LAYER}.mlp.fc2.{{p}}",
    "blocks.{s}.projs.{b}.0.{p}": f"{FUSION}.projection.layernorm.{{p}}",
    "blocks.{s}.projs.{b}.2.{p}": f"{FUSION}.projection.dense.{{p}}",
    # the only cross-attention layer, where the last number of the stage's depth is 0 (as in the published models)
    "blocks.{s}.fusion.{b}.norm1.{p}": f"{FUSION}.layers.0.layernorm.{{p}}",
    "blocks.{s}.fusion.{b}.attn.wq.{p}": f"{FUSION}.layers.0.attention.q_proj.{{p}}",
    "blocks.{s}.fusion.{b}.attn.wk.{p}": f"{FUSION}.layers.0.attention.k_proj.{{p}}",
    "blocks.{s}.fusion.{b}.attn.wv.{p}": f"{FUSION}.layers.0.attention.v_proj.{{p}}",
    "blocks.{s}.fusion.{b}.attn.proj.{p}": f"{FUSION}.layers.0.attention.o_proj.{{p}}",
    # one of the cross-attention layers, where that number is 1 or more
    "blocks.{s}.fusion.{b}.{n}.norm1.{p}": f"{FUSION}.layers.{{n}}.layernorm.{{p}}",
    "blocks.{s}.fusion.{b}.{n}.attn.wq.{p}": f"{FUSION}.layers.{{n}}.attention.q_proj.{{p}}",
    "blocks.{s}.fusion.{b}.{n}.attn.wk.{p}": f"{FUSION}.layers.{{n}}.attention.k_proj.{{p}}",
    "blocks.{s}.fusion.{b}.{n}.attn.wv.{p}": f"{FUSION}.layers.{{n}}.attention.v_proj.{{p}}",
    "blocks.{s}.fusion.{b}.{n}.attn.proj.{p}": f"{FUSION}.layers.{{n}}.attention.o_proj.{{p}}",
    "blocks.{s}.revert_projs.{b}.0.{p}": f"{FUSION}.reverse_projection.layernorm.{{p}}",
    "blocks.{s}.revert_projs.{b}.2.{p}": f"{FUSION}.reverse_projection.dense.{{p}}",
    "norm.{b}.{p}": "crossvit.layernorms.{b}.{p}",
    "head.{b}.{p}": "classifier.heads.{b}.{p}",
}

# Where other checkpoints differ from timm's names
FORMATS = {
    "timm": {},
    "ibm": {"cls_token_{b}": "cls_token.{b}", "pos_embed_{b}": "pos_embed.{b}"},
    "lucid-dl": {name: name.replace("blocks.{s}", "stages.{s}") for name in WEIGHT_NAMES if "{s}" in name},
}

# What DataParallel, DistributedDataParallel and torch.compile put in front of all names
WRAPPERS = ("module.", "_orig_mod.")


@cache
def pattern(template: str) -> re.Pattern:
    """The names that a template stands for, its placeholders as groups."""
    expression = re.escape(template).replace(r"\{p\}", "(?P<p>weight|bias)")
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>0|[1-9][0-9]*)", expression))


def translations(name: str, table: Iterable[tuple[str, str]]) -> Iterator[str]:
    """What the rows (template of `name`, template of the result) make of a name."""
    for template, target in table:
        if match := pattern(template).fullmatch(name):
            yield target.format(**match.groupdict())


def to_timm_names(names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """
    Recognises the format of a checkpoint by the names of its tensors.

    Returns:
        `tuple[str, dict[str, str]]`: the key of the format in `FORMATS`, and timm's name for each of `names`.

    Raises:
        `ConversionError`: for names that are not all those of one format.
    """
    names = list(names)
    prefix = ""
    while wrapper := next((w for w in WRAPPERS if names and all(n.startswith(prefix + w) for n in names)), None):
        prefix += wrapper

    recognised = {}
    for format_name, differences in FORMATS.items():
        table = [(differences.get(template, template), template) for template in WEIGHT_NAMES]
        found = {name: next(translations(name.removeprefix(prefix), table), None) for name in names}
        recognised[format_name] = {name: timm_name for name, timm_name in found.items() if timm_name}
    # Most of the names are common to all formats: the class tokens and the stages decide
    format_name = max(recognised, key=lambda candidate: len(recognised[candidate]))
    timm_names = recognised[format_name]

    unknown = [name for name in names if name not in timm_names]
    if len(timm_names) <= len(unknown):
        raise ConversionError(
            f"this is no CrossViT: {len(unknown)} of its {len(names)} tensors have names that no CrossViT has, such as"
            f" {some(unknown)}"
        )
    if unknown:
        raise ConversionError(
            f"it looks most like {format_name}'s CrossViT, which has no {some(unknown)}: such tensors are refused, not"
            " dropped"
        )
    return format_name, timm_names


def to_transformers_name(timm_name: str) -> str:
    """The name in `CrossViTForImageClassification` of a weight of timm's."""
    for name in translations(timm_name, WEIGHT_NAMES.items()):
        return name
    raise KeyError(timm_name)


def from_transformers_name(name: str, config: PreTrainedConfig, format_name: str = "timm") -> str:
    """The inverse: the name that a weight of `CrossViTForImageClassification` with `config` has in a format."""
    differences = FORMATS[format_name]
    rows = [(target, differences.get(template, template)) for template, target in WEIGHT_NAMES.items()]
    for reference_name in translations(name, rows):
        # A lone cross-attention layer fits two rows: whether it has an index is a matter of the depth
        stage = re.search(r"^(?:blocks|stages)\.(\d+)\.fusion\.\d+\.(\d+)?", reference_name)
        if stage is None or (stage[2] is not None) == (config.depth[int(stage[1])][-1] > 0):
            return reference_name
    raise KeyError(name)
