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
"""
PyTorch CrossViT model.

CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification (Chen, Fan, Panda, ICCV 2021,
arXiv:2103.14899). Reproduces the authors' code (IBM/CrossViT, models/crossvit.py) and timm's
(timm/models/crossvit.py).

- branch: a ViT with its own image size, patch size, width, class token and position embeddings. The paper has two:
  small patches ("S-branch", 0) and large patches ("L-branch", the last).
- stage: some layers of each branch, then a fusion of each branch (the paper's multi-scale encoder, figure 2).
- fusion: the class token of a branch is projected to the width of the next branch, attends to its patches and is
  projected back (cross-attention, section 3.3, figure 4).
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_crossvit import CrossViTConfig
from .timm_checkpoints import KEY_MAPPING


@dataclass
class CrossViTModelOutput(ModelOutput):
    """
    Output of [`CrossViTModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, 1 + num_patches, embed_dim[-1])`):
            Tokens of the last branch after its layer norm, the class token first.
        pooler_output (`torch.FloatTensor` of shape `(batch_size, sum(embed_dim))`):
            Class tokens of all branches after their layer norms, concatenated in the order of the branches.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, returned when `output_hidden_states=True`):
            Tokens of each branch after the embeddings and after each stage, before any final layer norm, in the order
            of `config.stage_names` (stage, then branch), each of shape `(batch_size, 1 + num_patches,
            embed_dim[branch])`.
        attentions (`tuple(torch.FloatTensor)`, *optional*, returned when `output_attentions=True`):
            Self-attention weights in the order stage, branch, layer, each of shape `(batch_size, num_heads[branch],
            1 + num_patches, 1 + num_patches)`. Only `attn_implementation="eager"` returns them; the tuple of others is
            empty.
        cross_attentions (`tuple(torch.FloatTensor)`, *optional*, returned when `output_attentions=True`):
            Cross-attention weights of the fusions in the order stage, branch, layer: from the class token of a branch
            to itself and the patches of the next branch, each of shape `(batch_size, num_heads[next branch], 1, 1 +
            num_patches[next branch])`. With more than one cross-attention layer, those of the later ones are of shape
            `(batch_size, num_heads[next branch], 1, 1)`.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class CrossViTImageClassifierOutput(ModelOutput):
    """
    Output of [`CrossViTForImageClassification`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
            Classification (or regression if `config.num_labels == 1`) loss.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`):
            Scores before softmax, the mean of `branch_logits`; the `pooler_output` of the model if `num_labels == 0`.
        branch_logits (`torch.FloatTensor` of shape `(batch_size, num_branches, num_labels)`):
            Scores of the head of each branch; `None` if `num_labels == 0`.
        hidden_states, attentions, cross_attentions:
            As in [`CrossViTModelOutput`].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    branch_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


class CrossViTBranchTokens(nn.Module):
    """Base class of the modules that return all tokens of a branch, which `output_hidden_states` records."""


class CrossViTPatchEmbeddings(nn.Module):
    """`(batch_size, num_channels, height, width)` -> `(batch_size, num_patches, embed_dim)`, linear in each patch."""

    def __init__(self, config: CrossViTConfig, branch: int):
        super().__init__()
        patch_size = config.patch_size[branch]
        self.projection = nn.Conv2d(
            config.num_channels, config.embed_dim[branch], kernel_size=patch_size, stride=patch_size
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class CrossViTConvPatchEmbeddings(nn.Module):
    """As [`CrossViTPatchEmbeddings`], by three convolutions with ReLU in between: the paper's "dagger" variants."""

    # patch size -> kernel size, stride and padding of each convolution
    convolutions_by_patch_size = {
        12: ((7, 4, 3), (3, 3, 0), (3, 1, 1)),
        16: ((7, 4, 3), (3, 2, 1), (3, 2, 1)),
    }

    def __init__(self, config: CrossViTConfig, branch: int):
        super().__init__()
        embed_dim = config.embed_dim[branch]
        channels = (config.num_channels, embed_dim // 4, embed_dim // 2, embed_dim)
        convolutions = self.convolutions_by_patch_size[config.patch_size[branch]]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels[i], channels[i + 1], kernel_size=kernel_size, stride=stride, padding=padding)
            for i, (kernel_size, stride, padding) in enumerate(convolutions)
        )
        self.activation_fn = nn.ReLU()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.convolutions[0](pixel_values)
        for convolution in self.convolutions[1:]:
            hidden_states = convolution(self.activation_fn(hidden_states))
        return hidden_states.flatten(2).transpose(1, 2)


