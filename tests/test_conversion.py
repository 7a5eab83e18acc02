"""The reference's checkpoints come over with equal logits and go back bit by bit."""

import argparse
import json
import os

import convert_crossvit_to_hf
import convert_hf_to_timm
import numpy as np
import PIL.Image
import pytest
import timm
import torch
import verify
import weight_names
from reference_files import HEADS, assert_equal_logits, assert_same_bytes, renamed, save_timm_folder, small_timm
from safetensors.torch import load_file, save_file
from timm_reference import timm_variant
from variants import VARIANTS, timm_name

from crossvit import CrossViTForImageClassification, CrossViTImageProcessor, CrossViTImageProcessorPil


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS])
def test_variants_come_over_and_back_bit_by_bit(convert, command, tmp_path, name):
    variant, reference = VARIANTS[name], timm_variant(VARIANTS[name])
    save_file(reference.state_dict(), tmp_path / "source.safetensors")
    output = convert(tmp_path / "source.safetensors")
    assert_equal_logits(output, reference)

    record = json.loads((output / "conversion.json").read_text())
    assert record["variant"] == name
    assert (record["tensors"], record["parameters"]) == (variant["tensors"], variant["parameters"])
    assert record["largest_logit_difference"]["float32"] < 1e-5
    assert record["largest_logit_difference"]["float64"] < 1e-12
    processor = CrossViTImageProcessorPil.from_pretrained(output)
    size = variant["preprocessing"]
    assert processor.size.shortest_edge == size["resize_shortest_edge"]
    assert processor.crop_size.height == processor.crop_size.width == size["center_crop"]

    assert command(convert_hf_to_timm, output, tmp_path / "timm")[0] == 0
    assert_same_bytes(load_file(tmp_path / "timm" / "model.safetensors"), reference.state_dict())
    loaded = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert loaded.pretrained_cfg["architecture"] == timm_name(variant)
    assert_same_bytes(loaded.state_dict(), reference.state_dict())
    expected = timm.data.resolve_model_data_config(reference)
    for name, value in timm.data.resolve_model_data_config(loaded).items():
        assert value == expected[name] or tuple(value) == expected[name], name


