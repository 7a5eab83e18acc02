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
"""How many processes read images."""

import os

import torch


def default_num_workers() -> int:
    """
    Number of processes that read images for each process that runs a model: one per core, at most 8. None without an
    accelerator, where they would only take the cores of the model.
    """
    if not torch.accelerator.is_available():
        return 0
    import joblib  # respects the limits of a container

    return min(max(joblib.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1), 8)
