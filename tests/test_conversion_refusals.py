"""What is no sound checkpoint of the reference is refused in one line, and no pickle is executed."""

import json
import os
import struct
import subprocess
import warnings
import zipfile
from pathlib import Path

import pytest
import timm
import torch
import weight_names
from reference_files import HEADS, assert_equal_logits, renamed, save_timm_folder, small_timm
from safetensors.torch import save_file
from timm_reference import timm_variant
from variants import VARIANTS


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["weights", "args", "whole"])
def test_pickles_are_not_executed(refuse, tmp_path, zipped, place):
    touched = tmp_path / "touched"
    weights = renamed(small_timm(), "ibm")
    checkpoint = {
        "weights": {**weights, "norm.0.weight": Payload(touched)},
        "args": {"model": weights, "args": Payload(touched)},
        "whole": Payload(touched),
    }[place]
    torch.save(checkpoint, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    message = refuse(tmp_path / "model.pth", *HEADS)
    assert "refused" in message and "posix.system" in message and not touched.exists()
    # The payload is a real one
    torch.load(tmp_path / "model.pth", weights_only=False)
    assert touched.exists()


def safetensors_bytes(header: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + data


ENTRY = b'"head.0.bias": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "0 bytes"),
        (b"<!DOCTYPE html><html>Not found</html>", "<!DOCTYPE"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04 and no more", "damaged"),
        (b"\x80\x02 and no more", "damaged"),
        (safetensors_bytes(b"{}", size=10**18), "1000000000000000000"),
        (safetensors_bytes(b"{" + b" " * 100, size=50_000_000), "50000000"),
        (safetensors_bytes(b"{not json}"), "no JSON"),
        (safetensors_bytes(b'{"a": ' + b"[" * 100_000), "no JSON"),
        (safetensors_bytes(b"{" + ENTRY + b", " + ENTRY + b"}", b"0000"), "two tensors or fields named head.0.bias"),
        (safetensors_bytes(b"{" + ENTRY + b"}", b"00"), "damaged"),
    ],
    ids=[
        "empty",
        "html",
        "lfs",
        "zip",
        "pickle",
        "bomb",
        "large header",
        "header",
        "nested",
        "duplicate",
        "truncated",
    ],
)
def test_files_that_are_no_weights(refuse, tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert message in refuse(tmp_path / "model.safetensors")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_truncated_files(refuse, tmp_path, kind, share):
    source = tmp_path / "source"
    if kind == "safetensors":
        save_file(small_timm().state_dict(), source)
    else:
        torch.save(small_timm().state_dict(), source, _use_new_zipfile_serialization=kind == "zip")
    source.write_bytes(source.read_bytes()[: int(source.stat().st_size * share)])
    assert "truncated" in refuse(source, *HEADS)


@pytest.mark.parametrize("change", ["twice", "compressed"])
def test_archives_that_torch_does_not_write(refuse, tmp_path, change):
    torch.save(small_timm().state_dict(), tmp_path / "model.pth")
    with zipfile.ZipFile(tmp_path / "model.pth") as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    kind = zipfile.ZIP_DEFLATED if change == "compressed" else zipfile.ZIP_STORED
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(tmp_path / "model.pth", "w", kind) as archive:
        for name, content in records + records[-1:] * (change == "twice"):
            archive.writestr(name, content)
    assert "archive" in refuse(tmp_path / "model.pth", *HEADS)


def test_damaged_archives(refuse, tmp_path):
    # torch reads them: it does not look at the checksums
    source = tmp_path / "model.pth"
    state_dict = small_timm().state_dict()
    torch.save(state_dict, source)
    content = bytearray(source.read_bytes())
    content[content.index(state_dict["head.1.weight"].numpy().tobytes()) + 5] ^= 1
    source.write_bytes(content)
    torch.load(source, weights_only=True)
    assert "checksum" in refuse(source, *HEADS)


def test_more_weights_than_the_file_holds(refuse, tmp_path):
    tensors = renamed(small_timm(), "ibm")
    tensors["pos_embed.0"] = torch.zeros(()).expand(1, 1 + 10**8, 24)
    torch.save(tensors, tmp_path / "model.pth")
    assert "claims more weights" in refuse(tmp_path / "model.pth", *HEADS)


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    "change, messages",
    [
        (without("blocks.1.blocks.0.1.attn.proj.bias"), ["misses blocks.1.blocks.0.1.attn.proj.bias"]),
        (without("head.0.weight"), ["head.0.weight is missing"]),
        (without("cls_token_0"), ["cls_token_0 is missing"]),
        (lambda t: {**t, "blocks.0.fusion.0.0.norm1.weight": torch.ones(32)}, ["looks most like"]),
        (lambda t: {**t, "blocks.7.norm.weight": torch.ones(24)}, ["has no blocks.7.norm.weight"]),
        (lambda t: {**t, "head.1.weight": torch.ones(6, 32)}, ["head.1.weight", "(6, 32)", "(5, 32)"]),
        (lambda t: {**t, "cls_token_0": torch.ones(24)}, ["cls_token_0 has the shape (24,)"]),
        (lambda t: {**t, "norm.1.weight": torch.full((32,), float("nan"))}, ["norm.1.weight", "NaN"]),
        (lambda t: {**t, "norm.1.weight": torch.full((32,), -float("inf"))}, ["norm.1.weight", "infinite"]),
        (lambda t: {**t, "norm.1.weight": torch.ones(32, dtype=torch.int64)}, ["norm.1.weight", "int64"]),
        (lambda t: {**t, "pos_embed_0": torch.ones(1, 41, 24)}, ["40 patches", "--image-size"]),
        # Indices that must not be counted up to
        (lambda t: {**t, "blocks.0.blocks.0.999999999.norm1.bias": torch.ones(24)}, ["has besides", "999999999"]),
        (lambda t: {**t, f"cls_token_{'9' * 5000}": torch.ones(1, 1, 24)}, ["has besides cls_token_9"]),
    ],
    ids=[
        "layer",
        "head",
        "cls_token",
        "fusion twice",
        "extra",
        "shape",
        "ndim",
        "nan",
        "inf",
        "int",
        "grid",
        "high index",
        "long index",
    ],
)
def test_weights_that_are_not_whole_or_sound(refuse, tmp_path, change, messages):
    save_file(change(small_timm().state_dict()), tmp_path / "model.safetensors")
    found = refuse(tmp_path / "model.safetensors", *HEADS)
    for message in messages:
        assert message in found


def test_what_the_tensors_leave_open_is_asked_for(refuse, tmp_path):
    source = tmp_path / "model.safetensors"
    save_file(small_timm().state_dict(), source)
    assert "--num-heads" in refuse(source) and "looks most like" in refuse(source)
    assert "each of the 2 branches" in refuse(source, "--num-heads", 2)
    assert "multiple of `num_heads`" in refuse(source, "--num-heads", 5, 4)
    assert "makes 4x6" in refuse(source, *HEADS, "--image-size", "24x36", "32")
    assert "patch sizes are 6, 8" in refuse(source, *HEADS, "--patch-size", 12, 16)
    save_file(small_timm(img_size=48, patch_size=(12, 16), img_scale=(1.0, 1.0), multi_conv=True).state_dict(), source)
    assert "--patch-size" in refuse(source, *HEADS)


@pytest.mark.parametrize(
    "checkpoint",
    [
        None,
        [1, 2],
        torch.ones(3),
        {},
        {"model": {}},
        {1: torch.ones(3)},
        {"model": {"cls_token.0": torch.ones(1, 1, 24).to_sparse()}},
        {"model": {"cls_token.0": torch.ones(1, 1, 24, device="meta")}},
    ],
    ids=["None", "list", "tensor", "empty", "empty model", "number", "sparse", "meta"],
)
def test_other_contents(refuse, tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "model.pth")
    refuse(tmp_path / "model.pth")


def test_tensors_that_share_memory(convert, tmp_path):
    reference = small_timm()
    state_dict = renamed(reference, "ibm")
    state_dict["norm.0.bias"] = state_dict["norm.0.weight"]
    state_dict["head.0.bias"] = state_dict["head.0.weight"][:, 0]
    reference.norm[0].bias.data, reference.head[0].bias.data = reference.norm[0].weight, reference.head[0].weight[:, 0]
    torch.save(state_dict, tmp_path / "model.pth")
    assert_equal_logits(convert(tmp_path / "model.pth", *HEADS), reference)


def test_other_models_are_named(refuse, convert, tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224")
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    assert "no CrossViT" in refuse(tmp_path / "vit.safetensors")
    folder = save_timm_folder(vit, tmp_path / "vit")
    assert "vit_tiny_patch16_224" in refuse(folder)
    folder = save_timm_folder(
        timm_variant(VARIANTS["crossvit_9"]), tmp_path / "timm", architecture="crossvit_tiny_240"
    )
    assert "a crossvit_tiny_240 of other weights" in refuse(folder)
    save_file(small_timm().state_dict(), tmp_path / "source.safetensors")
    output = convert(tmp_path / "source.safetensors", *HEADS)
    output.rename(tmp_path / "done")
    assert "checkpoint of Transformers already" in refuse(tmp_path / "done")


def test_places_that_hold_nothing(refuse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "crossvit_15" in refuse("crosvit_15") and "no file" in refuse("crosvit_15")
    assert "missing.pth" in refuse(tmp_path / "missing.pth")
    assert "use https" in refuse("http://127.0.0.1/model.pth")
    (tmp_path / "empty").mkdir()
    assert "has none" in refuse(tmp_path / "empty")
    for name in ("a.pth", "b.pth"):
        torch.save(small_timm().state_dict(), tmp_path / "empty" / name)
    assert "a.pth, b.pth" in refuse(tmp_path / "empty") and "--filename" in refuse(tmp_path / "empty")
    assert "has no c.pth" in refuse(tmp_path / "empty", "--filename", "c.pth")
    assert "--num-heads" in refuse(tmp_path / "empty", "--filename", "b.pth")
    # Options that would be ignored
    assert "--revision" in refuse(tmp_path / "empty" / "b.pth", "--revision", "main")
    assert "--filename" in refuse(tmp_path / "empty" / "b.pth", "--filename", "a.pth")
    assert "--entry" in refuse(tmp_path / "empty" / "b.pth", "--entry", "model")
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refuse(tmp_path / "pipe")


@pytest.mark.parametrize(
    "text, message",
    [
        ("ant\nbee\n", "2 names"),
        ("a\nb\nc\nd\na\n", "several classes: a"),
        ("{", "no JSON"),
        ('{"1": "ant"}', "no list of names"),
    ],
)
def test_labels_that_do_not_fit(refuse, tmp_path, text, message):
    labels = tmp_path / ("labels.json" if "{" in text else "labels.txt")
    labels.write_text(text)
    save_file(small_timm().state_dict(), tmp_path / "source.safetensors")
    assert message in refuse(tmp_path / "source.safetensors", *HEADS, "--labels", labels)
    assert "missing.txt" in refuse(tmp_path / "source.safetensors", *HEADS, "--labels", tmp_path / "missing.txt")


def test_sha256_pins(refuse, convert, tmp_path):
    source = tmp_path / "source.safetensors"
    save_file(small_timm().state_dict(), source)
    digest = subprocess.run(["sha256sum", source], capture_output=True, text=True).stdout.split()[0]
    assert digest in refuse(source, *HEADS, "--sha256", "0" * 64)
    output = convert(source, *HEADS, "--sha256", digest.upper())
    assert json.loads((output / "conversion.json").read_text())["source"]["sha256"] == digest


def test_wrong_logits_are_not_written(refuse, tmp_path, monkeypatch):
    save_file(small_timm().state_dict(), tmp_path / "source.safetensors")
    # A mistake in the table that no shape could tell
    first, second = "blocks.{s}.blocks.{b}.{l}.norm1.{p}", "blocks.{s}.blocks.{b}.{l}.norm2.{p}"
    names = weight_names.WEIGHT_NAMES
    monkeypatch.setitem(names, first, names[second])
    monkeypatch.setitem(names, second, "crossvit.stages.{s}.branches.{b}.layers.{l}.layernorm_before.{p}")
    assert "logits are not the reference's" in refuse(tmp_path / "source.safetensors", *HEADS)


def test_wrong_heads_would_show_in_a_variant(refuse, tmp_path, monkeypatch):
    save_file(timm_variant(VARIANTS["crossvit_9"]).state_dict(), tmp_path / "source.safetensors")
    # timm builds a variant by its name, not from our configuration
    monkeypatch.setitem(VARIANTS["crossvit_9"]["config"], "num_heads", [8, 8])
    assert "logits are not the reference's" in refuse(tmp_path / "source.safetensors")
