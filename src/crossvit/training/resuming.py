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
"""What a run of a training script leaves behind, and whether the same command can go on from it."""

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from .errors import ResumeError


logger = logging.getLogger(__name__)

ARGUMENTS_NAME = "_arguments.json"  # the Trainer does not upload such names
FILES_NAME = "files.json"  # of a checkpoint, with their sizes
LOCK_NAME = "_lock"


# Beginnings of the names of those arguments that may change when a run goes on
WITHOUT_EFFECT = (
    "dataloader_persistent", "dataloader_pin", "dataloader_prefetch", "ddp_timeout", "debug", "disable_tqdm", "do_",
    "hub_", "local_rank", "log", "output_dir", "project", "push_to_hub", "report_to", "resume_from", "run_name",
    "per_device_eval", "recipe", "save_total_limit", "trackio",
)  # fmt: skip


def is_complete(checkpoint: Path) -> bool:
    """
    Whether a checkpoint of a [`CrossViTTrainer`] has all that a run needs to go on: every file of
    its list, and the Trainer's state, which is written last. What was being written or deleted when a process was
    killed lacks one of them.
    """
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        sizes = json.loads((checkpoint / FILES_NAME).read_text())
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (AttributeError, OSError, ValueError):  # what is no object, missing or no JSON
        return False


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """
    The newest checkpoint of a run that is whole; unlike [`~transformers.trainer_utils.get_last_checkpoint`], which
    takes one that a killed process had begun to write.
    """
    checkpoints = [
        folder
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.name.rpartition("-")[2].isdecimal()
    ]
    for checkpoint in sorted(checkpoints, key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True):
        if is_complete(checkpoint):
            return checkpoint
        logger.warning(f"{checkpoint} is not complete, the run that wrote it was stopped: it is not used")
    return None


def what_results_depend_on(arguments: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Options of the command and TrainingArguments, without those that may change."""
    options: dict[str, Any] = {}
    training: dict[str, Any] = {}
    for group in arguments:
        if isinstance(group, TrainingArguments):
            training |= group.to_dict() | {"num_processes": group.world_size * max(group.n_gpu, 1)}
        else:
            options |= dataclasses.asdict(group)
    if not options.get("streaming"):  # the images of a stream come in an order that depends on its readers
        training.pop("dataloader_num_workers", None)
    kept = {
        kind: {name: value for name, value in values.items() if not name.startswith(WITHOUT_EFFECT)}
        for kind, values in (("options", options), ("training_arguments", training))
    }
    return json.loads(json.dumps(kept, default=str))


def resume_point(output_dir: str | Path, arguments: Sequence[Any], main_process: bool = True) -> Path | None:
    """
    Where a run goes on that may have been started before with the same arguments.

    Args:
        output_dir (`str` or `Path`): of the run; created if it is missing.
        arguments (`Sequence`):
            Dataclasses of the command's options, [`~transformers.TrainingArguments`] too; kept for the next start.
        main_process (`bool`): whether this one writes.

    Returns:
        `Path | None`: its last complete checkpoint, if there is one.

    Raises:
        `ResumeError`: if the folder holds a run with other arguments, or something else.
    """
    folder = Path(output_dir)
    record = folder / ARGUMENTS_NAME
    present = what_results_depend_on(arguments)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")) or (folder / SAFE_WEIGHTS_NAME).exists():
            compare(record, present)
        elif main_process:
            unfinished = record.with_suffix(".tmp")
            unfinished.write_text(json.dumps(present, indent=2))
            os.replace(unfinished, record)
    except OSError as error:
        raise ResumeError(f"--output_dir {folder}: {error.strerror}") from error
    return last_complete_checkpoint(folder)


def compare(record: Path, present: dict[str, dict[str, Any]]) -> None:
    """Raises a `ResumeError` if the run in the folder of the record has other arguments than the present ones."""
    try:
        before = json.loads(record.read_text())
        options, training = dict(before["options"]), dict(before["training_arguments"])
    except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
        raise ResumeError(
            f"{record.parent} holds a model, but no record of how it was trained: use another --output_dir"
        ) from error
    # Other releases of transformers have other TrainingArguments
    training = {name: value for name, value in training.items() if name in present["training_arguments"]}
    before, now = training | options, {n: present["training_arguments"][n] for n in training} | present["options"]
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        changes = ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in changed)
        raise ResumeError(
            f"{record.parent} holds a run with other arguments ({changes}): use the same ones to go on, or another"
            " --output_dir to begin anew"
        )


__all__ = ["last_complete_checkpoint", "resume_point"]
