"""The commands of conversion/: equal logits, back again bit by bit, and clear errors that leave nothing behind."""

import argparse
import json
import os
import pickle
import warnings
import zipfile
from functools import partial

import convert_crossvit_to_hf
import convert_hf_to_timm
import pytest
import timm
import torch
from reference import VARIANTS
from reference_files import assert_same_weights, ibm_names, lucid_names, save_timm_folder, small_timm
from safetensors.torch import load_file, save_file
from timm_reference import timm_variant

from crossvit import CrossViTConfig, CrossViTForImageClassification, CrossViTImageProcessor
from crossvit.remote_code import CODE_FILES


@pytest.fixture
def config_file(small_config, tmp_path):
    """The configuration of `small_timm`, whose numbers of heads do not follow from the shapes of its weights."""
    small_config.depth = ((1, 2, 0), (2, 2, 0))
    small_config.save_pretrained(tmp_path / "config")
    return tmp_path / "config" / "config.json"


@pytest.fixture
def convert_back(command, tmp_path):
    """Converts a checkpoint to the folder "back" and returns it."""

    def run(checkpoint, *arguments):
        status, _, errors = command(convert_hf_to_timm, checkpoint, tmp_path / "back", *arguments)
        assert status == 0, errors
        return tmp_path / "back"

    return run


@torch.no_grad()
def assert_equal_logits(checkpoint, reference):
    model = CrossViTForImageClassification.from_pretrained(checkpoint).eval().float()
    pixel_values = torch.randn(2, model.config.num_channels, 40, 50)
    # The bound of test_parity_timm.py, which says why; up to 3e-6 here
    torch.testing.assert_close(model(pixel_values).logits, reference.float()(pixel_values), atol=1e-5, rtol=0)


# The largest, the smallest, and both forms of patch embeddings and image sizes: the others differ in numbers only, and
# test_parity_timm.py has all of them
LARGE = ["crossvit_tiny", "crossvit_base", "crossvit_18_dagger_384"]


@pytest.mark.parametrize(
    "name", ["crossvit_9_dagger", *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]
)
def test_variants_there_and_back(convert, convert_back, tmp_path, name):
    variant, reference = VARIANTS[name], timm_variant(VARIANTS[name])
    torch.save(ibm_names(reference.state_dict()), tmp_path / variant["ibm_file"])
    output = convert(tmp_path / variant["ibm_file"])
    assert_equal_logits(output, reference)
    record = json.loads((output / "conversion.json").read_text())
    assert (record["variant"], record["tensors"], record["parameters"]) == (
        name,
        variant["tensors"],
        variant["parameters"],
    )
    # Measured: 1e-14 at most
    assert record["largest_logit_difference"]["float64"] < 1e-12
    config = CrossViTConfig.from_pretrained(output)
    assert config.id2label[0] == "tench, Tinca tinca" and len(config.label2id) == 1000
    processor = CrossViTImageProcessor.from_pretrained(output)
    assert processor.size.shortest_edge == variant["preprocessing"]["resize_shortest_edge"]

    loaded = timm.create_model(f"local-dir:{convert_back(output)}", pretrained=True)
    assert loaded.pretrained_cfg["architecture"] == variant["architecture"]
    assert_same_weights(loaded.state_dict(), reference.state_dict())
    expected = timm.data.resolve_model_data_config(reference)
    assert {name: tuple(value) if isinstance(value, list) else value for name, value in expected.items()} == {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in timm.data.resolve_model_data_config(loaded).items()
    }


def test_output_has_everything(convert, tmp_path):
    output = convert(save_timm_folder(small_timm(), tmp_path / "timm"))
    record = json.loads((output / "conversion.json").read_text())
    written = ["README.md", "config.json", *CODE_FILES, "model.safetensors", "preprocessor_config.json"]
    assert record["files"] == sorted(written)
    assert {path.name for path in output.iterdir()} == {*written, "conversion.json"}
    assert record["source"]["file"] == "timm/model.safetensors" and len(record["source"]["sha256"]) == 64
    # The origin of these weights is not known, so the card claims neither a license nor an accuracy
    card = (output / "README.md").read_text()
    assert "license:" not in card and "eval_results" not in card and str(tmp_path) not in card


