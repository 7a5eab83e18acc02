"""A training that is killed while it writes goes on by the same command, and ends with the same weights."""

import multiprocessing

import pytest
from examples_in_process import run_killed
from test_finetune import same_weights


# The last weights, not the best ones, which may be those before the interruption
OPTIONS = "--num_train_epochs 4 --drop_path_rate 0.2 --load_best_model_at_end false".split()


@pytest.fixture(scope="module")
def context():
    """Processes that need not import everything first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["common.workflow", "examples_in_process", "peft"])
    return context


@pytest.fixture
def train(context, finetune_options):
    def run(output, killed_at=None) -> int:
        arguments = map(str, finetune_options(*OPTIONS, output=output))
        process = context.Process(target=run_killed, args=(killed_at, "finetune", *arguments))
        process.start()
        process.join()
        return process.exitcode

    return run


def test_killed_and_started_again(train, tmp_path):
    """Checkpoints are written at the ends of epochs, so that random numbers go on as they would have."""
    assert train("whole") == 0
    # The first of the files that Python writes in a checkpoint, and the last one
    assert train("killed", "checkpoint-6/config.json") == -9
    assert train("killed", "checkpoint-9/trainer_state.json") == -9
    assert train("killed") == 0
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
