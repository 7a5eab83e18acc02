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
"""Training with FSDP, which shards the weights over the processes."""

from pathlib import Path

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


class FsdpTrainer(Trainer):
    """A [`~transformers.Trainer`] that shards a CrossViT, and saves it as a full checkpoint."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # Accelerate would wrap the embeddings as well as the module in them that FSDP2 considers the input embeddings
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = ["CrossViTLayer", "CrossViTFusion"]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        As [`~transformers.Trainer.save_model`], but a sharded model is saved as a full checkpoint, which
        `from_pretrained` loads. Checkpoints during training keep FSDP's format.
        """
        super().save_model(output_dir, _internal_call)
        folder = output_dir or self.args.output_dir
        if self.is_fsdp_enabled and not Path(folder).name.startswith(PREFIX_CHECKPOINT_DIR):
            if "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type):
                self._save(folder, state_dict=self.accelerator.get_state_dict(self.model))