@pytest.mark.parametrize(
    ("names", "file", "save"),
    [
        (dict, "weights.safetensors", save_file),
        (ibm_names, "weights.pth", torch.save),
        (lucid_names, "weights.pth", partial(torch.save, _use_new_zipfile_serialization=False)),
    ],
    ids=["timm", "ibm", "lucid-dl"],
)
def test_names_and_files(convert, config_file, tmp_path, names, file, save):
    reference = small_timm()
    save(names(reference.state_dict()), tmp_path / file)
    assert_equal_logits(convert(tmp_path / file, "--config", config_file), reference)


def test_training_checkpoints(convert, refuse, config_file, tmp_path):
    model, average = small_timm(), small_timm()
    checkpoint = {
        "model": {f"module.{name}": weight for name, weight in ibm_names(model.state_dict()).items()},
        "model_ema": ibm_names(average.state_dict()),
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "epoch": 7,
        "args": argparse.Namespace(lr=0.004, data="imagenet"),
    }
    source = tmp_path / "checkpoint.pth"
    torch.save(checkpoint, source)
    assert "model, model_ema" in refuse(source, "--config", config_file)
    assert "--entry" in refuse(source, "--config", config_file, "--entry", "optimizer")
    output = convert(source, "--config", config_file, "--entry", "model_ema")
    assert_equal_logits(output, average)
    assert json.loads((output / "conversion.json").read_text())["source"]["entry"] == "model_ema"
    # A single state dict leaves no choice
    del checkpoint["model_ema"]
    torch.save(checkpoint, source)
    assert_equal_logits(convert(source, "--config", config_file, "--overwrite"), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types_are_kept(convert, convert_back, config_file, tmp_path, dtype):
    tensors = small_timm().to(dtype).state_dict()
    save_file(tensors, tmp_path / "weights.safetensors")
    output = convert(tmp_path / "weights.safetensors", "--config", config_file)
    assert CrossViTForImageClassification.from_pretrained(output, dtype="auto").dtype == dtype
    assert_same_weights(load_file(convert_back(output) / "model.safetensors"), tensors)


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 1, "in_chans": 1, "qkv_bias": False},
        {"depth": ((1, 1, 1), (2, 2, 0), (1, 3, 3))},
        {"img_size": 48, "img_scale": (1.0, 1.0), "patch_size": (12, 16), "multi_conv": True},
    ],
    ids=str,
)
def test_other_architectures_there_and_back(command, convert, convert_back, tmp_path, options):
    reference = small_timm(**options)
    output = convert(save_timm_folder(reference, tmp_path / "timm"))
    assert_equal_logits(output, reference)
    back = convert_back(output)
    loaded = timm.create_model(f"local-dir:{back}", pretrained=True)
    assert_same_weights(loaded.state_dict(), reference.state_dict())
    assert loaded.pretrained_cfg.get("license") is None  # It is not known
    assert command(convert_crossvit_to_hf, back, tmp_path / "again")[0] == 0
    for name in ("config.json", "preprocessor_config.json"):
        assert (tmp_path / "again" / name).read_text() == (output / name).read_text()


def test_configurations_of_this_package(convert, convert_back, small_config, tmp_path):
    small_config.update({"image_size": ((36, 18), (32, 16)), "depth": ((1, 2, 2),)})
    small_config.save_pretrained(tmp_path / "config")
    reference = small_timm(img_size=(36, 18), depth=((1, 2, 2),))
    save_file(reference.state_dict(), tmp_path / "weights.safetensors")
    output = convert(tmp_path / "weights.safetensors", "--config", tmp_path / "config" / "config.json")
    assert_equal_logits(output, reference)
    assert CrossViTImageProcessor.from_pretrained(output).size == {"height": 36, "width": 18}
    assert_same_weights(load_file(convert_back(output) / "model.safetensors"), reference.state_dict())


def test_fine_tuned_variants_are_recognized():
    with torch.device("meta"):
        tensors = timm.create_model("crossvit_15_dagger_408", num_classes=3).state_dict()
    config = convert_crossvit_to_hf.recognize(tensors)
    assert (config["architecture"], config["num_classes"]) == ("crossvit_15_dagger_408", 3)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("names.txt", "ant\nbee\ncow\ndog\nelk\n"),
        ("names.json", '["ant", "bee", "cow", "dog", "elk"]'),
        ("names.json", '{"4": "elk", "0": "ant", "1": "bee", "2": "cow", "3": "dog"}'),
    ],
    ids=["lines", "list", "object"],
)
def test_labels(convert, refuse, tmp_path, file, text):
    folder, labels = save_timm_folder(small_timm(), tmp_path / "timm"), tmp_path / file
    labels.write_text(text.replace("cow", "bee"))
    assert "different name" in refuse(folder, "--labels", labels)
    labels.write_text(text)
    config = CrossViTConfig.from_pretrained(convert(folder, "--labels", labels))
    assert list(config.id2label.values()) == ["ant", "bee", "cow", "dog", "elk"]


