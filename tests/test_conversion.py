"""The commands of conversion/: equal logits, the way back bit by bit, and one line for what cannot be converted."""

import argparse
import json
import os
import pickle
import warnings
import zipfile

import convert_crossvit_to_hf
import convert_hf_to_timm
import pytest
import timm
import torch
from reference import VARIANTS, ConversionError, architecture_of
from reference_files import assert_same_weights, ibm_names, lucid_names, save_timm_folder, small_timm
from safetensors.torch import load_file, save_file
from timm_reference import timm_variant

from crossvit import CrossViTConfig, CrossViTForImageClassification, CrossViTImageProcessor
from crossvit.remote_code import CODE_FILES


@pytest.fixture
def config_file(small_config, tmp_path):
    """The configuration of `small_timm`, which no shapes tell: its heads are not in them."""
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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "crossvit_9_dagger" else pytest.mark.slow) for name in VARIANTS]
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
    assert loaded.pretrained_cfg["architecture"] == architecture_of(variant)
    assert_same_weights(loaded.state_dict(), reference.state_dict())
    expected = timm.data.resolve_model_data_config(reference)
    assert {name: tuple(value) if isinstance(value, list) else value for name, value in expected.items()} == {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in timm.data.resolve_model_data_config(loaded).items()
    }


def test_output_has_everything(convert, tmp_path):
    save_file(timm_variant(VARIANTS["crossvit_9"]).state_dict(), tmp_path / "weights.safetensors")
    output = convert(tmp_path / "weights.safetensors")
    record = json.loads((output / "conversion.json").read_text())
    written = ["README.md", "config.json", *CODE_FILES, "model.safetensors", "preprocessor_config.json"]
    assert record["files"] == sorted(written)
    assert {path.name for path in output.iterdir()} == {*written, "conversion.json"}
    assert record["source"]["file"] == "weights.safetensors" and len(record["source"]["sha256"]) == 64
    # Whose weights these are is not known, so no licence and no accuracy are claimed
    card = (output / "README.md").read_text()
    assert "license" not in card and "eval_results" not in card and str(tmp_path) not in card


