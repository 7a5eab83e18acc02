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
The Trainer for CrossViT: the recipe's loss, weight decay and sampling, checkpoints that survive a crash, and a model
card that says what is known.
"""

import contextlib
import errno
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ..modeling_crossvit import CrossViTForImageClassification
from .averaging import ExponentialMovingAverage, check_decay
from .errors import ResumeError
from .model_card import write_model_card
from .resuming import FILES_NAME
from .sampling import AugmentationSampler, ImageDataset, ImageStream


# Beside model.safetensors, which then holds the average, in a checkpoint of a training that goes on
TRAINING_WEIGHTS_NAME = "training_weights.safetensors"


class CrossViTTrainer(Trainer):
    """
    Transformers' [`~transformers.Trainer`], which differs where a CrossViT or its recipe asks for it:

    - class tokens and position embeddings are not decayed, as in the reference;
    - labels may be probabilities, as mixup and cutmix make them, and label smoothing then works as well. The loss of
      any kind of labels is a mean over all images of a step, however they are spread over processes and accumulated;
    - an [`ImageDataset`] is drawn by an
      [`AugmentationSampler`], and a resumed
      [`ImageStream`] passes over what it has shown without decoding it;
    - on request, an exponential moving average of the weights is evaluated and saved;
    - a checkpoint tells whether it is complete ([`last_complete_checkpoint`]), and a disk that
      cannot hold it is noticed before the training;
    - the model card is right about weights that were loaded from a folder.

    Args:
        average_decay (`float`, *optional*):
            Decay of the [`ExponentialMovingAverage`]; none by default.
        args, kwargs:
            As in [`~transformers.Trainer`].
    """

    def __init__(self, *args, average_decay: float | None = None, **kwargs):
        if average_decay is not None:
            check_decay(average_decay)
        self.average_decay = average_decay
        self.average: ExponentialMovingAverage | None = None
        self.train_sampler: AugmentationSampler | None = None
        super().__init__(*args, **kwargs)
        if average_decay is not None and (self.is_fsdp_enabled or self.model_init is not None):
            raise ValueError(
                "`average_decay` needs one whole model: it works neither with FSDP nor with `model_init`."
            )
        if self.compute_loss_func is None and isinstance(base_model(self.model), CrossViTForImageClassification):
            self.compute_loss_func = self.classification_loss
        self.add_callback(TrainingSteps(self))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if not self.is_deepspeed_enabled:
            # The Trainer scales losses by itself; that of 5.4 lets accelerate divide them once more
            self.accelerator.gradient_accumulation_steps = 1
        # Accelerate would wrap the embeddings as well as the module in them that FSDP2 takes for the input embeddings
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = ["CrossViTLayer", "CrossViTFusion"]

    def classification_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """
        The loss of logits (batch, classes): by `config.problem_type`, or else by the labels as in the model itself.

        Args:
            outputs ([`CrossViTImageClassifierOutput`]): of the model.
            labels (`torch.Tensor`): (batch) classes, or (batch, classes) probabilities, or ones for each label.
            num_items_in_batch (`int`, *optional*): the number of all labels of the step, of all processes.
        """
        logits = outputs["logits"].float()
        config: Any = self.model.config
        problem = config.problem_type
        if problem is None and config.num_labels == 1:
            problem = "regression"
        elif problem is None and labels.is_floating_point():
            problem = "multi_label_classification"

        if problem == "regression":
            loss = nn.functional.mse_loss(logits, labels.to(logits.dtype).view_as(logits), reduction="sum")
        elif problem == "multi_label_classification":
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
        else:
            # Smoothing belongs to training; evaluations stay comparable
            smoothing = self.args.label_smoothing_factor if logits.requires_grad else 0.0
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
            # An image has as many probabilities as there are classes, and counts once
            loss = loss * (labels.numel() / len(labels))
        if num_items_in_batch is None:
            return loss / labels.ne(-100).sum().clamp(min=1)
        if self.args.n_gpu > 1:  # the Trainer multiplies by it, for losses that each replica takes the mean of
            num_items_in_batch = torch.as_tensor(num_items_in_batch).flatten()[0] * self.args.n_gpu
        return loss / num_items_in_batch

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith(("cls_token", "position_embeddings"))]

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, ImageDataset):
            return super()._get_train_sampler(train_dataset)
        seed = order_seed(self.args)
        self.train_sampler = AugmentationSampler(len(dataset), seed, dataset.repeats, self._train_batch_size)
        return self.train_sampler

    def create_model_card(self, **kwargs) -> None:
        """
        Writes README.md into `args.output_dir`. [`~transformers.Trainer.push_to_hub`] calls it with its own options.

        Args:
            kwargs (`dict[str, Any]`, *optional*): as in [`write_model_card`].
        """
        if not isinstance(self.accelerator.unwrap_model(self.model), CrossViTForImageClassification):
            super().create_model_card(**kwargs)  # adapters have a card of their own
        elif self.is_world_process_zero():
            write_model_card(self, **kwargs)

    def train(self, *args, **kwargs) -> Any:
        """
        As [`~transformers.Trainer.train`]. The model has the average of its weights afterwards, if there is one.

        Raises:
            `OSError`: if the disk has no room for the checkpoints, before the training or in its course.
        """
        self.check_disk_space()
        if self.average_decay is not None:
            self.average = ExponentialMovingAverage(self.model, self.average_decay)
        try:
            result = super().train(*args, **kwargs)
        except Exception as error:
            if self.free_disk_space() < self.checkpoint_size():
                message = (
                    f"the disk is full at step {self.state.global_step}, what was saved before is whole ({error})"
                )
                raise OSError(errno.ENOSPC, message, str(self.args.output_dir)) from error
            raise
        if self.average is not None:
            self.average.apply()
            self.average = None
        return result

    def checkpoint_size(self) -> int:
        """Bytes of a training checkpoint: the weights, two moments of the trained ones, and their average."""
        trained = sum(parameter.nbytes for parameter in self.model.parameters() if parameter.requires_grad)
        adapted = base_model(self.model) is not self.model  # the rest is not saved
        weights = trained if adapted else sum(parameter.nbytes for parameter in self.model.parameters())
        return weights + (2 + (self.average_decay is not None)) * trained

    def free_disk_space(self) -> int:
        folder = Path(self.args.output_dir).absolute()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def check_disk_space(self) -> None:
        present = len(list(Path(self.args.output_dir).glob("checkpoint-*")))
        # One more than are kept: the oldest is deleted when the newest is there
        checkpoints = max((self.args.save_total_limit or 1) + 1 - present, 1)
        needed = self.checkpoint_size() * (checkpoints if self.args.save_strategy != SaveStrategy.NO else 1)
        if (free := self.free_disk_space()) < needed:
            raise OSError(
                errno.ENOSPC,
                f"the checkpoints need {needed / 2**20:,.0f} MiB and the disk has {free / 2**20:,.0f}: make room, save"
                " less with --save_total_limit, or elsewhere with --output_dir",
                str(self.args.output_dir),
            )

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with self.averaged():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs) -> Any:
        with self.averaged():
            return super().predict(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self.averaged() if self.args.should_save else contextlib.nullcontext():
            super()._save(output_dir, state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        As in [`~transformers.Trainer.save_model`], but of a model that FSDP has sharded: a whole model that
        `from_pretrained` loads, whatever the checkpoints are made of; and beside the shards of a checkpoint its
        configuration and image processor, so that it can be loaded once `accelerate merge-weights` has merged them.
        """
        super().save_model(output_dir, _internal_call)
        if not self.is_fsdp_enabled or "SHARDED" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            return
        folder = output_dir or self.args.output_dir
        if not Path(folder).name.startswith(PREFIX_CHECKPOINT_DIR):
            self._save(folder, state_dict=self.accelerator.get_state_dict(self.model))
        elif self.args.should_save:
            base_model(self.accelerator.unwrap_model(self.model)).config.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.average = None  # The best checkpoint holds an average itself

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average is not None and self.args.should_save:
            weights = {name: weight.detach() for name, weight in self.model.named_parameters() if weight.requires_grad}
            save_file(weights, Path(output_dir) / TRAINING_WEIGHTS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average is not None:
            self.average.restart()
            weights = load_file(Path(resume_from_checkpoint) / TRAINING_WEIGHTS_NAME)
            self.model.load_state_dict(weights, strict=False)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The last files but the Trainer's own state, which says that this list is whole
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(output_dir)
            files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
            # Of an earlier attempt at this checkpoint, they may be there already
            sizes = {n: file.stat().st_size for n, file in files.items() if n not in (FILES_NAME, TRAINER_STATE_NAME)}
            (folder / FILES_NAME).write_text(json.dumps(sizes, indent=2))


class TrainingSteps(TrainerCallback):
    """What a [`CrossViTTrainer`] does in the course of a training."""

    def __init__(self, trainer: CrossViTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs) -> None:
        # Where it is now: the folder may have been moved since
        best = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)
        elif state.best_global_step and args.load_best_model_at_end:
            raise ResumeError(f"{best}: the best checkpoint so far is missing; use another --output_dir to begin anew")
        stream = self.trainer.train_dataset
        if isinstance(stream, ImageStream):
            stream.ended = state.global_step >= state.max_steps
        if isinstance(stream, ImageStream) and not args.ignore_data_skip:
            batches = state.global_step * args.gradient_accumulation_steps
            stream.skip(batches, self.trainer._train_batch_size * args.world_size)

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs) -> None:
        # Several processes that resume within an epoch are not told which one it is
        if self.trainer.train_sampler is not None:
            self.trainer.train_sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs) -> None:
        if self.trainer.average is not None:
            self.trainer.average.update(state.global_step)


def order_seed(args: TrainingArguments) -> int:
    """The seed of the order of the images."""
    return args.seed if args.data_seed is None else args.data_seed


def base_model(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


__all__ = ["CrossViTTrainer"]
