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
"""What the training commands share: from labelled images to a trained, evaluated and saved model."""

from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from transformers import TrainingArguments, set_seed

from crossvit.training.augmentation import AugmentationArguments, Collator, EvaluationTransform, TrainingTransform
from crossvit.training.guided_attention import GuidedAttentionTrainer
from crossvit.training.trainer import CrossViTTrainer, unwrap_peft

from .checkpoints import last_usable_checkpoint
from .errors import CommandError, shorten_list
from .fsdp import FsdpTrainer
from .images import DecodedImages
from .labelled_images import DataArguments, LabelledImages
from .metrics import MultiLabelMetric, SingleLabelMetric, save_confusion_matrix
from .model_card import ModelCardTrainer
from .streams import ImageStream, StreamTrainer
from .workers import default_num_workers


# Defaults of TrainingArguments that suit images and that users of a command expect
TRAINING_DEFAULTS: dict[str, Any] = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "logging_steps": 10,
    "report_to": ["tensorboard"],
    "remove_unused_columns": False,  # the transforms need the images
    "label_names": ["labels"],
    "use_cpu": not torch.accelerator.is_available(),  # otherwise --bf16 is refused there
    "ddp_find_unused_parameters": False,  # there are none
    "dataloader_num_workers": default_num_workers(),
    "dataloader_persistent_workers": None,  # if there are workers
}


class CommandTrainer(CrossViTTrainer, ModelCardTrainer, FsdpTrainer, StreamTrainer):
    """The Trainer of the commands."""


class GuidedCommandTrainer(GuidedAttentionTrainer, CommandTrainer):
    """The Trainer of the commands for images with masks."""


def prepare_images(data: DataArguments, args: TrainingArguments, mask_column: str | None = None) -> LabelledImages:
    """
    Loads and checks the images to train with, and their masks if there are any, and prints a summary.

    Raises:
        `CommandError`: if the images, their labels or these options are wrong.
    """
    if data.data and Path(args.output_dir).resolve().is_relative_to(Path(data.data).expanduser().resolve()):
        raise CommandError(f"--output_dir {args.output_dir}: lies in --data {data.data}; choose a folder elsewhere")
    if args.dataloader_persistent_workers is None:
        args.dataloader_persistent_workers = args.dataloader_num_workers > 0
    if data.streaming and args.max_steps <= 0:
        raise CommandError("--streaming requires --max_steps")
    with args.main_process_first():  # the others find its results in the cache of `datasets`
        images = LabelledImages.load(data, mask_column).for_training(data.validation_fraction, args.seed)
        if data.check_images:
            images.check_images()
    if args.should_log:
        print(images.summary(), flush=True)
    set_seed(args.seed)  # for the weights of new heads
    return images


def make_trainer(
    model: Any,
    processor: Any,
    images: LabelledImages,
    data: DataArguments,
    augmentation: AugmentationArguments,
    args: TrainingArguments,
    mask_weight: float = 0.0,
    **options,
) -> CommandTrainer:
    """
    Creates the Trainer, which guides attention if the images have masks, with further `options` of
    [`CrossViTTrainer`]. The best checkpoint has the best accuracy, or the best F1 if images have several labels.

    Raises:
        `CommandError`: if the images do not suit the model or the augmentation.
    """
    check_image_columns(images.image_columns, model)
    if (channels := unwrap_peft(model).config.num_channels) != 3:
        raise CommandError(f"--model: takes images of {channels} channels, but training is only for RGB images")
    metric = MultiLabelMetric() if images.multi_label else SingleLabelMetric()
    if images.multi_label and args.metric_for_best_model == "accuracy":
        args.metric_for_best_model = "f1"
    mixup = augmentation.mixup(len(images.class_names))
    if mixup is not None and images.multi_label:
        raise CommandError("--mixup_alpha, --cutmix_alpha: they mix only images with one label each")
    if mixup is not None and images.mask_column:
        raise CommandError("--mixup_alpha, --cutmix_alpha: they do not mix masks; leave them out, or --mask_column")
    if data.streaming and augmentation.augmentation_repeats > 1:
        raise CommandError("--augmentation_repeats: does not work with --streaming")
    trainer: Any = CommandTrainer
    if images.mask_column:
        trainer = partial(GuidedCommandTrainer, mask_weight=mask_weight)
    columns: Any = (images.image_columns, images.mask_column)
    return trainer(
        model,
        args,
        data_collator=Collator(len(images.class_names), images.multi_label),
        train_data_collator=Collator(len(images.class_names), images.multi_label, mixup),
        train_dataset=transformed(
            images.splits["train"],
            TrainingTransform(augmentation, processor, *columns),
            shuffle_buffer_size=data.shuffle_buffer_size,
            seed=args.seed,
        ),
        eval_dataset=transformed(images.splits["validation"], EvaluationTransform(processor, *columns)),
        processing_class=processor,
        compute_metrics=metric.compute_metrics,
        preprocess_logits_for_metrics=metric.reduce_logits,
        augmentation_repeats=augmentation.augmentation_repeats,
        **options,
    )