def test_ibm_names_on_the_way_back(convert, convert_back, tmp_path):
    reference = small_timm()
    back = convert_back(convert(save_timm_folder(reference, tmp_path / "timm")), "--format", "ibm")
    assert_same_weights(torch.load(back / "model.pth", weights_only=True), ibm_names(reference.state_dict()))


def test_verify(command, convert, refuse, tmp_path):
    folder = save_timm_folder(small_timm(), tmp_path / "timm")
    output = convert(folder)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    status, printed, _ = command(convert_crossvit_to_hf, folder, output, "--verify")
    assert status == 0 and "172 tensors" in printed
    # Another number of heads changes the logits, but not the weights
    config = (output / "config.json").read_text()
    other = json.loads(config) | {"num_heads": [4, 4]}
    (output / "config.json").write_text(json.dumps(other))
    status, _, errors = command(convert_crossvit_to_hf, folder, output, "--verify")
    assert status == 1 and "logits differ" in errors
    (output / "config.json").write_text(config)
    weights = load_file(output / "model.safetensors")
    weights["crossvit.layernorms.0.bias"][3] += 1e-6
    save_file(weights, output / "model.safetensors", {"format": "pt"})
    status, _, errors = command(convert_crossvit_to_hf, folder, output, "--verify")
    assert status == 1 and "crossvit.layernorms.0.bias" in errors
    assert {path.name for path in output.iterdir()} == set(before)


