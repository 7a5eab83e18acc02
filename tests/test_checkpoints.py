"""Which checkpoint of an interrupted training run is resumed."""

from common.checkpoints import last_usable_checkpoint
from small_training import arguments, images_of
from transformers import Trainer

from crossvit import CrossViTForImageClassification


def test_checkpoints_that_were_not_finished_are_not_used(small_config, tmp_path):
    args = arguments(tmp_path, max_steps=11, save_steps=1, save_total_limit=4)
    Trainer(CrossViTForImageClassification(small_config), args, train_dataset=images_of([0, 1])).train()
    (tmp_path / "checkpoint-notes").mkdir()
    assert last_usable_checkpoint(tmp_path) == str(tmp_path / "checkpoint-11")
    (tmp_path / "checkpoint-11" / "trainer_state.json").unlink()
    assert last_usable_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{")
    assert last_usable_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    weights = tmp_path / "checkpoint-9" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert last_usable_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-8" / "model.safetensors").write_bytes(b"")
    assert last_usable_checkpoint(tmp_path) is None
