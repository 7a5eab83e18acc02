"""A run goes on from a whole checkpoint with the arguments that it began with, or not at all."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import TrainingArguments

from crossvit.training.errors import CommandError, ResumeError
from crossvit.training.resuming import is_complete, last_complete_checkpoint, resume_point


FILES = {"model.safetensors": b"weights", "optimizer.pt": b"moments", "rank/rng_state.pth": b"numbers"}


@dataclass
class Options:
    data: str = "zoo"
    crop_scale: tuple[float, float] = (0.35, 1.0)
    label: str | None = None


def write_checkpoint(folder: Path, step: int = 10) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    for name, content in FILES.items():
        path = checkpoint / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (checkpoint / "files.json").write_text(json.dumps({name: len(content) for name, content in FILES.items()}))
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return checkpoint


def begin(folder: Path, options: Options | None = None, main_process: bool = True, **arguments):
    training = TrainingArguments(folder, **{"report_to": "none", "use_cpu": True, **arguments})
    return resume_point(folder, [options or Options(), training], main_process)


def refused(folder: Path, options: Options | None = None, **arguments) -> str:
    with pytest.raises(ResumeError) as caught:
        begin(folder, options, **arguments)
    assert isinstance(caught.value, CommandError) and "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_whole_checkpoints(tmp_path):
    checkpoint = write_checkpoint(tmp_path)
    assert is_complete(checkpoint)
    (checkpoint / "notes.txt").write_text("of the user")
    assert is_complete(checkpoint)


@pytest.mark.parametrize("name", [*FILES, "files.json", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "longer"])
def test_checkpoints_that_are_not_whole(tmp_path, name, damage):
    path = write_checkpoint(tmp_path) / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "truncated": content[:-1], "longer": content + b"{"}[damage])
    assert not is_complete(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"'])
def test_lists_of_files_that_are_none(tmp_path, content):
    checkpoint = write_checkpoint(tmp_path)
    (checkpoint / "files.json").write_text(content)
    assert not is_complete(checkpoint)


def test_checkpoints_that_are_not_there(tmp_path):
    assert not is_complete(tmp_path / "checkpoint-1")
    assert last_complete_checkpoint(tmp_path / "missing") is None
    assert last_complete_checkpoint(tmp_path) is None


def test_the_newest_whole_checkpoint_is_taken(tmp_path, caplog):
    for step in (5, 9, 10, 100):
        write_checkpoint(tmp_path, step)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    (tmp_path / "checkpoint-100" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-").mkdir()
    (tmp_path / "checkpoint-200").write_text("a file")
    assert last_complete_checkpoint(str(tmp_path)) == tmp_path / "checkpoint-10"
    shutil.rmtree(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10").mkdir()
    caplog.clear()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert [name for name in (5, 9, 10, 100) if f"checkpoint-{name} is not complete" in caplog.text] == [10, 100]
    assert "checkpoint-best" not in caplog.text


def test_runs_begin_and_go_on(tmp_path):
    folder = tmp_path / "runs" / "first"
    assert begin(folder) is None
    assert begin(folder) is None
    checkpoint = write_checkpoint(folder)
    assert begin(folder) == checkpoint
    (write_checkpoint(folder, 20) / "trainer_state.json").unlink()
    assert begin(folder) == checkpoint
    assert [path for path in folder.iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.parametrize(
    "options, arguments, change",
    [
        (Options(data="farm"), {}, "data was 'zoo' and is 'farm'"),
        (Options(crop_scale=(0.5, 1.0)), {}, "crop_scale was [0.35, 1.0] and is [0.5, 1.0]"),
        (Options(label="kind"), {}, "label was None and is 'kind'"),
        (Options(), {"learning_rate": 0.1}, "learning_rate was 5e-05 and is 0.1"),
        (Options(), {"seed": 1}, "seed was 42 and is 1"),
        (Options(), {"max_steps": 7}, "max_steps was -1 and is 7"),
        (Options(), {"num_train_epochs": 5}, "num_train_epochs was 3.0 and is 5"),
        (Options(), {"per_device_train_batch_size": 2}, "per_device_train_batch_size was 8 and is 2"),
        (Options(), {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1 and is 2"),
        (Options(), {"dataloader_drop_last": True}, "dataloader_drop_last was False and is True"),
        (Options(), {"lr_scheduler_type": "cosine"}, "lr_scheduler_type was 'linear' and is 'cosine'"),
    ],
    ids=str,
)
def test_other_arguments_are_named(tmp_path, options, arguments, change):
    begin(tmp_path)
    write_checkpoint(tmp_path)
    found = refused(tmp_path, options, **arguments)
    assert f"({change})" in found and "--output_dir" in found
    begin(tmp_path)


def test_other_arguments_begin_anew_where_nothing_was_saved(tmp_path):
    begin(tmp_path)
    assert begin(tmp_path, seed=1) is None
    write_checkpoint(tmp_path)
    assert "seed was 1 and is 42" in refused(tmp_path)


def test_all_other_arguments_are_named(tmp_path):
    begin(tmp_path)
    write_checkpoint(tmp_path)
    found = refused(tmp_path, Options(data="farm"), seed=1, learning_rate=0.1)
    assert all(name in found for name in ("data was", "learning_rate was", "seed was"))


def test_arguments_of_other_processes(tmp_path, monkeypatch):
    begin(tmp_path)
    write_checkpoint(tmp_path)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    assert "num_processes was 1 and is 2" in refused(tmp_path)


def test_arguments_without_effect_may_change(tmp_path):
    begin(tmp_path)
    checkpoint = write_checkpoint(tmp_path)
    found = begin(
        tmp_path,
        logging_steps=3,
        logging_first_step=True,
        dataloader_num_workers=2,
        log_level="info",
        report_to=["tensorboard"],
        run_name="again",
        disable_tqdm=True,
        save_total_limit=1,
        push_to_hub=True,
        hub_model_id="me/model",
        hub_private_repo=True,
        dataloader_pin_memory=False,
        resume_from_checkpoint="yes",
        ddp_timeout=9,
        do_eval=True,
    )
    assert found == checkpoint


def test_runs_may_be_moved(tmp_path):
    begin(tmp_path / "here")
    write_checkpoint(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert begin(tmp_path / "there") == tmp_path / "there" / "checkpoint-10"


@pytest.mark.parametrize("content", [b"", b"{", b'{"seed": 42', b"\xff\xfe", b"[]", b"3", b"null"])
def test_damaged_records_are_named(tmp_path, content):
    begin(tmp_path)
    write_checkpoint(tmp_path)
    record = tmp_path / "_arguments.json"
    record.write_bytes(content)
    assert "another --output_dir" in refused(tmp_path)
    assert record.read_bytes() == content


def test_records_of_other_options(tmp_path):
    begin(tmp_path)
    write_checkpoint(tmp_path)
    record = tmp_path / "_arguments.json"
    values = json.loads(record.read_text())
    record.write_text(json.dumps({**values, "options": values["options"] | {"an_option_of_old": 1}}))
    assert "an_option_of_old was 1 and is None" in refused(tmp_path)
    record.write_text(json.dumps({**values, "options": values["options"] | {"an_option_of_old": None}}))
    begin(tmp_path)
    # Of another release of transformers
    record.write_text(json.dumps({**values, "training_arguments": values["training_arguments"] | {"old": 1}}))
    begin(tmp_path)


def test_checkpoints_of_unknown_runs(tmp_path):
    write_checkpoint(tmp_path)
    assert "another --output_dir" in refused(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def test_one_process_writes(tmp_path):
    folder = tmp_path / "run"
    assert begin(folder, main_process=False) is None
    assert not (folder / "_arguments.json").exists()
    begin(folder)
    write_checkpoint(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ResumeError):
        begin(folder, seed=1, main_process=False)
    begin(folder, main_process=False)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_tokens_are_not_written(tmp_path):
    begin(tmp_path, push_to_hub=True, hub_token="hf_secret")
    assert not any("hf_secret" in path.read_text() for path in tmp_path.iterdir())
