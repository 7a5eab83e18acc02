import json
import os
from pathlib import Path

import pytest
import torch
import transformers

from crossvit import CrossViTConfig


# For the processes that tests start as well. One thread each: `-n 2` shares the cores better than threads do.
os.environ["HF_HUB_OFFLINE"] = os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

VARIANTS = json.loads((Path(__file__).parents[1] / "conversion" / "variants.json").read_text())


@pytest.fixture(params=VARIANTS, ids=lambda variant: variant["name"])
def variant(request) -> dict:
    """An entry of variants.json: each of the published checkpoints in turn."""
    return request.param


@pytest.fixture
def small_config() -> CrossViTConfig:
    """Two branches that differ in every number, small enough for tests of behavior."""
    return CrossViTConfig(
        image_size=(36, 32),
        patch_size=(6, 8),
        embed_dim=(24, 32),
        depth=((1, 2, 0), (2, 1, 0)),
        num_heads=(2, 4),
        mlp_ratio=(2.0, 3.0, 1.0),
        num_labels=5,
    )


@pytest.fixture(autouse=True)
def deterministic():
    transformers.set_seed(0)
