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
"""Checkpoints that a training run can resume from."""

import logging
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = logging.getLogger(__name__)


def last_usable_checkpoint(output_dir: str | Path) -> str | None:
    """
    The newest checkpoint of a run whose `trainer_state.json`, which the Trainer writes last, is there and whose
    weights load; [`~transformers.trainer_utils.get_last_checkpoint`] returns what a killed process began to write.
    """
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    checkpoints = {int(step): folder for folder in folders if (step := folder.name.rpartition("-")[2]).isdecimal()}
    for _, checkpoint in sorted(checkpoints.items(), reverse=True):
        try:
            TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            for file in checkpoint.glob("*.safetensors"):
                with safe_open(file, "pt"):  # compares the length of the file with its header
                    pass
            return str(checkpoint)
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            logger.warning(f"{checkpoint} is not complete and not used: {error}")
    return None
