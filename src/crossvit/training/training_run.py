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
"""A training from images to a saved model, as commands do it, which differ in the model and the recipe."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..interpretability.plotting import draw_confusion_matrix, save_figure
from .augmentation import AugmentationArguments, ImageCollator
from .errors import CommandError
from .image_datasets import DataArguments, LabelledImages
from .metrics import MultiLabelMetric, SingleLabelMetric, confusion_matrix
from .resuming import LOCK_NAME, resume_point
from .sampling import ImageDataset, ImageStream
from .trainer import CrossViTTrainer, order_seed


# Of TrainingArguments, where images are concerned or a user of a command expects it
TRAINING_DEFAULTS: dict[str, Any] = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "logging_steps": 10,
    "report_to": ["tensorboard"],
    "remove_unused_columns": False,  # the collator needs the images
    "label_names": ["labels"],
}


@contextmanager
def training_run(
    data: DataArguments, args: TrainingArguments, *others: Any
) -> Iterator[tuple[LabelledImages, Path | None]]:
    """
    Begins a run, or goes on with it: looks for what it has left in `args.output_dir`, which is its own as long as it
    lasts, and reads and checks the images.

    Args:
        data ([`DataArguments`]), args ([`~transformers.TrainingArguments`]): options of the command.
        others: its other options, on which the result depends as well.

    Yields:
        `tuple[LabelledImages, Path | None]`: images to train with and to validate, and the checkpoint to go on from.
    """
    check_arguments(data, args)
    with exclusive(Path(args.output_dir)) if args.should_save else nullcontext():
        checkpoint = resume_point(args.output_dir, [data, args, *others], main_process=args.should_save)
        if checkpoint and args.should_log:
            print(f"Going on from {checkpoint}", flush=True)
        copies = Path(args.output_dir) / "_images"
        if checkpoint is None and args.should_save:
            shutil.rmtree(copies, ignore_errors=True)  # the images may have changed since an earlier attempt
        with args.main_process_first():
            images = LabelledImages.load(data).on_disk(copies)
        images.check_labels()
        if data.check_images and checkpoint is None:  # they were checked when the run began
            images.check_images(args.process_index, args.world_size)
        images = images.for_training(data.validation_fraction, args.seed)
        set_seed(args.seed)  # for the weights of new heads
        yield images, checkpoint


def check_arguments(data: DataArguments, args: TrainingArguments) -> None:
    """Refuses what would fail late, and adapts what depends on streaming."""
    if not data.data:
        raise CommandError("give --data, a folder of images or a data set of the Hub")
    folder = Path(data.data).expanduser().resolve()
    if folder.is_dir() and Path(args.output_dir).resolve().is_relative_to(folder):
        raise CommandError(f"--output_dir {args.output_dir}: lies in --data {data.data}; choose a folder elsewhere")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "num_train_epochs", "logging_steps"):
        if getattr(args, name) <= 0:
            raise CommandError(f"--{name} {getattr(args, name)}: must be above 0")
    if args.save_only_model or args.batch_eval_metrics or not args.eval_do_concat_batches:
        raise CommandError(
            "--save_only_model, --batch_eval_metrics, --eval_do_concat_batches: not with this command, which goes on"
            " from whole checkpoints and evaluates all images at once"
        )
    if not 0 <= args.label_smoothing_factor < 1:
        raise CommandError(f"--label_smoothing_factor {args.label_smoothing_factor}: must be at least 0 and below 1")
    if data.streaming:
        if args.max_steps <= 0:
            raise CommandError("--streaming: a stream has no known end, so say with --max_steps how long to train")
        if args.eval_strategy == IntervalStrategy.EPOCH:
            args.eval_strategy = IntervalStrategy.STEPS
            args.eval_steps = args.eval_steps or args.save_steps
        if args.save_strategy == SaveStrategy.EPOCH:
            args.save_strategy = SaveStrategy.STEPS
        accelerator: Any = args.accelerator_config
        accelerator.dispatch_batches = False  # each process reads its own part of a stream


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keeps other commands from writing into the same folder. The lock ends with the process, however that ends."""
    lock = FileLock(folder / LOCK_NAME, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise CommandError(f"--output_dir {folder}: another command is writing there") from error
    except OSError as error:
        raise CommandError(f"--output_dir {folder}: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def make_trainer(
    model: Any,
    processor: Any,
    images: LabelledImages,
    data: DataArguments,
    augmentation: AugmentationArguments,
    args: TrainingArguments,
    average_decay: float | None = None,
) -> CrossViTTrainer:
    """The Trainer of a model with these images; the best checkpoint is that of the best accuracy (many labels: F1)."""
    metric = MultiLabelMetric() if images.multi_label else SingleLabelMetric()
    if images.multi_label and args.metric_for_best_model == "accuracy":
        args.metric_for_best_model = "f1"
    if args.metric_for_best_model.removeprefix("eval_") not in (*metric.names, "loss"):
        raise CommandError(
            f"--metric_for_best_model {args.metric_for_best_model}: none of {', '.join(metric.names)}, loss"
        )
    train: Any = images.splits["train"]
    if data.streaming:
        if args.dataloader_num_workers > train.num_shards:
            raise CommandError(
                f"--dataloader_num_workers {args.dataloader_num_workers}: a stream of {train.num_shards} shards takes"
                " at most as many"
            )
        shuffled = train.shuffle(order_seed(args), buffer_size=data.shuffle_buffer_size)
        train = ImageStream(shuffled, True, augmentation.augmentation_repeats, args.train_batch_size)
    else:
        train = ImageDataset(train, augmentation.augmentation_repeats)
    try:
        return CrossViTTrainer(
            model,
            args,
            data_collator=ImageCollator(
                processor, len(images.class_names), images.multi_label, augmentation, args.seed
            ),
            train_dataset=train,
            eval_dataset=ImageDataset(images.splits["validation"]),
            processing_class=processor,
            compute_metrics=metric.of_prediction,
            preprocess_logits_for_metrics=metric.reduce_logits,
            average_decay=average_decay,
        )
    except ValueError as error:  # options that do not suit the images or this machine
        raise CommandError(str(error)) from error


def finish(trainer: CrossViTTrainer, images: LabelledImages, data: DataArguments) -> None:
    """Evaluates the trained model on all that was not trained with, saves it, and pushes it to the Hub on request."""
    output = Path(trainer.args.output_dir)
    trainer.save_model(_internal_call=True)  # first of all, and without a push
    for name, split in images.splits.items():
        if name == "train":
            continue
        prefix = "eval" if name == "validation" else name
        prediction = trainer.predict(ImageDataset(split), metric_key_prefix=prefix)
        trainer.log(prediction.metrics)  # for the model card
        trainer.log_metrics(name, prediction.metrics)
        trainer.save_metrics(name, prediction.metrics)
        if trainer.args.should_save and not images.multi_label:
            matrix = confusion_matrix(prediction.predictions[0], prediction.label_ids, len(images.class_names))
            save_figure(draw_confusion_matrix(matrix, images.class_names), output / f"{name}_confusion.png")
    card: dict[str, Any] = {"dataset": Path(data.data).resolve().name}
    if not Path(data.data).expanduser().exists():
        card = {"dataset": data.data, "dataset_tags": data.data}
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    if trainer.args.should_save:
        print(f"Saved the model and its image processor in {output}", flush=True)


__all__ = ["TRAINING_DEFAULTS", "finish", "make_trainer", "training_run"]
