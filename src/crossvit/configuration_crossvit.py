# Copyright 2026 The CrossViT for Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""CrossViT model configuration"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from .remote_code import RemoteCodeMixin
from .timm_checkpoints import is_timm_config, read_model_config


IntSequence = tuple[int, ...] | list[int]
FloatSequence = tuple[float | int, ...] | list[float | int]

TUPLE_FIELDS = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")


def to_tuple(value: Any) -> Any:
    """Turns lists into tuples, nested ones too: JSON knows only lists."""
    return tuple(to_tuple(item) for item in value) if isinstance(value, (list, tuple)) else value


@strict
class CrossViTConfig(RemoteCodeMixin, BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a CrossViT model ([CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image
    Classification](https://huggingface.co/papers/2103.14899)). The defaults are those of `crossvit_15`.

    CrossViT runs several *branches* side by side, each a ViT with its own patch size, width and image size, the branch
    with the smallest patches first. At the end of every *stage* the class token of each branch attends to the patches
    of the next branch (*fusion*). Arguments with an entry per branch are in the order of the branches.

    Args:
        image_size (`int` or `tuple`, *optional*, defaults to `(240, 224)`):
            Native size of each branch in pixels: an `int` (square) or `(height, width)` per branch, or one `int` for
            all of them. A branch resizes inputs of another size to its own (bicubic, not antialiased). Pixels beyond
            the last whole patch are ignored, as in ViT.
        patch_size (`tuple[int, ...]`, *optional*, defaults to `(12, 16)`):
            Side of the square patches of each branch, in pixels.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the input image.
        embed_dim (`tuple[int, ...]`, *optional*, defaults to `(192, 384)`):
            Width of the tokens of each branch. Its length is the number of branches, two or more.
        depth (`tuple[tuple[int, ...], ...]`, *optional*, defaults to `((1, 5, 0), (1, 5, 0), (1, 5, 0))`):
            Per stage, the number of Transformer layers of each branch followed by the number of cross-attention layers
            of each fusion, where 0 and 1 both mean one (the checkpoints of the reference say 0). A branch can have 0
            layers in a stage.
        num_heads (`tuple[int, ...]`, *optional*, defaults to `(6, 6)`):
            Attention heads of each branch. A fusion has as many as the branch that it attends to.
        mlp_ratio (`tuple[float, ...]`, *optional*, defaults to `(3.0, 3.0, 1.0)`):
            Ratio of the width of the MLPs to `embed_dim` in each branch. One more entry is accepted and not used: the
            configurations of the reference have one for the fusions, which have no MLP.
        qkv_bias (`bool`, *optional*, defaults to `True`):
            Whether queries, keys and values have a bias.
        multi_conv (`bool`, *optional*, defaults to `False`):
            Whether three convolutions embed the patches instead of one (the "dagger" variants). Defined for patch
            sizes 12 and 16, image sizes that are multiples of them and widths of 4 or more.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation function of the MLPs and of the projections of the class tokens.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout after the position embeddings, the attention projections and both layers of the MLPs.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout of the attention weights.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth rate of the last layer; the rates rise linearly from 0 in the first. The paper trains with
            0.1.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the truncated normal that initializes linear layers, class tokens and position
            embeddings. Convolutions keep PyTorch's default initialization, as in the reference.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of the layer normalizations.
        out_features (`list[str]`, *optional*):
            For [`CrossViTBackbone`]: which of `stage_names` to output, in that order. Defaults to the last one. The
            names are `stem_0, stem_1, stage1_0, stage1_1, ...`: the stage, then the branch.
        out_indices (`list[int]`, *optional*):
            The same by position in `stage_names`.

    `img_size`, `num_classes` and `num_attention_heads` are aliases of `image_size`, `num_labels` and `num_heads`.

    Raises:
        `ValueError`: if values are out of range or do not fit each other. Values that are assigned later are checked
            when a model is built from the configuration.
        `huggingface_hub.errors.StrictDataclassError`: if a value has the wrong type.
        `AttributeError`: if a derived value, such as `hidden_size`, is set.

    Example:

    ```python
    >>> from crossvit import CrossViTConfig, CrossViTModel

    >>> # A crossvit_15 style configuration, and a model with random weights from it
    >>> configuration = CrossViTConfig()
    >>> model = CrossViTModel(configuration)
    >>> configuration = model.config
    ```"""

    model_type = "crossvit"
    attribute_map = {"img_size": "image_size", "num_classes": "num_labels", "num_attention_heads": "num_heads"}
    keys_to_ignore_at_inference = ["branch_logits", "hidden_states", "attentions", "cross_attentions"]
    # The fused queries, keys and values of the branches cannot be split by heads
    base_model_tp_plan = {
        "stages.*.branches.*.layers.*.mlp.fc1": "colwise",
        "stages.*.branches.*.layers.*.mlp.fc2": "rowwise",
        "stages.*.fusions.*.layers.*.attention.q_proj": "colwise",
        "stages.*.fusions.*.layers.*.attention.k_proj": "colwise",
        "stages.*.fusions.*.layers.*.attention.v_proj": "colwise",
        "stages.*.fusions.*.layers.*.attention.o_proj": "rowwise",
    }
    base_model_fsdp_plan = {
        "embeddings.*": "free_full_weight",
        "stages.*.branches.*.layers.*": "free_full_weight",
        "stages.*.fusions.*": "free_full_weight",
        "layernorms.*": "keep_full_weight",
    }

    image_size: int | tuple[int | IntSequence, ...] | list[int | IntSequence] = (240, 224)
    patch_size: IntSequence = (12, 16)
    num_channels: int = 3
    embed_dim: IntSequence = (192, 384)
    depth: tuple[IntSequence, ...] | list[IntSequence] = ((1, 5, 0), (1, 5, 0), (1, 5, 0))
    num_heads: IntSequence = (6, 6)
    mlp_ratio: FloatSequence = (3.0, 3.0, 1.0)
    qkv_bias: bool = True
    multi_conv: bool = False
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-6

    def __post_init__(self, **kwargs):
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        super().__post_init__(**kwargs)
        self.validate_architecture()
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)

    def __setattr__(self, name: str, value: Any):
        if name in self.attribute_map:
            # Assign again by the real name, so that the type is checked
            return setattr(self, self.attribute_map[name], value)
        if name not in TUPLE_FIELDS:
            return super().__setattr__(name, value)
        # By default the output feature is the last one, which another `depth` may have changed
        has_default_features = "_out_features" in self.__dict__ and self._out_features == self.stage_names[-1:]
        super().__setattr__(name, to_tuple(value))
        if has_default_features and self.stage_names:
            self.set_output_features_output_indices(None, None)

    def validate_architecture(self):
        """Part of `@strict`-powered validation. Checks that the values are in range and fit each other."""

        def require(valid: bool, names: str, requirement: str):
            if not valid:
                values = {name: getattr(self, name) for name in names.split()}
                raise ValueError(f"{requirement}, got {values if len(values) > 1 else repr(values[names])}.")

        branches, sizes = self.num_branches, self.image_sizes
        require(branches >= 2, "embed_dim", "`embed_dim` must have a width for each of two or more branches")
        for name, optional_entries in (("patch_size", 0), ("num_heads", 0), ("mlp_ratio", 1)):
            valid = branches <= len(getattr(self, name)) <= branches + optional_entries
            require(valid, name, f"`{name}` must have an entry for each of the {branches} branches")
        require(
            len(sizes) == branches and all(len(size) == 2 and min(size) > 0 for size in sizes),
            "image_size",
            f"`image_size` must be one int, or an int or (height, width) for each of the {branches} branches, above 0",
        )
        require(
            len(self.depth) > 0 and all(len(stage) == branches + 1 and min(stage) >= 0 for stage in self.depth),
            "depth",
            f"`depth` must have stages with the layers of each of the {branches} branches and then the cross-attention"
            f" layers, none negative, such as {(1,) * branches + (0,)}",
        )
        for name in ("embed_dim", "num_heads", "patch_size", "mlp_ratio"):
            require(all(value > 0 for value in getattr(self, name)), name, f"`{name}` must be positive in each branch")
        for name in ("num_channels", "initializer_range", "layer_norm_eps"):
            require(getattr(self, name) > 0, name, f"`{name}` must be positive")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            require(0 <= getattr(self, name) < 1, name, f"`{name}` must be at least 0 and below 1")
        require(self.hidden_act in ACT2FN, "hidden_act", f"`hidden_act` must be one of {', '.join(ACT2FN)}")

        for width, heads, size, patch in zip(self.embed_dim, self.num_heads, sizes, self.patch_size):
            require(width % heads == 0, "embed_dim num_heads", "`embed_dim` must be a multiple of `num_heads`")
            require(min(size) >= patch, "patch_size image_size", "`patch_size` must not be larger than `image_size`")
            # Class PatchEmbed of the authors' models/crossvit.py defines these two patch sizes
            require(
                not self.multi_conv or (patch in (12, 16) and not any(side % patch for side in size) and width >= 4),
                "patch_size image_size embed_dim",
                "`multi_conv` needs patches of 12 or 16 pixels, images of whole patches and widths of 4 or more",
            )

    @property
    def num_branches(self) -> int:
        """`int`: the number of branches."""
        return len(self.embed_dim)

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        """`tuple[tuple[int, int], ...]`: the native (height, width) of each branch, from `image_size`."""
        sizes = (self.image_size,) * self.num_branches if isinstance(self.image_size, int) else self.image_size
        return tuple((size, size) if isinstance(size, int) else size for size in sizes)  # type: ignore[misc]

    @property
    def hidden_size(self) -> int:
        """`int`: the width of `last_hidden_state`, the tokens of the last branch."""
        return self.embed_dim[-1]

    @property
    def num_hidden_layers(self) -> int:
        """`int`: the number of stages."""
        return len(self.depth)

    @property
    def stage_names(self) -> list[str]:
        """`list[str]`: the names of the hidden states in their order, stage by stage and branch by branch."""
        stages = ["stem"] + [f"stage{stage}" for stage in range(1, self.num_hidden_layers + 1)]
        return [f"{stage}_{branch}" for stage in stages for branch in range(self.num_branches)]

    @property
    def num_hidden_states(self) -> int:
        """`int`: the number of hidden states, one per branch of the stem and of each stage."""
        return len(self.stage_names)

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As [`~PreTrainedConfig.get_config_dict`], and for the config.json of a timm checkpoint."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if is_timm_config(config_dict):
            # The commit, which later releases of Transformers do not pass on this way
            commit = {name: value for name, value in config_dict.items() if name == "_commit_hash"}
            config_dict = {**read_model_config(config_dict), **commit}
        return config_dict, kwargs

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        # The default depends on `depth`: saved, it would contradict another `depth` that is passed when loading
        if output["out_features"] == self.stage_names[-1:]:
            del output["out_features"], output["out_indices"]
        return output


__all__ = ["CrossViTConfig"]
