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
"""Guided attention: a loss that steers the attention of a classifier toward masked objects."""

from typing import Any

import torch
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

from ..interpretability.rollout import attention_iou, attention_rollout
from .trainer import CrossViTTrainer, unwrap_peft


class GuidedAttentionTrainer(CrossViTTrainer):
    """
    A [`CrossViTTrainer`] that adds `mask_weight * (1 - IoU)` to the loss, the mean over all images of a step, where
    IoU is the soft overlap of the attention rollout and the mask of an image, [`attention_iou`]. Batches have "mask"
    (batch, height, width) from 0 to 1. Evaluations report the mean IoU of their images, as "eval_iou".

    Switches to eager attention, the only implementation that returns attention weights. It takes more memory.

    Args:
        mask_weight (`float`): weight of the loss; 0 only reports the IoU.
        args, kwargs: as in [`CrossViTTrainer`].

    Raises:
        `ValueError`: in training with a weight, if the attention has no gradient.
    """

    def __init__(self, *args, mask_weight: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.mask_weight = mask_weight
        self.masks: torch.Tensor | None = None  # of the batch whose loss is computed
        self.overlaps: torch.Tensor | None = None
        self.prediction_metrics, self.reduce_logits = self.compute_metrics, self.preprocess_logits_for_metrics
        self.compute_metrics, self.preprocess_logits_for_metrics = self.metrics_with_iou, self.reduce_outputs
        unwrap_peft(self.model).set_attn_implementation("eager")

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs) -> Any:
        self.masks = inputs["mask"]
        inputs = {name: value for name, value in inputs.items() if name != "mask"} | {"output_attentions": True}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return (loss, {"logits": outputs["logits"], "iou": self.overlaps}) if return_outputs else loss

    def classification_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        loss = super().classification_loss(outputs, labels, num_items_in_batch)
        config = unwrap_peft(self.model).config
        overlaps = attention_iou(attention_rollout(outputs, config), self.masks, config)
        self.overlaps = overlaps.detach()
        if not self.mask_weight:
            return loss
        if loss.requires_grad and not overlaps.requires_grad:
            raise ValueError(
                "`mask_weight`: the attention has no gradient. Reentrant gradient checkpointing takes it away: set"
                ' `activation_checkpointing_kwargs` to {"use_reentrant": False} (`gradient_checkpointing_kwargs` in'
                " older releases of Transformers)."
            )
        labels_per_image = labels.ne(-100).flatten(1).sum(dim=1) if labels.ndim > 1 else labels.ne(-100)
        guidance = self.mean_of_step(((1 - overlaps) * labels_per_image).sum(), labels, num_items_in_batch)
        return loss + self.mask_weight * guidance

    def reduce_outputs(self, outputs: Any, labels: torch.Tensor) -> Any:
        logits, overlaps = outputs
        return (logits if self.reduce_logits is None else self.reduce_logits(logits, labels)), overlaps

    def metrics_with_iou(self, prediction: EvalPrediction) -> dict[str, float]:
        outputs: Any = prediction.predictions
        metrics = {"iou": float(outputs[1].mean())}
        if self.prediction_metrics is not None:
            metrics |= self.prediction_metrics(EvalPrediction(outputs[0], prediction.label_ids))
        return metrics

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, **kwargs)
        predictions: Any = output.predictions
        return output if predictions is None else output._replace(predictions=predictions[0])


__all__ = ["GuidedAttentionTrainer"]