class CrossViTEmbeddings(CrossViTBranchTokens):
    """Resizes the images of a branch to its size and embeds their patches, after the class token."""

    def __init__(self, config: CrossViTConfig, branch: int):
        super().__init__()
        self.patch_size = config.patch_size[branch]
        self.image_size = config.image_sizes[branch]
        self.first_image_size = config.image_sizes[0]

        num_patches = math.prod(self.get_grid_size(self.image_size))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim[branch]))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + num_patches, config.embed_dim[branch]))
        # trf-ignore: TRF041 the dagger checkpoints (crossvit_*_dagger_*) have `multi_conv`, the others do not
        patch_embeddings_class = CrossViTConvPatchEmbeddings if config.multi_conv else CrossViTPatchEmbeddings
        self.patch_embeddings: nn.Module = patch_embeddings_class(config, branch)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def get_image_size(self, height: int, width: int, interpolate_pos_encoding: bool) -> tuple[int, int]:
        """The (height, width) in pixels to which this branch resizes images of `height` x `width`."""
        if not interpolate_pos_encoding or (height, width) == self.first_image_size:
            return self.image_size
        # The first branch keeps the size of the input and each branch its ratio to the first, in whole patches
        scaled_height, scaled_width = (
            max(1, (2 * side * native + first * self.patch_size) // (2 * first * self.patch_size)) * self.patch_size
            for side, native, first in zip((height, width), self.image_size, self.first_image_size)
        )
        return scaled_height, scaled_width

    def get_grid_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The (rows, columns) of patches of an image of (height, width) pixels."""
        return image_size[0] // self.patch_size, image_size[1] // self.patch_size

    def interpolate_pos_encoding(self, grid_size: tuple[int, int]) -> torch.Tensor:
        """The position embeddings for (rows, columns) of patches, interpolated bicubically from the native ones."""
        native_grid_size = self.get_grid_size(self.image_size)
        if grid_size == native_grid_size:
            return self.position_embeddings
        class_position, patch_positions = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        # (1, rows * columns, dim) -> (1, dim, rows, columns) and back
        patch_positions = patch_positions.transpose(1, 2).unflatten(2, native_grid_size)
        patch_positions = nn.functional.interpolate(
            patch_positions, size=grid_size, mode="bicubic", align_corners=False
        )
        return torch.cat((class_position, patch_positions.flatten(2).transpose(1, 2)), dim=1)

    def resize_position_embeddings(self, image_size: tuple[int, int], first_image_size: tuple[int, int]):
        """Changes the native (height, width) of this branch and what it knows of that of the first branch."""
        position_embeddings = self.interpolate_pos_encoding(self.get_grid_size(image_size)).detach().clone()
        self.position_embeddings = nn.Parameter(position_embeddings, self.position_embeddings.requires_grad)
        self.image_size = image_size
        self.first_image_size = first_image_size

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        batch_size, _, height, width = pixel_values.shape
        image_size = self.get_image_size(height, width, interpolate_pos_encoding)
        if (height, width) != image_size:
            pixel_values = nn.functional.interpolate(
                pixel_values, size=image_size, mode="bicubic", align_corners=False
            )

        patch_tokens = self.patch_embeddings(pixel_values.to(self.cls_token.dtype))
        embeddings = torch.cat((self.cls_token.expand(batch_size, -1, -1), patch_tokens), dim=1)
        embeddings = embeddings + self.interpolate_pos_encoding(self.get_grid_size(image_size))
        return self.dropout(embeddings)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask

    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)

    attn_output = torch.matmul(attn_weights, value)
    attn_output = attn_output.transpose(1, 2).contiguous()

    return attn_output, attn_weights


def is_plain_linear(module: nn.Module) -> bool:
    """
    Whether a projection is nothing but its weight and bias: not adapted, quantized, sharded or offloaded.

    Adapters and quantization replace the class or the parameter, sharding changes the shape or the type of the
    parameter, and accelerate marks modules that it offloads.
    """
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.shape == (module.in_features, module.in_features)
        and not hasattr(module, "_hf_hook")
    )


class CrossViTAttention(nn.Module):
    """Multi-head attention in the width of a branch; the subclasses project the queries, keys and values."""

    def __init__(self, config: CrossViTConfig, branch: int):
        super().__init__()
        self.config = config
        self.embed_dim = config.embed_dim[branch]
        self.num_heads = config.num_heads[branch]
        self.head_dim = self.embed_dim // self.num_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.o_proj = nn.Linear(self.embed_dim, self.embed_dim)

    def attend(
        self,
        query_states: torch.Tensor,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries, keys, values `(batch_size, num_heads, tokens, head_dim)` -> `(batch_size, queries, embed_dim)`"""
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attn_output.flatten(2)), attn_weights


