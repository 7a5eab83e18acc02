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
CrossViT for Transformers. Importing it registers the model type "crossvit" with the Auto classes and pipelines, and
the attention implementation "blockwise".
"""

from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
)
from transformers.masking_utils import sdpa_mask

from .attention import blockwise_attention_forward
from .configuration_crossvit import CrossViTConfig
from .image_processing_crossvit import CrossViTImageProcessor
from .image_processing_pil_crossvit import CrossViTImageProcessorPil
from .modeling_crossvit import (
    CrossViTBackbone,
    CrossViTForImageClassification,
    CrossViTModel,
    CrossViTPreTrainedModel,
)


__version__ = "0.1.0"

# `exist_ok`, so that a second import or another registration of the same model type does no harm
AutoConfig.register(CrossViTConfig.model_type, CrossViTConfig, exist_ok=True)
AutoModel.register(CrossViTConfig, CrossViTModel, exist_ok=True)
AutoModelForImageClassification.register(CrossViTConfig, CrossViTForImageClassification, exist_ok=True)
AutoBackbone.register(CrossViTConfig, CrossViTBackbone, exist_ok=True)
# Transformers 5.10 has no `AutoImageProcessor` where torchvision cannot be imported
if not getattr(AutoImageProcessor, "is_dummy", False):
    AutoImageProcessor.register(
        CrossViTConfig,
        image_processor_classes={"torchvision": CrossViTImageProcessor, "pil": CrossViTImageProcessorPil},
        exist_ok=True,
    )
# What blockwise attention cannot do it leaves to sdpa, hence the masks of sdpa
AttentionInterface.register("blockwise", blockwise_attention_forward)
AttentionMaskInterface.register("blockwise", sdpa_mask)

__all__ = [
    "CrossViTBackbone",
    "CrossViTConfig",
    "CrossViTForImageClassification",
    "CrossViTImageProcessor",
    "CrossViTImageProcessorPil",
    "CrossViTModel",
    "CrossViTPreTrainedModel",
]