def test_output_is_whole(convert, command, tmp_path):
    reference = timm_variant(VARIANTS["crossvit_9"])
    torch.save(renamed(reference, "ibm"), tmp_path / "crossvit_9_224.pth")
    output = convert(tmp_path / "crossvit_9_224.pth")
    assert {path.name for path in output.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
        "conversion.json",
        "configuration_crossvit.py",
        "modeling_crossvit.py",
        "image_processing_crossvit.py",
        "image_processing_pil_crossvit.py",
        "timm_checkpoints.py",
    }
    # As readable as the files that others make
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in output.iterdir()} == {0o666 & ~umask}

    model = CrossViTForImageClassification.from_pretrained(output)
    # The same as the library writes
    model.save_pretrained(tmp_path / "again")
    CrossViTImageProcessor.from_pretrained(output).save_pretrained(tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (output / path.name).read_bytes(), path.name
    assert (
        model.config.id2label[0] == "tench, Tinca tinca" and model.config.label2id["goldfish, Carassius auratus"] == 1
    )
    assert (model.config.id2label[134], model.config.id2label[517]) == ("crane", "crane2")
    assert len(model.config.label2id) == 1000
    record = json.loads((output / "conversion.json").read_text())
    assert record["source"]["format"] == "ibm" and record["source"]["file"] == "crossvit_9_224.pth"
    assert str(tmp_path) not in "".join(path.read_text() for path in output.glob("*.[jm][sd]*"))
    for name, version in (("timm", timm.__version__), ("torch", torch.__version__)):
        assert record["versions"][name] == version

    status, _, errors = command(convert_hf_to_timm, output, tmp_path / "ibm", "--format", "ibm")
    assert status == 0, errors
    assert_same_bytes(torch.load(tmp_path / "ibm" / "model.pth", weights_only=True), renamed(reference, "ibm"))


@pytest.mark.parametrize("format_name", weight_names.FORMATS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_formats_are_told_by_names_and_files_by_content(convert, tmp_path, format_name, suffix):
    reference = small_timm()
    tensors = renamed(reference, format_name)
    source = tmp_path / "weights"  # without a suffix that could tell
    save_file(tensors, source) if suffix == ".safetensors" else torch.save(tensors, source)
    output = convert(source, *HEADS)
    assert_equal_logits(output, reference)
    assert json.loads((output / "conversion.json").read_text())["source"]["format"] == format_name


@pytest.mark.parametrize("zipped", [True, False])
def test_training_checkpoints(convert, refuse, tmp_path, zipped):
    model, average = small_timm(), small_timm()
    average.load_state_dict({name: weight * 0.5 for name, weight in model.state_dict().items()})
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint = {
        "model": {f"module.{name}": weight for name, weight in renamed(model, "ibm").items()},
        "model_ema": renamed(average, "ibm"),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [0.1], "metric": None},
        "scaler": {"scale": 65536.0},
        "epoch": 7,
        "max_accuracy": 81.5,
        "args": argparse.Namespace(lr=0.004, data="imagenet"),
    }
    torch.save(checkpoint, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    message = refuse(tmp_path / "checkpoint.pth", *HEADS)
    assert "model, model_ema" in message and "--entry" in message
    assert "optimizer" in refuse(tmp_path / "checkpoint.pth", *HEADS, "--entry", "optimizer")

    output = convert(tmp_path / "checkpoint.pth", *HEADS, "--entry", "model_ema")
    assert_equal_logits(output, average)
    assert json.loads((output / "conversion.json").read_text())["source"]["entry"] == "model_ema"
    output = convert(tmp_path / "checkpoint.pth", *HEADS, "--entry", "model", "--overwrite")
    assert_equal_logits(output, model)

    # One set of weights leaves no choice
    del checkpoint["model_ema"]
    torch.save(checkpoint, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    assert_equal_logits(convert(tmp_path / "checkpoint.pth", *HEADS, "--overwrite"), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_kept(convert, command, tmp_path, dtype):
    reference = small_timm().to(dtype)
    save_file(reference.state_dict(), tmp_path / "source.safetensors")
    output = convert(tmp_path / "source.safetensors", *HEADS)
    assert CrossViTForImageClassification.from_pretrained(output).dtype == dtype
    assert command(convert_hf_to_timm, output, tmp_path / "timm")[0] == 0
    assert_same_bytes(load_file(tmp_path / "timm" / "model.safetensors"), reference.state_dict())
    assert_equal_logits(output, reference)


def test_mixed_types_are_widened(convert, tmp_path):
    reference = small_timm().half().float()
    tensors = {name: w.half() if w.ndim == 2 else w for name, w in reference.state_dict().items()}
    save_file(tensors, tmp_path / "source.safetensors")
    output = convert(tmp_path / "source.safetensors", *HEADS)
    assert_equal_logits(output, reference)
    assert {weight.dtype for weight in load_file(output / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    "options, arguments",
    [
        ({"num_classes": 1}, ()),
        ({"in_chans": 1}, ()),
        ({"qkv_bias": False}, ()),
        ({"depth": ((1, 1, 1), (2, 1, 0), (1, 3, 3))}, ()),
        ({"depth": ((1, 1, 0),), "mlp_ratio": (2.1, 3.33)}, ()),
        (
            {"img_size": (36, 18), "img_scale": (1.0, 32 / 36), "patch_size": (6, 4)},
            ("--image-size", "36x18", "32x16"),
        ),
        (
            {"img_size": 48, "img_scale": (1.0, 1.0), "patch_size": (12, 16), "multi_conv": True},
            ("--patch-size", 12, 16),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_shapes_of_its_own(convert, command, tmp_path, options, arguments):
    reference = small_timm(**options)
    save_file(reference.state_dict(), tmp_path / "source.safetensors")
    output = convert(tmp_path / "source.safetensors", *HEADS, *arguments)
    assert_equal_logits(output, reference)
    assert "UNPROVEN" not in (output / "README.md").read_text()

    status, _, errors = command(convert_hf_to_timm, output, tmp_path / "timm")
    assert status == 0, errors
    loaded = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert_same_bytes(loaded.state_dict(), reference.state_dict())
    pixel_values = torch.randn(1, reference.in_chans, 40, 40)
    assert torch.equal(loaded.eval()(pixel_values), reference(pixel_values))
    # and a folder of timm's says what the shapes do not
    again = tmp_path / "again"
    status, _, errors = command(convert_crossvit_to_hf, tmp_path / "timm", again, *arguments)
    assert status == 0, errors
    assert_same_bytes(load_file(again / "model.safetensors"), load_file(output / "model.safetensors"))
    assert (again / "config.json").read_text() == (output / "config.json").read_text()


def test_three_branches_are_converted_and_said_to_be_unproven(command, tmp_path):
    # timm's model holds the weights of three branches, it cannot run them
    reference = small_timm(
        img_scale=(1.0, 32 / 36, 0.5),
        patch_size=(6, 8, 9),
        embed_dim=(24, 32, 40),
        depth=((1, 2, 1, 0), (1, 1, 1, 2)),
        num_heads=(2, 4, 5),
        mlp_ratio=(2.0, 3.0, 1.0),
    )
    torch.save(renamed(reference, "ibm"), tmp_path / "three.pth")
    output = tmp_path / "output"
    status, printed, errors = command(convert_crossvit_to_hf, tmp_path / "three.pth", output, "--num-heads", 2, 4, 5)
    assert status == 0 and "UNPROVEN" in printed, errors
    assert "Not proven" in (output / "README.md").read_text()
    assert json.loads((output / "conversion.json").read_text())["largest_logit_difference"] is None
    model = CrossViTForImageClassification.from_pretrained(output)
    assert model.config.image_sizes == ((36, 36), (32, 32), (18, 18)) and model.config.depth[1] == (1, 1, 1, 2)

    status, printed, errors = command(verify, output, "--against", tmp_path / "three.pth", "--num-heads", 2, 4, 5)
    assert status == 0 and "UNPROVEN" in printed
    assert "cannot build" in command(convert_hf_to_timm, output, tmp_path / "timm")[2]
    status, printed, errors = command(convert_hf_to_timm, output, tmp_path / "ibm", "--format", "ibm")
    assert status == 0 and "UNPROVEN" in printed
    assert_same_bytes(torch.load(tmp_path / "ibm" / "model.pth", weights_only=True), renamed(reference, "ibm"))


def test_fine_tuned_variants_need_no_heads(convert, tmp_path):
    reference = timm_variant(VARIANTS["crossvit_tiny"], num_classes=7, img_size=120)
    save_file(reference.state_dict(), tmp_path / "source.safetensors")
    output = convert(tmp_path / "source.safetensors")
    assert_equal_logits(output, reference)
    config = CrossViTForImageClassification.from_pretrained(output).config
    assert config.image_sizes == ((120, 120), (112, 112)) and config.num_heads == (3, 3) and config.num_labels == 7
    processor = CrossViTImageProcessor.from_pretrained(output)
    assert (processor.size.shortest_edge, processor.crop_size.height) == (137, 120)  # 120 / 0.875


def test_preprocessing_of_a_timm_folder(convert, tmp_path):
    reference = small_timm()
    preprocessing = {
        "input_size": [3, 36, 36],
        "mean": [0.5, 0.4, 0.3],
        "std": [0.1, 0.2, 0.3],
        "crop_pct": 0.9,
        "interpolation": "bilinear",
    }
    names = ["ant", "bee", "cow", "dog", "elk"]
    folder = save_timm_folder(reference, tmp_path / "timm", pretrained_cfg=preprocessing, label_names=names)
    output = convert(folder)
    assert_equal_logits(output, reference)
    assert list(CrossViTForImageClassification.from_pretrained(output).config.id2label.values()) == names
    transform = timm.data.create_transform(**{**preprocessing, "input_size": (3, 36, 36)})
    pixels = np.random.default_rng(0).integers(0, 256, (61, 90, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(pixels)
    processed = CrossViTImageProcessorPil.from_pretrained(output)(image, return_tensors="pt").pixel_values[0]
    assert torch.equal(processed, transform(image))


@pytest.mark.parametrize("option", [{"global_pool": "avg"}, {"crop_scale": True}], ids=str)
def test_options_of_timm_that_ours_does_not_have(refuse, tmp_path, option):
    # The weights are those of a CrossViT like any other; only config.json tells that timm runs them otherwise
    folder = save_timm_folder(small_timm(**option), tmp_path / "timm")
    assert next(iter(option)) in refuse(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [0.5, 0.5]},
        {"mean": "abc"},
        {"std": [1, 0, 1]},
        {"std": [1, None, 1]},
        {"crop_pct": 0},
        {"crop_pct": "0.9"},
        {"crop_mode": "border"},
        {"interpolation": "random"},
        {"interpolation": 3},
        {"input_size": None, "unknown": 1},
    ],
    ids=str,
)
def test_preprocessing_that_makes_no_sense(refuse, tmp_path, change):
    folder = save_timm_folder(small_timm(), tmp_path / "timm", pretrained_cfg=change)
    assert "config.json" in refuse(folder)


@pytest.mark.parametrize("change", [{"pretrained_cfg": None}, {"model_args": [1]}, {"label_names": "abcde"}], ids=str)
def test_config_of_timm_of_other_types(refuse, tmp_path, change):
    assert next(iter(change)) in refuse(save_timm_folder(small_timm(), tmp_path / "timm", **change))


@pytest.mark.parametrize("text", ["ant\nbee\ncow\n\ndog\nelk\n", '["ant", "bee", "cow", "dog", "elk"]', "object"])
def test_labels_from_a_file(convert, tmp_path, text):
    names = ["ant", "bee", "cow", "dog", "elk"]
    if text == "object":
        text = json.dumps({str(index): names[index] for index in (3, 1, 0, 4, 2)})
    labels = tmp_path / ("labels.txt" if text.startswith("ant") else "labels.json")
    labels.write_text(text)
    save_file(small_timm().state_dict(), tmp_path / "source.safetensors")
    output = convert(tmp_path / "source.safetensors", *HEADS, "--labels", labels)
    config = CrossViTForImageClassification.from_pretrained(output).config
    assert config.id2label == dict(enumerate(names))
    assert config.label2id == {name: index for index, name in enumerate(names)}


def test_verify_repeats_the_proof(convert, command, tmp_path):
    reference = small_timm()
    save_file(reference.state_dict(), tmp_path / "source.safetensors")
    output = convert(tmp_path / "source.safetensors", *HEADS)
    arguments = (output, "--against", tmp_path / "source.safetensors", *HEADS)
    status, printed, errors = command(verify, *arguments)
    assert status == 0 and "bit by bit" in printed and "float64" in printed, errors

    weights = load_file(output / "model.safetensors")
    changed = weights["crossvit.stages.1.branches.0.layers.1.mlp.fc2.bias"]
    changed[3] = torch.nextafter(changed[3], torch.tensor(9.0))
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    status, printed, errors = command(verify, *arguments)
    assert status == 1 and "1 of 172 tensors differ: blocks.1.blocks.0.1.mlp.fc2.bias" in errors

    status, printed, errors = command(verify, *arguments[:3], "--num-heads", 4, 2)
    assert status == 1 and "num_heads" in errors
    assert "no config.json" in command(verify, tmp_path / "missing", *arguments[1:])[2]
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    assert "'vit'" in command(verify, *arguments)[2]


def test_what_is_not_compared_bit_by_bit_shows(convert, command, tmp_path):
    reference = small_timm()
    reference.norm[0].bias.data[0] = 0.0
    save_file(reference.state_dict(), tmp_path / "source.safetensors")
    output = convert(tmp_path / "source.safetensors", *HEADS)
    weights = load_file(output / "model.safetensors")
    for change in (lambda w: torch.where(w == 0, -0.0, w), lambda w: w.double()):
        changed = {**weights, "crossvit.layernorms.0.bias": change(weights["crossvit.layernorms.0.bias"])}
        save_file(changed, output / "model.safetensors", metadata={"format": "pt"})
        assert command(verify, output, "--against", tmp_path / "source.safetensors", *HEADS)[0] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"crop_size": {"height": 32, "width": 32}},
        {"size": {"height": 60, "width": 60}},
        {"image_mean": [0.5]},
        {"size": "abc"},
    ],
    ids=str,
)
def test_image_processors_that_timm_does_not_have(convert, command, tmp_path, change):
    save_file(small_timm().state_dict(), tmp_path / "source.safetensors")
    output = convert(tmp_path / "source.safetensors", *HEADS)
    config = json.loads((output / "preprocessor_config.json").read_text())
    (output / "preprocessor_config.json").write_text(json.dumps({**config, **change}))
    status, _, errors = command(convert_hf_to_timm, output, tmp_path / "timm")
    assert status == 1 and "preprocessor_config.json" in errors and not (tmp_path / "timm").exists()


def test_the_way_back_keeps_types_and_refuses_nan(convert, command, tmp_path):
    reference = small_timm()
    save_file(reference.state_dict(), tmp_path / "source.safetensors")
    output = convert(tmp_path / "source.safetensors", *HEADS)
    # The weights count, not what config.json says of their type
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    assert command(convert_hf_to_timm, output, tmp_path / "timm")[0] == 0
    assert_same_bytes(load_file(tmp_path / "timm" / "model.safetensors"), reference.state_dict())
    weights = load_file(output / "model.safetensors")
    weights["classifier.heads.1.bias"][2] = float("nan")
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    status, _, errors = command(convert_hf_to_timm, output, tmp_path / "ibm", "--format", "ibm")
    assert status == 1 and "NaN" in errors and not (tmp_path / "ibm").exists()


@pytest.mark.parametrize("change", [{"hidden_act": "relu"}, {"layer_norm_eps": 1e-5}, {"depth": [[0, 3, 0]]}])
def test_what_the_reference_cannot_express(convert, command, tmp_path, change):
    save_file(small_timm(depth=((3, 3, 0),)).state_dict(), tmp_path / "source.safetensors")
    output = convert(tmp_path / "source.safetensors", *HEADS)
    if "depth" in change:
        model = CrossViTForImageClassification.from_pretrained(output, **change)
        model.save_pretrained(output)
    else:
        config = json.loads((output / "config.json").read_text())
        (output / "config.json").write_text(json.dumps({**config, **change}))
    status, _, errors = command(convert_hf_to_timm, output, tmp_path / "timm")
    assert status == 1 and "reference" in errors.splitlines()[-1] and not (tmp_path / "timm").exists()


def test_checkpoints_that_do_not_fit_their_config(convert, command, tmp_path):
    save_file(small_timm().state_dict(), tmp_path / "source.safetensors")
    output = convert(tmp_path / "source.safetensors", *HEADS)
    weights = load_file(output / "model.safetensors")
    del weights["classifier.heads.0.bias"]
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    status, _, errors = command(convert_hf_to_timm, output, tmp_path / "timm")
    assert status == 1 and "classifier.heads.0.bias" in errors and not (tmp_path / "timm").exists()
