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
"""The Trainer for CrossViT: the loss, learning rates and sampling of the paper's recipe."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from ..modeling_crossvit import CrossViTForImageClassification
from .augmentation import RepeatedAugmentationSampler
from .learning_rates import layer_decay_groups


class CrossViTTrainer(Trainer):
    """
    A [`~transformers.Trainer`] with what CrossViT and the paper's recipe need:

    - each process draws its own augmentation and drop path;
    - labels may be probabilities, as mixup and CutMix make them, with or without label smoothing. The loss is the mean
      over all images of a step, regardless of the number of processes and gradient accumulation;
    - on request, images are repeated, incomplete steps are dropped, the learning rate follows a function of the step,
      and early layers have lower learning rates.

    Args:
        train_data_collator (`Callable`, *optional*):
            Makes the batches of the training; `data_collator` makes those of evaluations, and by default both.
        augmentation_repeats (`int`, *optional*, defaults to 1):
            How often an image is drawn, by a [`RepeatedAugmentationSampler`] if more than once.
        drop_incomplete_step (`bool`, *optional*, defaults to `False`):
            Whether to drop the last images of an epoch if they do not fill a step, which consists of all accumulated
            batches of all processes. Always the case with repeated images.
        learning_rate_schedule (`Callable[..., float]`, *optional*):
            Replaces that of `args.lr_scheduler_type`: the multiple of `args.learning_rate` at a step, such as
            [`cosine_by_epoch`]. It is called with `step`, `num_warmup_steps` and `num_training_steps`.
        layer_decay (`float`, *optional*):
            Layer-wise learning rate decay, above 0 and at most 1: the optimizer has the groups of
            [`layer_decay_groups`].
        args, kwargs:
            As in [`~transformers.Trainer`].
    """

    def __init__(
        self,
        *args,
        train_data_collator: Any = None,
        augmentation_repeats: int = 1,
        drop_incomplete_step: bool = False,
        learning_rate_schedule: Callable[..., float] | None = None,
        layer_decay: float | None = None,
        **kwargs,
    ):
        if layer_decay is not None and not 0 < layer_decay <= 1:
            raise ValueError(f"`layer_decay` must be above 0 and at most 1, such as 0.75, got {layer_decay}.")
        self.layer_decay = layer_decay
        self.train_data_collator = train_data_collator
        self.augmentation_repeats = augmentation_repeats
        self.drop_incomplete_step = drop_incomplete_step
        self.learning_rate_schedule = learning_rate_schedule
        self.repeating_sampler: RepeatedAugmentationSampler | None = None
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is None and isinstance(unwrap_peft(self.model), CrossViTForImageClassification):
            self.compute_loss_func = self.classification_loss
        self.add_callback(TrainingSteps(self))

    def create_accelerator_and_postprocess(self) -> None:
        if self.args.data_seed is None:  # by default, the state of the process, which training makes each one's own
            self.args.data_seed = self.args.seed
        super().create_accelerator_and_postprocess()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # Evaluations weight the mean of each batch by its length, which differs between processes
        num_items = num_items_in_batch if model.training else None
        return super().compute_loss(model, inputs, return_outputs, num_items)

    def classification_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """
        The loss of logits (batch, classes): by `config.problem_type`, or else by the labels as in the model itself.

        Args:
            outputs ([`CrossViTImageClassifierOutput`]): of the model.
            labels (`torch.Tensor`):
                Classes (batch), or (batch, classes) probabilities or zeros and ones. Labels of -100 do not count.
            num_items_in_batch (`int`, *optional*): the number of all labels of the step, in all processes.
        """
        logits = outputs["logits"].float()
        config: Any = unwrap_peft(self.model).config
        problem = config.problem_type
        if problem is None and config.num_labels == 1:
            problem = "regression"
        elif problem is None and labels.is_floating_point():
            problem = "multi_label_classification"

        if problem == "regression":
            losses = nn.functional.mse_loss(logits, labels.to(logits.dtype).view_as(logits), reduction="none")
        elif problem == "multi_label_classification":
            losses = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
        else:
            # Smoothing belongs to training; evaluations stay comparable
            smoothing = self.args.label_smoothing_factor if logits.requires_grad else 0.0
            losses = nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
            # The Trainer counts all probabilities of an image as items, and an image counts once
            losses = losses * (labels.numel() / len(labels))
        is_labelled = labels.ne(-100).view(len(labels), -1).any(dim=1)  # unlike the padding of a stream
        total = (losses.view(len(labels), -1).sum(dim=1) * is_labelled).sum()
        return self.mean_of_step(total, labels, num_items_in_batch)

    def mean_of_step(
        self, total: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """What a batch adds to the mean over all labels of the step, from the total over the labels of the batch."""
        if num_items_in_batch is None:
            return total / labels.ne(-100).sum().clamp(min=1)
        if self.args.n_gpu > 1:  # the Trainer multiplies by it, for losses that each replica takes the mean of
            num_items_in_batch = torch.as_tensor(num_items_in_batch).flatten()[0] * self.args.n_gpu
        return total / num_items_in_batch

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.layer_decay is not None:
            model = self.model if model is None else model
            optimizer_class, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, model
            )
            groups = layer_decay_groups(model, self.layer_decay, self.args.learning_rate, self.args.weight_decay)
            self.optimizer = optimizer_class(groups, **options)
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None and self.learning_rate_schedule is not None:
            schedule = partial(
                self.learning_rate_schedule,
                num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
                num_training_steps=num_training_steps,
            )
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, schedule)
            self._created_lr_scheduler = True  # another call of `train` makes its own
        return super().create_scheduler(num_training_steps, optimizer)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        data_collator = self.data_collator
        self.data_collator = self.train_data_collator or data_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = data_collator

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.augmentation_repeats == 1 and not self.drop_incomplete_step:
            return super()._get_train_sampler(train_dataset)
        self.repeating_sampler = RepeatedAugmentationSampler(
            num_images=len(dataset),
            repeats=self.augmentation_repeats,
            batch_size=self._train_batch_size,
            num_replicas=self.args.world_size * self.args.gradient_accumulation_steps,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )
        return self.repeating_sampler


class TrainingSteps(TrainerCallback):
    """What a [`CrossViTTrainer`] does during training."""

    def __init__(self, trainer: CrossViTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs) -> None:
        # Every process has the same weights and order of images by now, and needs its own augmentation and drop path
        set_seed(args.seed + args.process_index)

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs) -> None:
        # The data loaders of several processes do not set it when a run resumes within an epoch
        if self.trainer.repeating_sampler is not None:
            self.trainer.repeating_sampler.set_epoch(int(state.epoch or 0))


def unwrap_peft(model: Any) -> Any:
    """The model without the adapters of PEFT."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


__all__ = ["CrossViTTrainer"]
