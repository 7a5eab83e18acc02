"""The commands of examples/ with small models, in this process and in others."""

import json
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from timm_reference import perturb

from crossvit import CrossViTConfig, CrossViTForImageClassification, CrossViTImageProcessor


EXAMPLES = Path(__file__).parents[1] / "examples"
# More than 90 % of the zoo are right after six epochs; chance is a third
TINY_TRAINING = "--use_cpu --learning_rate 2e-3 --num_train_epochs 6 --per_device_train_batch_size 8".split()
TINY_TRAINING += "--disable_tqdm true --crop_scale 0.5 1 --report_to none".split()


def save_checkpoint(config: CrossViTConfig, folder: Path, **options) -> Path:
    """Saves a model, every weight of which was moved, and its image processor; returns the folder."""
    perturb(CrossViTForImageClassification(config)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 40}, "crop_size": {"height": 36, "width": 36}}
    CrossViTImageProcessor(**{**size, "image_mean": [0.5, 0.4, 0.3], **options}).save_pretrained(folder)
    return folder


def run_main(name: str, *arguments: object) -> None:
    """Runs a command as its users do, but for the process: it ends by `SystemExit` where it fails."""
    sys.argv = [f"{name}.py", *map(str, arguments)]
    command: dict[str, Any] = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=f"example_{name}")
    command["run_command"](command["main"])


def history(folder: Path, key: str) -> list[float]:
    """What the last checkpoint of a run has logged under a name."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda checkpoint: int(checkpoint.name.split("-")[1]))
    entries = json.loads((checkpoints[-1] / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in entries if key in entry]


def results(folder: Path, split: str = "validation") -> dict[str, float]:
    """What a run has measured in the end."""
    return json.loads((folder / f"{split}_results.json").read_text())


def run_killed(file: str | None, name: str, *arguments: object) -> None:
    """Runs a command in this process, killed as by `kill -9` when it starts to write that file of its output."""
    killed_at = file and os.path.join(str(arguments[arguments.index("--output_dir") + 1]), file)

    def kill_at_file(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and str(args[0]) == killed_at and not str(args[1]).startswith("r"):
            os.kill(os.getpid(), signal.SIGKILL)

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    multiprocessing.set_start_method("fork", force=True)  # for workers, as in a process that a shell has started
    sys.addaudithook(kill_at_file)
    run_main(name, *arguments)