@pytest.mark.parametrize("names", [dict, ibm_names, lucid_names], ids=["timm", "ibm", "lucid-dl"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_names_and_files(convert, config_file, tmp_path, names, suffix):
    reference = small_timm()
    source = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(names(reference.state_dict()), source)
    assert_equal_logits(convert(source, "--config", config_file), reference)


@pytest.mark.parametrize("zipped", [True, False])
def test_training_checkpoints(convert, refuse, config_file, tmp_path, zipped):
    model, average = small_timm(), small_timm()
    checkpoint = {
        "model": {f"module.{name}": weight for name, weight in ibm_names(model.state_dict()).items()},
        "model_ema": ibm_names(average.state_dict()),
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "epoch": 7,
        "args": argparse.Namespace(lr=0.004, data="imagenet"),
    }
    source = tmp_path / "checkpoint.pth"
    torch.save(checkpoint, source, _use_new_zipfile_serialization=zipped)
    assert "model, model_ema" in refuse(source, "--config", config_file)
    assert "--entry" in refuse(source, "--config", config_file, "--entry", "optimizer")
    output = convert(source, "--config", config_file, "--entry", "model_ema")
    assert_equal_logits(output, average)
    assert json.loads((output / "conversion.json").read_text())["source"]["entry"] == "model_ema"
    # A single state dict leaves no choice
    del checkpoint["model_ema"]
    torch.save(checkpoint, source, _use_new_zipfile_serialization=zipped)
    assert_equal_logits(convert(source, "--config", config_file, "--overwrite"), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_are_kept(convert, convert_back, config_file, tmp_path, dtype):
    tensors = small_timm().to(dtype).state_dict()
    save_file(tensors, tmp_path / "weights.safetensors")
    output = convert(tmp_path / "weights.safetensors", "--config", config_file)
    assert CrossViTForImageClassification.from_pretrained(output, dtype="auto").dtype == dtype
    assert_same_weights(load_file(convert_back(output) / "model.safetensors"), tensors)


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 1},
        {"in_chans": 1},
        {"qkv_bias": False},
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
    assert loaded.pretrained_cfg.get("license") is None  # Nobody knows it
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


def test_fine_tuned_variants_are_recognised(convert, tmp_path):
    reference = timm_variant(VARIANTS["crossvit_tiny"], num_classes=3)
    save_file(reference.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\n")
    output = convert(tmp_path / "weights.safetensors", "--labels", tmp_path / "names.txt")
    assert_equal_logits(output, reference)
    assert CrossViTConfig.from_pretrained(output).id2label == {0: "ant", 1: "bee", 2: "cow"}


@pytest.mark.parametrize(
    "text", ['["ant", "bee", "cow", "dog", "elk"]', '{"4": "elk", "0": "ant", "1": "bee", "2": "cow", "3": "dog"}']
)
def test_labels(convert, refuse, tmp_path, text):
    folder = save_timm_folder(small_timm(), tmp_path / "timm")
    (tmp_path / "names.json").write_text('["ant", "bee", "bee", "dog", "elk"]')
    assert "different name" in refuse(folder, "--labels", tmp_path / "names.json")
    (tmp_path / "names.json").write_text(text)
    output = convert(folder, "--labels", tmp_path / "names.json")
    assert list(CrossViTConfig.from_pretrained(output).id2label.values()) == ["ant", "bee", "cow", "dog", "elk"]


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
    # Other heads have equal weights, so only the logits tell
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
    assert "refused" in message and "posix.system" in message and "weights_only" not in message
    assert not touched.exists()
    torch.load(tmp_path / "model.pth", weights_only=False)  # The payload is a real one
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
    torch.save(ibm_names(timm_variant(VARIANTS["crossvit_9"]).state_dict()), path)
    rewrite_archive(path, lambda name, content: content[:-4] if name.endswith("data/7") else content)
    assert "record size" in refuse(path)


def test_no_record_may_be_short(tmp_path):
    path, archive = tmp_path / "model.pth", tmp_path / "whole.pth"
    weights = small_timm().state_dict()
    torch.save(weights, archive)
    for number in range(len(weights)):
        path.write_bytes(archive.read_bytes())
        short = f"whole/data/{number}"
        rewrite_archive(path, lambda name, content: content[:-4] if name == short else content)
        with pytest.raises(ConversionError, match="record size"):
            convert_crossvit_to_hf.read_tensors(path)
    assert convert_crossvit_to_hf.read_tensors(archive).keys() == weights.keys()


def test_flipped_bits(refuse, tmp_path):
    path, weights = tmp_path / "model.pth", ibm_names(timm_variant(VARIANTS["crossvit_9"]).state_dict())
    torch.save(weights, path)
    content = bytearray(path.read_bytes())
    content[content.index(weights["head.1.weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # torch does not see it
    assert "checksum" in refuse(path)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("end", [100, 10_000, -4])
def test_truncated_files(refuse, tmp_path, kind, end):
    source = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pth")
    if kind == "safetensors":
        save_file(small_timm().state_dict(), source)
    else:
        torch.save(small_timm().state_dict(), source, _use_new_zipfile_serialization=kind == "zip")
    source.write_bytes(source.read_bytes()[:end])
    refuse(source)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", b"PK\x03\x04", b"\x80\x02", pickle.dumps([1])], ids=str)
def test_files_without_weights(refuse, tmp_path, content):
    (tmp_path / "model.pth").write_bytes(content)
    (tmp_path / "model.safetensors").write_bytes(content)
    refuse(tmp_path / "model.pth")
    refuse(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("blocks.1.blocks.0.1.attn.proj.bias"),
            "blocks.1.blocks.0.1.attn.proj.bias is miss",
        ),
        (lambda weights: weights.pop("head.0.bias"), "head.0.bias is missing"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "extra is unknown"),
        (lambda weights: weights.update({"module.norm.0.bias": torch.ones(24)}), "names that mean the same"),
        (
            lambda weights: weights.update({"norm.0.bias": torch.zeros(7)}),
            "norm.0.bias has shape (7,) instead of (24,)",
        ),
        (lambda weights: weights["norm.0.bias"].fill_(torch.nan), "norm.0.bias"),
        (lambda weights: weights["norm.0.bias"].fill_(torch.inf), "norm.0.bias"),
        (lambda weights: weights.update({"norm.0.bias": torch.zeros(24, dtype=torch.int)}), "norm.0.bias"),
    ],
    ids=["missing", "no head", "extra", "twice", "shape", "nan", "inf", "integers"],
)
def test_weights_that_are_not_whole(refuse, tmp_path, change, message):
    folder = save_timm_folder(small_timm(), tmp_path / "timm")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    assert message in refuse(folder)


def test_missing_weights_of_a_variant_are_named(refuse, tmp_path):
    weights = timm_variant(VARIANTS["crossvit_tiny"]).state_dict()
    del weights["head.0.weight"], weights["head.0.bias"]
    save_file(weights, tmp_path / "weights.safetensors")
    message = refuse(tmp_path / "weights.safetensors")
    assert "crossvit_tiny_240" in message and "head.0.weight is missing, head.0.bias is missing" in message


def test_unknown_shapes_ask_for_a_configuration(refuse, tmp_path):
    save_file(small_timm().state_dict(), tmp_path / "weights.safetensors")
    assert "--config" in refuse(tmp_path / "weights.safetensors")


def test_other_logits_are_not_saved(refuse, tmp_path, monkeypatch):
    read = convert_crossvit_to_hf.read_model_config
    # Other heads have equal shapes, so only the logits tell
    monkeypatch.setattr(
        convert_crossvit_to_hf, "read_model_config", lambda config: {**read(config), "num_heads": (4, 4)}
    )
    assert "logits differ" in refuse(save_timm_folder(small_timm(), tmp_path / "timm"))


def test_sources_that_are_not_there(refuse, tmp_path):
    assert "crossvit_15_dagger" in refuse("crossvit_16")
    (tmp_path / "empty").mkdir()
    assert "model.safetensors" in refuse(tmp_path / "empty")
    assert "nothing" in refuse(tmp_path / "nothing.pth")


def test_outputs_are_replaced_only_if_a_conversion_wrote_them(convert, refuse, tmp_path):
    folder, output = save_timm_folder(small_timm(), tmp_path / "timm"), tmp_path / "output"
    convert(folder)
    assert "--overwrite" in refuse(folder)
    convert(folder, "--overwrite")
    for foreign in ("notes.txt", ".git/HEAD", "empty/", "runs/1/notes.txt", "model.safetensors/"):
        path = output / foreign
        if foreign == "model.safetensors/":  # a folder with the name of a file
            path.unlink()
        (path if foreign.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not path.is_dir():
            path.touch()
        assert foreign.split("/")[0] in refuse(folder, "--overwrite")
        assert path.exists()
        path.rmdir() if path.is_dir() else path.unlink()
        for parent in path.relative_to(output).parents[:-1]:
            (output / parent).rmdir()
    output.rename(tmp_path / "elsewhere")
    output.symlink_to(tmp_path / "elsewhere")
    assert "did not write" in refuse(folder, "--overwrite")


@pytest.mark.parametrize("record", [None, "[]", "{", "{}", '{"files": null}'])
def test_folders_without_a_record_are_not_replaced(refuse, tmp_path, record):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "model.safetensors").touch()
    if record is not None:
        (tmp_path / "output" / "conversion.json").write_text(record)
    folder = save_timm_folder(small_timm(), tmp_path / "timm")
    assert "did not write it: no conversion.json of this command" in refuse(folder, "--overwrite")
    assert (tmp_path / "output" / "model.safetensors").is_file()


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_appears_during_the_conversion_is_kept(command, convert, tmp_path, monkeypatch, overwrite):
    folder, output = save_timm_folder(small_timm(), tmp_path / "timm"), tmp_path / "output"
    if overwrite:
        convert(folder)
    read_source = convert_crossvit_to_hf.read_source

    def read_while_another_writes(*args):
        output.mkdir(exist_ok=True)
        (output / "notes.txt").touch()
        return read_source(*args)

    monkeypatch.setattr(convert_crossvit_to_hf, "read_source", read_while_another_writes)
    status, _, errors = command(convert_crossvit_to_hf, folder, output, *["--overwrite"] * overwrite)
    assert status == 1 and str(output) in errors and (output / "notes.txt").is_file()
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
