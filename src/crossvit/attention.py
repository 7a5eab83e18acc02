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
"""Attention implementations to choose by name, beside those of Transformers."""

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward


# Attention weights of this size stay in the caches of current CPUs (blocks of 2 MiB to 16 MiB were equally fast)
BLOCK_BYTES = 4 * 2**20


def blockwise_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Computes attention a few images at a time so that the attention weights fit in the CPU's cache. Importing
    `crossvit` registers it as `attn_implementation="blockwise"`.

    It is meant for bfloat16 on CPUs with AVX-512 BF16 and without AMX, where PyTorch's fused kernel is slow. Measured
    on an AMD Zen 5 with batches of 8: attention of queries of shape (8, 6, 197, 64) in 1.6 ms instead of 3.5 ms,
    inference of the eleven variants in 0.72 to 0.87 of the time of timm. On a Zen 4 it was 0.83 to 0.91, and no gain
    for `crossvit_tiny`. With AMX `sdpa` is the faster one for inference. Float32 gains nothing.

    Unsupported cases fall back to `sdpa`: traced, compiled and exported models, whose number of blocks would
    depend on the batch, and attention that is masked, causal or grouped.

    Args:
        module (`nn.Module`): The attention module.
        query, key, value (`torch.Tensor` of shape `(batch_size, num_heads, num_tokens, head_dim)`): The states.
        attention_mask (`torch.Tensor`, *optional*): The mask, for `sdpa`.
        scaling (`float`, *optional*): Factor of the scores. Defaults to `head_dim**-0.5`.
        dropout (`float`, *optional*, defaults to 0.0): Rate at which weights are dropped in training.

    Returns:
        The output of shape `(batch_size, num_tokens, num_heads, head_dim)`, and `None` for the weights.
    """
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    is_causal = kwargs.get("is_causal", getattr(module, "is_causal", True))
    if is_traced or attention_mask is not None or is_causal or query.shape[1] != key.shape[1]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )

    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    bytes_per_image = query.shape[1] * query.shape[2] * key.shape[2] * query.element_size()
    block_size = max(1, BLOCK_BYTES // bytes_per_image)
    attn_outputs = []
    for query_block, key_block, value_block in zip(*(states.split(block_size) for states in (query, key, value))):
        attn_weights = torch.matmul(query_block * scaling, key_block.transpose(2, 3)).softmax(dim=-1)
        attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
        attn_outputs.append(torch.matmul(attn_weights, value_block).transpose(1, 2))
    return torch.cat(attn_outputs), None