# What cannot be converted


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_not_executed(refuse, tmp_path, zipped):
    touched = tmp_path / "touched"
    checkpoint = {"model": small_timm().state_dict(), "args": Payload(touched)}
    torch.save(checkpoint, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    message = refuse(tmp_path / "model.pth")
    assert "refusing to load" in message and "posix.system" in message and "weights_only" not in message
    assert not touched.exists()
    torch.load(tmp_path / "model.pth", weights_only=False)  # which executes the payload
    assert touched.exists()


def rewrite_archive(path, change):
    """Replaces records of an archive, with checksums that match."""
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w") as archive:
        for name, content in records:
            archive.writestr(name, change(name, content))


def test_short_records(refuse, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(small_timm().state_dict(), path)
    rewrite_archive(path, lambda name, content: content[:-4] if name.endswith("data/7") else content)
    assert "record size" in refuse(path)


def test_flipped_bits(refuse, tmp_path):
    path, weights = tmp_path / "model.pth", small_timm().state_dict()
    torch.save(weights, path)
    content = bytearray(path.read_bytes())
    content[content.index(weights["head.1.weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # which does not notice
    assert "checksum" in refuse(path)


@pytest.mark.parametrize("file", ["model.safetensors", "model.pth"])
def test_files_without_whole_weights(refuse, tmp_path, file):
    (save_file if file == "model.safetensors" else torch.save)(small_timm().state_dict(), tmp_path / file)
    truncated = (tmp_path / file).read_bytes()[:10_000]
    for content in (truncated, b"", b"<!DOCTYPE html>", pickle.dumps([1], protocol=2)):
        (tmp_path / file).write_bytes(content)
        refuse(tmp_path / file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("blocks.1.blocks.0.1.attn.proj.bias"),
            "blocks.1.blocks.0.1.attn.proj.bias is miss",
        ),
        (lambda weights: weights.update(extra=torch.zeros(1)), "extra is unknown"),
        (lambda weights: weights.update({"module.norm.0.bias": torch.ones(24)}), "several that map to the same name"),
        (
            lambda weights: weights.update({"norm.0.bias": torch.zeros(7)}),
            "norm.0.bias has shape (7,) instead of (24,)",
        ),
        (lambda weights: weights["norm.0.bias"].fill_(torch.nan), "norm.0.bias"),
        (lambda weights: weights.update({"norm.0.bias": torch.zeros(24, dtype=torch.int)}), "norm.0.bias"),
    ],
    ids=["missing", "extra", "twice", "shape", "nan", "integers"],
)
def test_weights_that_are_not_whole(refuse, tmp_path, change, message):
    folder = save_timm_folder(small_timm(), tmp_path / "timm")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    assert message in refuse(folder)


def test_unknown_shapes_ask_for_a_configuration(refuse, tmp_path):
    save_file(small_timm().state_dict(), tmp_path / "weights.safetensors")
    assert "--config" in refuse(tmp_path / "weights.safetensors")


def test_other_logits_are_not_saved(refuse, tmp_path, monkeypatch):
    read = convert_crossvit_to_hf.read_model_config
    # Another number of heads changes the logits, but not the shapes
    monkeypatch.setattr(
        convert_crossvit_to_hf, "read_model_config", lambda config: {**read(config), "num_heads": (4, 4)}
    )
    assert "logits differ" in refuse(save_timm_folder(small_timm(), tmp_path / "timm"))


def test_sources_that_are_not_there(refuse, tmp_path):
    assert "crossvit_15_dagger" in refuse("crossvit_16")
    (tmp_path / "empty").mkdir()
    assert "model.safetensors" in refuse(tmp_path / "empty")
    assert "nothing" in refuse(tmp_path / "nothing.pth")


def test_publishing_without_access_is_refused_before_the_source_is_read(refuse):
    # Tests run offline
    assert "nothing.pth" not in refuse("nothing.pth", "--push-to-hub", "tester/x")


def test_outputs_are_replaced_only_if_a_conversion_wrote_them(convert, refuse, tmp_path):
    folder, output = save_timm_folder(small_timm(), tmp_path / "timm"), tmp_path / "output"
    convert(folder)
    assert "--overwrite" in refuse(folder)
    convert(folder, "--overwrite")
    (output / "runs").mkdir()
    assert "did not write it: runs" in refuse(folder, "--overwrite")
    (output / "runs").rmdir()
    output.rename(tmp_path / "elsewhere")
    output.symlink_to(tmp_path / "elsewhere")
    assert "did not write it" in refuse(folder, "--overwrite")
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()


@pytest.mark.parametrize("record", [None, "[]", "{", "{}", '{"files": null}'])
def test_folders_without_a_record_are_not_replaced(refuse, tmp_path, record):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "model.safetensors").touch()
    if record is not None:
        (tmp_path / "output" / "conversion.json").write_text(record)
    assert "did not write it: no conversion.json of this command" in refuse("nothing.pth", "--overwrite")


def test_what_appears_during_the_conversion_is_kept(command, tmp_path, monkeypatch):
    folder, output = save_timm_folder(small_timm(), tmp_path / "timm"), tmp_path / "output"
    read_source = convert_crossvit_to_hf.read_source

    def read_while_another_writes(*args):
        output.mkdir()
        (output / "notes.txt").touch()
        return read_source(*args)

    monkeypatch.setattr(convert_crossvit_to_hf, "read_source", read_while_another_writes)
    status, _, errors = command(convert_crossvit_to_hf, folder, output)
    assert status == 1 and "--overwrite" in errors
    assert [path.name for path in output.iterdir()] == ["notes.txt"]
    assert not list(tmp_path.glob(".output.*"))


def test_the_way_back_refuses_what_timm_does_not_have(command, convert, small_config, tmp_path):
    def error(checkpoint):
        status, _, errors = command(convert_hf_to_timm, checkpoint, tmp_path / "back")
        assert status == 1 and errors.count("\n") == 1 and not (tmp_path / "back").exists()
        return errors

    output = convert(save_timm_folder(small_timm(), tmp_path / "timm"))
    processor = CrossViTImageProcessor.from_pretrained(output, do_normalize=False)
    processor.save_pretrained(output)
    assert "preprocessor_config.json" in error(output)
    CrossViTForImageClassification.from_pretrained(output).crossvit.save_pretrained(tmp_path / "base")
    assert "classifier.heads" in error(tmp_path / "base")
    for change in ({"hidden_act": "relu"}, {"layer_norm_eps": 1e-5}, {"depth": ((0, 3, 0),)}):
        config = CrossViTConfig(**{**small_config.to_dict(), **change})
        CrossViTForImageClassification(config).save_pretrained(tmp_path / "model")
        CrossViTImageProcessor().save_pretrained(tmp_path / "model")
        assert str(next(iter(change.values()))).strip("()") in error(tmp_path / "model")