class CrossViTSelfAttention(CrossViTAttention):
    """Self-attention of all tokens of a branch, with one projection for queries, keys and values."""

    def __init__(self, config: CrossViTConfig, branch: int):
        super().__init__(config, branch)
        self.qkv = nn.Linear(self.embed_dim, 3 * self.embed_dim, bias=config.qkv_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # (batch, tokens, 3 * dim) -> 3 x (batch, heads, tokens, head_dim)
        qkv_states = self.qkv(hidden_states).unflatten(2, (3, self.num_heads, self.head_dim))
        query_states, key_states, value_states = qkv_states.permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(query_states, key_states, value_states, attention_mask, **kwargs)


class CrossViTCrossAttention(CrossViTAttention):
    """
    Cross-attention of a fusion: the class token is the only query; keys and values are all tokens, itself included.

    With one query it takes about `head_dim` times fewer operations to project the query and the output than to project
    all tokens (`absorbed_attention`). `k_proj` and `v_proj` are not called then, only their weights are read, so that
    hooks on them do not run: choose `attn_implementation="eager"` if you need them.
    """

    def __init__(self, config: CrossViTConfig, branch: int):
        super().__init__(config, branch)
        self.q_proj = nn.Linear(self.embed_dim, self.embed_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(self.embed_dim, self.embed_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(self.embed_dim, self.embed_dim, bias=config.qkv_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if attention_mask is None and self.can_absorb_projections():
            return self.absorbed_attention(hidden_states), None

        # (batch, tokens, dim) -> (batch, heads, tokens, head_dim), with one query; under tensor parallelism the heads
        # are divided among the devices
        head_shape = (-1, self.head_dim)
        query_states = self.q_proj(hidden_states[:, :1]).unflatten(2, head_shape).transpose(1, 2)
        key_states = self.k_proj(hidden_states).unflatten(2, head_shape).transpose(1, 2)
        value_states = self.v_proj(hidden_states).unflatten(2, head_shape).transpose(1, 2)
        return self.attend(query_states, key_states, value_states, attention_mask, **kwargs)

    def can_absorb_projections(self) -> bool:
        # trf-ignore: TRF051 the other implementations return attention weights or were chosen for their kernels
        is_implied = self.config._attn_implementation in ("sdpa", "blockwise")
        # Dropped weights do not sum to one, so that the bias of `v_proj` could not be added at the end
        has_dropout = self.training and self.attention_dropout > 0.0
        return is_implied and not has_dropout and is_plain_linear(self.k_proj) and is_plain_linear(self.v_proj)

    def absorbed_attention(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        The same output with the projections of the tokens x_n, whose attention weights are p_n, absorbed into those of
        the query q and of the output:

            (W_k x_n + b_k) . q = x_n . (W_k^T q) + b_k . q
            sum_n p_n (W_v x_n + b_v) = W_v (sum_n p_n x_n) + b_v
        """
        # (dim, dim) -> (heads, head_dim, dim)
        head_shape = (self.num_heads, self.head_dim)
        key_weight, value_weight = (proj.weight.unflatten(0, head_shape) for proj in (self.k_proj, self.v_proj))

        # (batch, 1, dim) -> (heads, batch, head_dim) -> (batch, heads, dim) -> (batch, heads, tokens)
        query_states = self.q_proj(hidden_states[:, :1]) * self.scaling
        query_states = query_states.flatten(1).unflatten(1, head_shape).transpose(0, 1)
        absorbed_query = torch.bmm(query_states, key_weight).transpose(0, 1)
        attn_weights = torch.bmm(absorbed_query, hidden_states.transpose(1, 2))
        if self.k_proj.bias is not None:  # Cancelled by the softmax, but DDP wants a gradient for every parameter
            key_bias = self.k_proj.bias.unflatten(0, head_shape).unsqueeze(2)
            attn_weights = attn_weights + torch.bmm(query_states, key_bias).transpose(0, 1)
        attn_weights = attn_weights.softmax(dim=-1)

        # (batch, heads, tokens) -> (heads, batch, dim) -> (heads, batch, head_dim) -> (batch, 1, dim)
        mean_tokens = torch.bmm(attn_weights, hidden_states).transpose(0, 1)
        attn_output = torch.bmm(mean_tokens, value_weight.transpose(1, 2))
        attn_output = attn_output.transpose(0, 1).flatten(1).unsqueeze(1)
        if self.v_proj.bias is not None:
            attn_output = attn_output + self.v_proj.bias
        return self.o_proj(attn_output)


class CrossViTMLP(nn.Module):
    def __init__(self, config: CrossViTConfig, branch: int):
        super().__init__()
        embed_dim = config.embed_dim[branch]
        intermediate_size = int(embed_dim * config.mlp_ratio[branch])
        self.fc1 = nn.Linear(embed_dim, intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(intermediate_size, embed_dim)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.fc1(hidden_states)
        hidden_states = self.dropout(self.activation_fn(hidden_states))
        hidden_states = self.fc2(hidden_states)
        return self.dropout(hidden_states)


class CrossViTDropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): in training, drops a residual branch for some of the samples."""

    def __init__(self, drop_path_rate: float):
        super().__init__()
        self.drop_path_rate = drop_path_rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.drop_path_rate == 0.0 or not self.training:
            return hidden_states
        keep_rate = 1 - self.drop_path_rate
        kept = hidden_states.new_empty((hidden_states.shape[0], 1, 1)).bernoulli_(keep_rate)
        return hidden_states * kept / keep_rate

    def extra_repr(self) -> str:
        return f"drop_path_rate={self.drop_path_rate}"


class CrossViTLayer(GradientCheckpointingLayer):
    """A pre-norm Transformer layer of one branch, as in ViT."""

    def __init__(self, config: CrossViTConfig, branch: int, drop_path_rate: float):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.embed_dim[branch], eps=config.layer_norm_eps)
        self.attention = CrossViTSelfAttention(config, branch)
        self.layernorm_after = nn.LayerNorm(config.embed_dim[branch], eps=config.layer_norm_eps)
        self.mlp = CrossViTMLP(config, branch)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = CrossViTDropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        # Self Attention
        residual = hidden_states
        hidden_states = self.layernorm_before(hidden_states)
        hidden_states, _ = self.attention(hidden_states, **kwargs)
        hidden_states = self.dropout(hidden_states)
        hidden_states = residual + self.drop_path(hidden_states)

        # Fully Connected
        residual = hidden_states
        hidden_states = self.layernorm_after(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual + self.drop_path(hidden_states)

        return hidden_states


class CrossViTBranch(nn.Module):
    """The layers of one branch in one stage. Without layers it returns its input."""

    def __init__(self, config: CrossViTConfig, branch: int, depth: int, drop_path_rates: list[float]):
        super().__init__()
        self.layers = nn.ModuleList(CrossViTLayer(config, branch, drop_path_rates[layer]) for layer in range(depth))

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return hidden_states


class CrossViTProjection(nn.Module):
    """Projects a class token from the width of one branch to that of another."""

    def __init__(self, config: CrossViTConfig, branch: int, target_branch: int):
        super().__init__()
        self.layernorm = nn.LayerNorm(config.embed_dim[branch], eps=config.layer_norm_eps)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.dense = nn.Linear(config.embed_dim[branch], config.embed_dim[target_branch])

    def forward(self, cls_token: torch.Tensor) -> torch.Tensor:
        return self.dense(self.activation_fn(self.layernorm(cls_token)))


class CrossViTCrossAttentionLayer(GradientCheckpointingLayer):
    """A pre-norm cross-attention layer in the width of the branch that it attends to. It has no MLP."""

    def __init__(self, config: CrossViTConfig, branch: int, drop_path_rate: float):
        super().__init__()
        self.layernorm = nn.LayerNorm(config.embed_dim[branch], eps=config.layer_norm_eps)
        self.attention = CrossViTCrossAttention(config, branch)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = CrossViTDropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        # (batch, tokens, dim) -> (batch, 1, dim): only the class token is updated
        residual = hidden_states[:, :1]
        hidden_states = self.layernorm(hidden_states)
        hidden_states, _ = self.attention(hidden_states, **kwargs)
        hidden_states = self.dropout(hidden_states)
        hidden_states = residual + self.drop_path(hidden_states)

        return hidden_states


class CrossViTFusion(CrossViTBranchTokens):
    """
    Fuses the class token of a branch with the patches of the next branch.

    With more than one cross-attention layer only the first attends to the patches: it returns the class token only,
    which then attends to itself in the others. The reference does the same, and its weights expect it.
    """

    def __init__(self, config: CrossViTConfig, branch: int, depth: int, drop_path_rate: float):
        super().__init__()
        next_branch = (branch + 1) % config.num_branches
        self.projection = CrossViTProjection(config, branch, next_branch)
        self.layers = nn.ModuleList(
            CrossViTCrossAttentionLayer(config, next_branch, drop_path_rate) for _ in range(depth)
        )
        self.reverse_projection = CrossViTProjection(config, next_branch, branch)

    def forward(
        self,
        hidden_states: torch.Tensor,
        next_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        cls_token, patch_tokens = hidden_states[:, :1], hidden_states[:, 1:]
        # (batch, 1, dim) -> (batch, 1 + next patches, next dim)
        fused_tokens = torch.cat((self.projection(cls_token), next_hidden_states[:, 1:]), dim=1)
        for layer in self.layers:
            fused_tokens = layer(fused_tokens, attention_mask=attention_mask, **kwargs)
            attention_mask = None  # of the patches, which only the first layer attends to
        # (batch, 1, next dim) -> (batch, 1 + patches, dim)
        return torch.cat((self.reverse_projection(fused_tokens), patch_tokens), dim=1)


class CrossViTStage(nn.Module):
    """Some layers of each branch, then a fusion of each branch with the next one, of the last with the first."""

    def __init__(self, config: CrossViTConfig, stage: int, drop_path_rates: list[float]):
        super().__init__()
        *branch_depths, fusion_depth = config.depth[stage]
        self.branches = nn.ModuleList(
            CrossViTBranch(config, branch, depth, drop_path_rates) for branch, depth in enumerate(branch_depths)
        )
        # 0 means one layer too: the checkpoints of the reference have a depth of 0 and the weights of one layer
        self.fusions = nn.ModuleList(
            CrossViTFusion(config, branch, max(1, fusion_depth), drop_path_rates[-1])
            for branch in range(config.num_branches)
        )

    def forward(
        self,
        hidden_states: list[torch.Tensor],
        attention_masks: list[torch.Tensor | None],
        cross_attention_masks: list[torch.Tensor | None],
        **kwargs: Unpack[TransformersKwargs],
    ) -> list[torch.Tensor]:
        hidden_states = [
            branch(tokens, attention_mask=mask, **kwargs)
            for branch, tokens, mask in zip(self.branches, hidden_states, attention_masks)
        ]
        # Every fusion reads the tokens from before all fusions of the stage
        next_hidden_states = hidden_states[1:] + hidden_states[:1]
        next_masks = cross_attention_masks[1:] + cross_attention_masks[:1]
        return [
            fusion(tokens, next_tokens, attention_mask=next_mask, **kwargs)
            for fusion, tokens, next_tokens, next_mask in zip(
                self.fusions, hidden_states, next_hidden_states, next_masks
            )
        ]


def get_drop_path_rates(config: CrossViTConfig) -> list[list[float]]:
    """
    The stochastic depth rates of each stage, rising linearly over all stages from 0 to `config.drop_path_rate`.

    A stage has as many rates as its longest branch and a fusion have layers. Each branch starts with the first of
    them; the fusions use the last.
    """
    # In plain Python, since models are built on the meta device, where tensors have no values (no torch.linspace)
    lengths = [max(1, max(branch_depths) + fusion_depth) for *branch_depths, fusion_depth in config.depth]
    step = config.drop_path_rate / max(1, sum(lengths) - 1)
    starts = [sum(lengths[:stage]) for stage in range(len(lengths))]
    return [[step * (start + layer) for layer in range(length)] for start, length in zip(starts, lengths)]


# Assigned rather than passed, since Transformers knows this option from 5.23 on only
hidden_states_recorder = OutputRecorder(target_class=CrossViTBranchTokens, capture_initial_hidden_state=False)
hidden_states_recorder.num_hidden_layers_key = "num_hidden_states"


def check_pixel_values(pixel_values: torch.Tensor | None, config: CrossViTConfig):
    """Raises a `ValueError` unless `pixel_values` has normalized images, one for all branches or one for each."""
    channels, branches = config.num_channels, config.num_branches
    received = type(pixel_values).__name__
    if isinstance(pixel_values, torch.Tensor):
        has_images = pixel_values.shape[1:-2] in ((channels,), (branches, channels)) and 0 not in pixel_values.shape
        if has_images and pixel_values.is_floating_point():
            return
        received = f"{pixel_values.dtype} of shape {tuple(pixel_values.shape)}"
    raise ValueError(
        f"`pixel_values` must be a floating point tensor of shape (batch_size, {channels}, height, width), or"
        f" (batch_size, {branches}, {channels}, height, width) with an image for each branch, and must not be empty,"
        f" got {received}. The image processor of the checkpoint returns both shapes."
    )


class CrossViTPreTrainedModel(PreTrainedModel):
    """Weight initialization, loading and saving of checkpoints, and changes of the image size."""

    config: CrossViTConfig
    base_model_prefix = "crossvit"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["CrossViTEmbeddings", "CrossViTLayer", "CrossViTFusion"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": hidden_states_recorder,
        "attentions": CrossViTSelfAttention,
        "cross_attentions": CrossViTCrossAttention,
    }

    # trf-ignore: TRF018 the base class would draw convolutions from a normal distribution, the reference does not
    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """As in the reference: truncated normal for linear layers and tokens, PyTorch's default for convolutions."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, CrossViTEmbeddings):
            init.trunc_normal_(module.cls_token, std=std)
            init.trunc_normal_(module.position_embeddings, std=std)

    @classmethod
    def from_pretrained(cls, *args, key_mapping: dict[str, str] | None = KEY_MAPPING, **kwargs) -> Self:
        """As [`~PreTrainedModel.from_pretrained`], and for the weights of timm and of the authors' code."""
        return super().from_pretrained(*args, key_mapping=key_mapping, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        """As [`~PreTrainedModel.save_pretrained`], but a checkpoint of timm is saved with our names."""
        super().save_pretrained(*args, **{"save_original_format": False, **kwargs})

    @property
    def branch_embeddings(self) -> list[CrossViTEmbeddings]:
        """The embeddings of each branch."""
        embeddings: Any = self.base_model.embeddings
        return list(embeddings)

    def get_input_embeddings(self) -> nn.Module:
        """The patch embeddings of the first branch; each branch has its own."""
        return self.branch_embeddings[0].patch_embeddings

    def set_input_embeddings(self, value: nn.Module):
        self.branch_embeddings[0].patch_embeddings = value

    def enable_input_require_grads(self):
        """As [`~PreTrainedModel.enable_input_require_grads`], in every branch."""
        self._require_grads_hooks = [
            embeddings.patch_embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
            for embeddings in self.branch_embeddings
        ]

    def get_position_embeddings(self) -> tuple[nn.Parameter, ...]:
        """The position embeddings of each branch, of shape `(1, 1 + num_patches, embed_dim)`, class token first."""
        return tuple(embeddings.position_embeddings for embeddings in self.branch_embeddings)

    def resize_position_embeddings(self, image_size: int | tuple[int | tuple[int, int], ...]):
        """
        Changes the native image sizes: interpolates the position embeddings bicubically and updates the config, so
        that a pretrained checkpoint can be fine-tuned, saved and loaded at another resolution.

        The position embeddings are new parameters: create the optimizer afterwards.

        Args:
            image_size (`int` or `tuple`):
                Native size of each branch in pixels, as in [`CrossViTConfig`]: an `int` (square) or `(height, width)`
                per branch, or one `int` for all of them.

        Raises:
            `ValueError`: if a size is not possible. The model is not changed then.
            `huggingface_hub.errors.StrictDataclassError`: if it has the wrong type, likewise.
        """
        config = copy.deepcopy(self.config)
        config.image_size = image_size
        config.validate_architecture()
        for embeddings, size in zip(self.branch_embeddings, config.image_sizes):
            embeddings.resize_position_embeddings(size, config.image_sizes[0])
        self.config.image_size = config.image_size


class CrossViTModel(CrossViTPreTrainedModel):
    """
    The CrossViT encoder without a head: tokens of the last branch and class tokens of all branches.

    Images can have any size. By default each branch resizes them to its native size, as in the reference; with
    `interpolate_pos_encoding=True` the position embeddings are interpolated instead; and
    [`~CrossViTPreTrainedModel.resize_position_embeddings`] changes the native sizes.
    """

    def __init__(self, config: CrossViTConfig):
        super().__init__(config)
        config.validate_architecture()  # Values may have been assigned since it was built
        self.embeddings = nn.ModuleList(CrossViTEmbeddings(config, branch) for branch in range(config.num_branches))
        self.stages = nn.ModuleList(
            CrossViTStage(config, stage, rates) for stage, rates in enumerate(get_drop_path_rates(config))
        )
        self.layernorms = nn.ModuleList(nn.LayerNorm(width, eps=config.layer_norm_eps) for width in config.embed_dim)

        # Initialize weights and apply final processing
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CrossViTModelOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor`):
                Normalized images, as made by [`CrossViTImageProcessor`], of shape `(batch_size, num_channels, height,
                width)`, or `(batch_size, num_branches, num_channels, height, width)` with an image for each branch.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Whether to interpolate the position embeddings instead of resizing the images. The first branch then
                keeps the input resolution; the others scale it by their native ratio to the first, rounded to whole
                patches.
            attention_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*, a keyword argument):
                Which tokens of all branches may be attended to (1) or not (0): those of the first branch, class token
                first, then those of the next one, and so on.
            output_attentions, output_hidden_states, return_dict:
                As in every model of Transformers.

        Raises:
            `ValueError`: if `pixel_values` is empty or not in floating point, or if it or the mask has another shape.

        Example:

        ```python
        >>> import torch
        >>> from crossvit import CrossViTConfig, CrossViTModel

        >>> model = CrossViTModel(CrossViTConfig()).eval()
        >>> outputs = model(torch.randn(1, 3, 240, 240))
        >>> list(outputs.last_hidden_state.shape), list(outputs.pooler_output.shape)
        ([1, 197, 384], [1, 576])
        ```"""
        check_pixel_values(pixel_values, self.config)
        # Not a parameter: tests and tools of Transformers take a model that names it for one with a single sequence
        attention_mask: torch.Tensor | None = kwargs.pop("attention_mask", None)  # type: ignore[typeddict-item]

        # (batch, channels, height, width) for each branch
        images = pixel_values.unbind(1) if pixel_values.ndim == 5 else [pixel_values] * self.config.num_branches
        hidden_states = [
            embeddings(branch_images, interpolate_pos_encoding)
            for embeddings, branch_images in zip(self.embeddings, images)
        ]
        attention_masks: list[torch.Tensor | None] = [None] * self.config.num_branches
        cross_attention_masks = attention_masks
        if attention_mask is not None:
            num_tokens = [tokens.shape[1] for tokens in hidden_states]
            shape = (len(pixel_values), sum(num_tokens))
            if attention_mask.shape != shape:
                raise ValueError(
                    f"`attention_mask` must be of shape (batch_size, num_tokens), here {shape}, for the"
                    f" {' + '.join(map(str, num_tokens))} tokens of the branches, got {tuple(attention_mask.shape)}."
                )
            branches = list(zip(hidden_states, attention_mask.split(num_tokens, dim=1)))
            attention_masks = [create_bidirectional_mask(self.config, tokens, mask) for tokens, mask in branches]
            # With one query, the class token of another branch
            cross_attention_masks = [
                create_bidirectional_mask(self.config, tokens[:, :1], mask, encoder_hidden_states=tokens)
                for tokens, mask in branches
            ]
        for stage in self.stages:
            hidden_states = stage(hidden_states, attention_masks, cross_attention_masks, **kwargs)

        # Only the class tokens of the other branches are returned
        *other_layernorms, last_layernorm = self.layernorms
        last_hidden_state = last_layernorm(hidden_states[-1])
        cls_tokens = [layernorm(tokens[:, 0]) for layernorm, tokens in zip(other_layernorms, hidden_states)]
        cls_tokens.append(last_hidden_state[:, 0])
        # With a `device_map` the branches may be on different devices
        pooler_output = torch.cat([token.to(last_hidden_state.device) for token in cls_tokens], dim=-1)

        return CrossViTModelOutput(last_hidden_state=last_hidden_state, pooler_output=pooler_output)


class CrossViTClassificationHead(nn.Module):
    """Class tokens `(batch_size, sum(embed_dim))` -> scores per branch `(batch_size, num_branches, num_labels)`"""

    def __init__(self, config: CrossViTConfig):
        super().__init__()
        self.embed_dim = config.embed_dim
        self.heads = nn.ModuleList(nn.Linear(width, config.num_labels) for width in config.embed_dim)

    def forward(self, pooler_output: torch.Tensor) -> torch.Tensor:
        cls_tokens = pooler_output.split(self.embed_dim, dim=-1)
        return torch.stack([head(cls_token) for head, cls_token in zip(self.heads, cls_tokens)], dim=1)


class CrossViTForImageClassification(CrossViTPreTrainedModel):
    """CrossViT with a linear head on the class token of each branch. Its logits are the mean of those of the heads."""

    def __init__(self, config: CrossViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.crossvit = CrossViTModel(config)
        self.classifier = CrossViTClassificationHead(config) if config.num_labels > 0 else nn.Identity()

        # Initialize weights and apply final processing
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CrossViTImageClassifierOutput:
        r"""
        Args:
            pixel_values, interpolate_pos_encoding, output_attentions, output_hidden_states, return_dict:
                As in [`CrossViTModel`], and so is `attention_mask`.
            labels (`torch.Tensor`, *optional*):
                Labels for the loss: class indices of shape `(batch_size,)` for cross-entropy, or floats of shape
                `(batch_size, num_labels)`, either 0 or 1 for binary cross-entropy (multi-label classification) or
                targets for mean squared error (regression). `config.problem_type` chooses the loss. If it is `None`,
                `config.num_labels` and the type of the labels do.

        Example:

        ```python
        >>> import torch
        >>> from crossvit import CrossViTConfig, CrossViTForImageClassification

        >>> model = CrossViTForImageClassification(CrossViTConfig(num_labels=10)).eval()
        >>> outputs = model(torch.randn(2, 3, 240, 240), labels=torch.tensor([3, 7]))
        >>> list(outputs.logits.shape), list(outputs.branch_logits.shape)
        ([2, 10], [2, 2, 10])
        ```"""
        outputs: CrossViTModelOutput = self.crossvit(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
        )

        branch_logits, logits = None, outputs.pooler_output
        if self.num_labels > 0:
            branch_logits = self.classifier(outputs.pooler_output)
            logits = branch_logits.mean(dim=1)

        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)

        return CrossViTImageClassifierOutput(
            loss=loss,
            logits=logits,
            branch_logits=branch_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )


class CrossViTBackbone(BackboneMixin, CrossViTPreTrainedModel):
    """
    CrossViT as a backbone for dense prediction. Its feature maps are the patch tokens of the stages and branches in
    `config.out_features` (see `config.stage_names`), before any final layer norm.
    """

    def __init__(self, config: CrossViTConfig):
        super().__init__(config)
        self.num_features = list(config.embed_dim) * (config.num_hidden_layers + 1)
        self.crossvit = CrossViTModel(config)

        # Initialize weights and apply final processing
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BackboneOutput:
        r"""
        Args:
            pixel_values, output_attentions, output_hidden_states, return_dict:
                As in [`CrossViTModel`], and so is `attention_mask`.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`):
                As in [`CrossViTModel`]. It is the default here: dense prediction needs maps in the resolution of the
                images, and the models that use a backbone pass it the images only.

        Returns:
            `BackboneOutput`: with `feature_maps` of shape `(batch_size, embed_dim[branch], rows, columns)`, a value
            for each patch of the branch.

        Example:

        ```python
        >>> import torch
        >>> from crossvit import CrossViTBackbone, CrossViTConfig

        >>> model = CrossViTBackbone(CrossViTConfig(out_features=["stage1_0", "stage3_1"]))
        >>> feature_maps = model(torch.randn(1, 3, 480, 240)).feature_maps
        >>> [list(feature_map.shape) for feature_map in feature_maps]
        [[1, 192, 40, 20], [1, 384, 28, 14]]
        ```"""
        kwargs["output_hidden_states"] = True
        outputs: CrossViTModelOutput = self.crossvit(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
        )

        height, width = pixel_values.shape[-2:]
        feature_maps: tuple = ()
        for index, (stage, tokens) in enumerate(zip(self.stage_names, outputs.hidden_states)):
            if stage in self.out_features:
                embeddings = self.branch_embeddings[index % self.config.num_branches]
                image_size = embeddings.get_image_size(height, width, interpolate_pos_encoding)
                # (batch, 1 + patches, dim) -> (batch, dim, rows, columns)
                patch_tokens = tokens[:, 1:].transpose(1, 2)
                feature_maps += (patch_tokens.unflatten(2, embeddings.get_grid_size(image_size)),)

        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["CrossViTBackbone", "CrossViTForImageClassification", "CrossViTModel", "CrossViTPreTrainedModel"]