def check_image_columns(image_columns: list[str], model: Any) -> None:
    """Raises a `CommandError` if the model does not take that number of images."""
    num_branches = unwrap_peft(model).config.num_branches
    if len(image_columns) not in (1, num_branches):
        raise CommandError(
            f"--image_columns {' '.join(image_columns)}: the model takes one image for all branches or one for each of"
            f" its {num_branches} branches, got {len(image_columns)}"
        )


def transformed(split: Any, transform: Any, **stream_options) -> Any:
    """Decodes and transforms the images of a split or stream when they are read. The options are for streams."""
    transform = DecodedImages(transform)
    if isinstance(split, datasets.Dataset):
        return split.with_transform(transform)
    return ImageStream(split, transform, **stream_options)


def train(trainer: CommandTrainer, images: LabelledImages) -> None:
    """
    Trains, or resumes from the last usable checkpoint in the output folder.

    Raises:
        `CommandError`: if the images have changed since that checkpoint. Images that it was trained on could now be
            among those of the validation. Or if the machines of a run do not have the same checkpoint.
    """
    checkpoint = last_usable_checkpoint(trainer.args.output_dir)
    names = gather_object([checkpoint and Path(checkpoint).name])
    if len(set(names)) > 1:
        raise CommandError(
            f"--output_dir {trainer.args.output_dir}: not all processes find the same checkpoint to resume from, but"
            f" {shorten_list(map(str, names))}; use a folder that all machines share"
        )
    fingerprint, record = images.fingerprint(), Path(trainer.args.output_dir) / "data_fingerprint.txt"
    if checkpoint and fingerprint and record.is_file() and record.read_text(encoding="utf-8") != fingerprint:
        raise CommandError(
            f"{checkpoint} was trained on other images, labels or splits than those of --data now: restore them, or"
            " choose another --output_dir"
        )
    if not checkpoint and fingerprint and trainer.args.should_save:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(fingerprint, encoding="utf-8")
    if checkpoint and trainer.args.should_log:
        print(f"Resuming from {checkpoint}", flush=True)
    trainer.train(resume_from_checkpoint=checkpoint)


def save_and_evaluate(trainer: CommandTrainer, images: LabelledImages, data: DataArguments) -> None:
    """Saves the trained model, evaluates it on the other splits, and pushes it to the Hub if asked to."""
    output = Path(trainer.args.output_dir)
    trainer.save_model(_internal_call=True)  # before anything else can fail, and without a push
    for name, split in images.splits.items():
        if name == "train":
            continue
        transform = EvaluationTransform(trainer.processing_class, images.image_columns, images.mask_column)
        prediction = trainer.predict(
            transformed(split, transform), metric_key_prefix="eval" if name == "validation" else name
        )
        trainer.log(prediction.metrics)  # for the model card
        trainer.log_metrics(name, prediction.metrics)
        trainer.save_metrics(name, prediction.metrics)
        if trainer.args.should_save and not images.multi_label:
            save_confusion_matrix(output / f"{name}_confusion.png", prediction, images.class_names)
    # Only a dataset on the Hub has a tag. A folder of images would be named after the class that reads it
    card: dict[str, Any] = {"dataset": Path(data.data).resolve().name, "dataset_tags": [], "dataset_args": []}
    if not Path(data.data).expanduser().exists() and not any(part in data.data for part in ("://", "*")):
        card = {"dataset": data.data, "dataset_tags": data.data}
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    if trainer.args.should_save:
        print(f"Saved the model and its image processor in {output}", flush=True)
    end_workers(trainer)


def end_workers(trainer: CommandTrainer) -> None:
    """Ends the processes that read images. With a GPU, PyTorch 2.11 waits five seconds for each of them on exit."""
    handler = trainer.callback_handler
    handler.train_dataloader = handler.eval_dataloader = None
    trainer._eval_dataloaders = {}
    if trainer.position is not None:
        trainer.position.loader = None
    trainer.accelerator.free_memory()
