import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import convert_crossvit_to_hf
import pytest
import torch
import transformers
from examples_in_process import TINY_TRAINING, run_main, save_checkpoint
from hub_server import HubServer
from image_folders import write_zoo
from reference import run

import crossvit.interpretability
from crossvit import CrossViTConfig


# For the processes that tests start as well. One thread each: `-n 2` shares the cores better than threads do.
os.environ["HF_HUB_OFFLINE"] = os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Processes that tests interrupt inherit it; a test run that was started in the background ignores Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)

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


@pytest.fixture
def hub():
    """A small Hub on this machine."""
    with HubServer() as hub:
        yield hub


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a script of conversion/ in this process: its exit status, what it prints, and what it says on stderr."""

    def run_command(script, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        status = 0
        try:
            run(script.main)
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run_command


@pytest.fixture
def convert(command, tmp_path):
    """Converts a source to the folder "output" and returns it."""

    def convert_source(source, *arguments) -> Path:
        status, _, errors = command(convert_crossvit_to_hf, source, tmp_path / "output", *arguments)
        assert status == 0, errors
        return tmp_path / "output"

    return convert_source


@pytest.fixture
def refuse(command, tmp_path):
    """Checks that a source is refused with one line and without a trace, and returns the line."""

    def refuse_source(source, *arguments) -> str:
        before = set(tmp_path.iterdir())
        status, output, errors = command(convert_crossvit_to_hf, source, tmp_path / "output", *arguments)
        lines = [line for line in errors.splitlines() if line.strip() and "%|" not in line]  # less progress bars
        assert status == 1 and output == "" and len(lines) == 1 and lines[0].startswith("error: "), (output, errors)
        assert set(tmp_path.iterdir()) == before
        return lines[0]

    return refuse_source


@pytest.fixture
def zoo(tmp_path) -> Path:
    """A folder of 24 images of three classes to train with, and 9 for validation."""
    write_zoo(tmp_path / "zoo", images=8)
    return write_zoo(tmp_path / "zoo", images=3, splits=("validation",))


@pytest.fixture
def checkpoint(small_config, tmp_path) -> Path:
    """A folder with the small model and its image processor."""
    return save_checkpoint(small_config, tmp_path / "checkpoint")


@pytest.fixture
def run_example(monkeypatch, capsys):
    """Runs a command of examples/ in this process: its exit status, what it prints, and what it says on stderr."""
    monkeypatch.setattr(sys, "argv", [])

    def run_command(name: str, *arguments) -> tuple[int, str, str]:
        capsys.readouterr()  # what the preparation of the test has printed
        status = 0
        try:
            run_main(name, *arguments)
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run_command


@pytest.fixture
def example(run_example):
    """Runs a command of examples/ that must succeed: what it prints, and what it says on stderr."""

    def run_to_the_end(name: str, *arguments) -> tuple[str, str]:
        status, output, errors = run_example(name, *arguments)
        assert status == 0, errors
        return output, errors

    return run_to_the_end


@pytest.fixture
def failure(run_example):
    """Runs a command of examples/ that must fail without a trace: the line that it ends with."""

    def run_to_the_error(name: str, *arguments) -> str:
        status, _, errors = run_example(name, *arguments)
        assert status in (1, 2) and "Traceback" not in errors, errors
        line = errors.strip().splitlines()[-1]
        assert line.startswith(f"{name}.py: error: "), errors
        return line

    return run_to_the_error


@pytest.fixture
def drawn_rows(monkeypatch) -> list[list[Any]]:
    """The cells of the picture that a command will draw."""
    rows: list[list[Any]] = []
    draw = crossvit.interpretability.draw_rows

    def draw_rows(cells, *args, **kwargs):
        rows[:] = cells
        return draw(cells, *args, **kwargs)

    monkeypatch.setattr(crossvit.interpretability, "draw_rows", draw_rows)
    return rows


@pytest.fixture
def finetune_options(zoo, small_config, tmp_path):
    """The options of finetune.py that train the small model on the zoo, followed by others."""

    def make_options(*others, output: str = "tuned", model: Path | None = None, data: Path = zoo) -> list[Any]:
        small_config.save_pretrained(tmp_path / "config")
        start = ["--model", model] if model else ["--config", tmp_path / "config"]
        return [*start, "--data", data, "--output_dir", tmp_path / output, *TINY_TRAINING, *others]

    return make_options


@pytest.fixture
def finetune(example, finetune_options, tmp_path):
    """Fine-tunes the small model on the zoo with further options, and returns the folder of the result."""

    def run_finetune(*options, output: str = "tuned", **choices) -> Path:
        example("finetune", *finetune_options(*options, output=output, **choices))
        return tmp_path / output

    return run_finetune
