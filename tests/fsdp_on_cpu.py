"""Runs a script with FSDP2 on CPUs, for which accelerate takes DDP instead: `torchrun fsdp_on_cpu.py SCRIPT ...`."""

import runpy
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import Trainer


create_accelerator = Trainer.create_accelerator_and_postprocess


def create_accelerator_for_fsdp(trainer):
    create_accelerator(trainer)
    state = trainer.accelerator.state
    # By its environment variables, as `accelerate launch` sets them
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


if __name__ == "__main__":
    Trainer.create_accelerator_and_postprocess = create_accelerator_for_fsdp
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # as if that script had been started
    runpy.run_path(sys.argv[0], run_name="__main__")
