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
The code that a checkpoint carries, so that `trust_remote_code=True` loads it where this package is not installed.

With `config.auto_map = dict(AUTO_MAP)`, and the same for the image processor, `save_pretrained` writes it.
"""

import os
import shutil
from contextvars import ContextVar
from pathlib import Path
from typing import Any


# The class that each Auto class loads. Both image processors are found in one file, which imports the other one:
# Transformers caches a file together with those that it imports.
AUTO_MAP: dict[str, Any] = {
    "AutoConfig": "configuration_crossvit.CrossViTConfig",
    "AutoModel": "modeling_crossvit.CrossViTModel",
    "AutoModelForImageClassification": "modeling_crossvit.CrossViTForImageClassification",
    "AutoBackbone": "modeling_crossvit.CrossViTBackbone",
    "AutoImageProcessor": {
        "torchvision": "image_processing_crossvit.CrossViTImageProcessor",
        "pil": "image_processing_crossvit.CrossViTImageProcessorPil",
    },
}

IS_SAVING: ContextVar[bool] = ContextVar("IS_SAVING", default=False)  # whether `save_pretrained` is running

CODE_FILES = (
    "configuration_crossvit.py",
    "image_processing_crossvit.py",
    "image_processing_pil_crossvit.py",
    "modeling_crossvit.py",
    "remote_code.py",
    "timm_checkpoints.py",
)


def is_carried(reference: str | dict[str, str]) -> bool:
    """Whether an entry of an `auto_map` is in one of our files in the checkpoint, not in another repository."""
    classes = reference.values() if isinstance(reference, dict) else (reference,)
    return all(f"{name.split('.')[0]}.py" in CODE_FILES for name in classes)


class RemoteCodeMixin:
    """
    Configs and image processors whose `auto_map` says that the checkpoint carries its code are saved with all of it.

    Transformers copies the file of a class that was loaded as remote code, or registered for that, and enters only
    this class into `auto_map`. The other Auto classes could not load a checkpoint that was fine-tuned and saved again,
    and one that was loaded by this package would lose its code.
    """

    def save_pretrained(self, *args, **kwargs):
        token = IS_SAVING.set(True)
        try:
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        finally:
            IS_SAVING.reset(token)

    def to_json_file(self, json_file_path: str | os.PathLike, *args, **kwargs):
        # Not before: a push uploads what was written after the start of `save_pretrained`
        auto_map = getattr(self, "auto_map", None) or {}
        if IS_SAVING.get() and any(is_carried(reference) for reference in auto_map.values()):
            others = {name: reference for name, reference in auto_map.items() if not is_carried(reference)}
            self.auto_map = {**AUTO_MAP, **others}
            for file in CODE_FILES:
                source = Path(__file__).with_name(file)
                if source.exists():  # Remote code has only the files that were needed so far
                    shutil.copyfile(source, Path(json_file_path).with_name(file))
        super().to_json_file(json_file_path, *args, **kwargs)  # type: ignore[misc]
