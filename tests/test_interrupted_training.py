"""A training that is killed at any moment goes on by the same command and ends with the same weights."""

import multiprocessing

import pytest
from examples_in_process import TINY_TRAINING, run_killed
from test_finetune import same_weights


SAVING = ["--num_train_epochs", "2", "--save_strategy", "steps", "--eval_strategy", "steps"]
SAVING += ["--save_steps", "1", "--eval_steps", "1", "--logging_steps", "1", "--drop_path_rate", "0.2"]
NEVER = 10**9


@pytest.fixture(scope="module")
def context():
    """Processes that need not import everything first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crossvit.training.training_run", "examples_in_process", "peft"])
    return context


@pytest.fixture
def train(context, zoo, small_config, tmp_path):
    small_config.save_pretrained(tmp_path / "config")

    def run(output, event, *options) -> int:
        arguments = ["--config", str(tmp_path / "config"), "--data", str(zoo), *TINY_TRAINING, *SAVING, *options]
        arguments += ["--output_dir", str(tmp_path / output)]
        process = context.Process(target=run_killed, args=(event, "finetune", *arguments))
        process.start()
        process.join()
        return process.exitcode

    return run


@pytest.mark.parametrize(
    "options, events",
    [
        (["--num_train_epochs", "5"], range(1, 56, 5)),
        (["--average_decay", "0.9"], (13, 30)),
        (["--lora_rank", "2"], (13, 30)),
        (["--streaming", "--max_steps", "6", "--mixup_alpha", "0.8"], (13, 30)),
        (["--dataloader_num_workers", "1", "--gradient_accumulation_steps", "2"], (13,)),
    ],
    ids=["every-moment", "average", "lora", "stream", "workers"],
)
def test_killed_and_started_again(train, tmp_path, options, events):
    assert train("whole", NEVER, *options) == 0
    codes = [train("killed", event, *options) for event in events]
    assert set(codes) <= {-9, 0} and codes.count(-9) >= min(len(codes), 8)
    assert train("killed", NEVER, *options) == 0
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    # Once more changes nothing
    assert train("killed", NEVER, *options) == 0
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
