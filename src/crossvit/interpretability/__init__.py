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
"""Attention maps, rollout and attribution, and plots of them, which need Matplotlib."""

from .attention_maps import AttentionMap, AttentionMaps, CropRegion
from .attribution import LogitsModel, TokensToMaps
from .plotting import ImageCell, ScoreCell, display_size, draw_attention, draw_rows, overlay
from .rollout import attention_iou, attention_rollout


__all__ = [
    "AttentionMap",
    "AttentionMaps",
    "CropRegion",
    "ImageCell",
    "LogitsModel",
    "ScoreCell",
    "TokensToMaps",
    "attention_iou",
    "attention_rollout",
    "display_size",
    "draw_attention",
    "draw_rows",
    "overlay",
]
