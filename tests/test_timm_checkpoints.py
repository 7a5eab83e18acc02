"""Repositories and folders of timm, and state dicts of the authors, are read by `from_pretrained` as they are."""

import itertools
import json
import logging
import re

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from reference import VARIANTS, to_transformers_name
from reference_files import (
    SMALL,
    assert_same_weights,
    ibm_names,
    lucid_names,
    published_config,
    save_timm_folder,
    small_timm,
)
from safetensors.torch import load_file
from timm_reference import timm_variant
from transformers import AutoConfig, AutoModelForImageClassification

from crossvit import (
    CrossViTBackbone,
    CrossViTConfig,
    CrossViTForImageClassification,
    CrossViTImageProcessor,
    CrossViTImageProcessorPil,
    CrossViTModel,
)
from crossvit.timm_checkpoints import ARCHITECTURES, KEY_MAPPING


def write_config(folder, config: dict):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def image() -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 90, 3), dtype=np.uint8))


@pytest.fixture
def timm_folder(tmp_path):
    """A small model in a folder of timm's, with preprocessing that is not the default."""
    preprocessing = {"crop_pct": 0.9, "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}
    return save_timm_folder(small_timm(), tmp_path / "timm", pretrained_cfg=preprocessing)


def source_weights(timm_folder) -> dict[str, torch.Tensor]:
    """The weights of a folder of timm's under our names."""
    return {
        to_transformers_name(name): weight for name, weight in load_file(timm_folder / "model.safetensors").items()
    }


@torch.no_grad()
def assert_equal_logits(model, reference):
    pixel_values = torch.randn(2, model.config.num_channels, 40, 50)
    # The bound of test_parity_timm.py, which says why; up to 2e-6 here
    torch.testing.assert_close(model.eval()(pixel_values).logits, reference(pixel_values), atol=1e-5, rtol=0)


def test_published_configurations(variant, tmp_path):
    present = published_config(variant["architecture"])
    old = {**present["pretrained_cfg"], "architecture": present["architecture"], "num_classes": 1000}
    architecture, preprocessing = ARCHITECTURES[variant["architecture"]], variant["preprocessing"]
    expected = CrossViTConfig(**architecture)
    for timm_config in (present, old):
        folder = write_config(tmp_path / "timm", timm_config)
        config = CrossViTConfig.from_pretrained(folder)
        for name in ("image_sizes", "num_channels", *architecture.keys() - {"image_size"}):
            assert getattr(config, name) == getattr(expected, name), name

        processor = CrossViTImageProcessor.from_pretrained(folder)
        assert processor.size.shortest_edge == preprocessing["resize_shortest_edge"]
        assert processor.crop_size.height == processor.crop_size.width == preprocessing["center_crop"]
        assert processor.resample.name.lower() == preprocessing["interpolation"]
        assert [*processor.image_mean, *processor.image_std] == preprocessing["mean"] + preprocessing["std"]


def test_published_checkpoints_have_the_classes_of_imagenet(tmp_path):
    config = CrossViTConfig.from_pretrained(write_config(tmp_path / "timm", published_config("crossvit_tiny_240")))
    names = timm.data.ImageNetInfo("imagenet-1k")
    assert [config.id2label[index] for index in (0, 638, 639, 999)] == [
        names.index_to_description(index) for index in (0, 638, 639, 999)
    ]
    assert len(config.label2id) == len(config.id2label) == 1000


def test_architectures_are_those_of_timm():
    assert set(ARCHITECTURES) == set(timm.list_models("crossvit_*"))
    assert set(ARCHITECTURES) == {variant["architecture"] for variant in VARIANTS.values()}


def test_published_weights(tmp_path, image):
    # The other variants differ only in numbers of layers and widths: test_parity_timm.py has all of them
    reference = timm_variant(VARIANTS["crossvit_9_dagger"])
    folder = save_timm_folder(reference, tmp_path / "timm")
    model = CrossViTForImageClassification.from_pretrained(folder)
    assert_equal_logits(model, reference)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(reference))
    processor = CrossViTImageProcessorPil.from_pretrained(folder)
    assert torch.equal(processor(image, return_tensors="pt").pixel_values[0], transform(image))


def test_every_class_loads_without_missing_weights(timm_folder):
    weights = source_weights(timm_folder)
    for model_class in (CrossViTForImageClassification, CrossViTModel, CrossViTBackbone):
        options = {"out_features": ["stage1_0", "stage2_1"]} if model_class is CrossViTBackbone else {}
        model, info = model_class.from_pretrained(timm_folder, output_loading_info=True, **options)
        assert not info["missing_keys"] and not info["mismatched_keys"]
        heads = {name for name in weights if name.startswith("classifier.")}
        assert info["unexpected_keys"] == (set() if model_class is CrossViTForImageClassification else heads)
        prefix = "crossvit." if model_class is CrossViTModel else ""
        assert_same_weights(
            {prefix + name: tensor for name, tensor in model.state_dict().items()},
            {name: weights[name] for name in weights if name not in info["unexpected_keys"]},
        )
    assert [feature_map.shape[1] for feature_map in model(torch.randn(1, 3, 36, 36)).feature_maps] == [24, 32]


@pytest.mark.parametrize("names", [dict, ibm_names, lucid_names], ids=["timm", "ibm", "lucid-dl"])
@pytest.mark.parametrize("layers", [(0, 3), (1, 1)], ids=str)
def test_state_dicts_under_all_names(small_config, names, layers):
    depth = tuple((1, 2, number) for number in layers)
    reference = small_timm(depth=depth)
    small_config.depth = depth
    model, info = CrossViTForImageClassification.from_pretrained(
        None, config=small_config, state_dict=names(reference.state_dict()), output_loading_info=True
    )
    assert not any(info.values())
    assert_equal_logits(model, reference)


def test_key_mapping_needs_every_pattern_and_leaves_our_names_alone():
    used = set()
    dagger = {"patch_size": (12, 16), "img_size": 48, "img_scale": (1.0, 1.0), "multi_conv": True}
    for options, layers in itertools.product(({}, dagger), (0, 2)):
        for name in small_timm(depth=((1, 2, layers),), **options).state_dict():
            ours = to_transformers_name(name)
            for pattern, replacement in KEY_MAPPING.items():
                assert not re.search(pattern, ours) and not re.search(pattern, ours.removeprefix("crossvit."))
                used |= {pattern} if re.search(pattern, name) else set()
                name = re.sub(pattern, replacement, name)
    assert used == set(KEY_MAPPING)


def test_pytorch_bin(tmp_path):
    reference = small_timm()
    timm.models.save_for_hf(reference, tmp_path, safe_serialization=False)
    assert not (tmp_path / "model.safetensors").exists()
    assert_equal_logits(CrossViTForImageClassification.from_pretrained(tmp_path), reference)


def test_heads_for_other_classes_in_another_type(timm_folder):
    model = CrossViTForImageClassification.from_pretrained(
        timm_folder, num_labels=7, ignore_mismatched_sizes=True, dtype=torch.bfloat16
    )
    assert model.classifier.heads[1].out_features == len(model.config.id2label) == 7
    assert model.dtype == torch.bfloat16
    # Only the heads are new
    for name, weight in source_weights(timm_folder).items():
        if not name.startswith("classifier."):
            assert torch.equal(model.state_dict()[name], weight.bfloat16()), name


def test_auto_classes_keep_the_timm_wrapper_unless_given_our_configuration(timm_folder):
    assert AutoConfig.from_pretrained(timm_folder).model_type == "timm_wrapper"
    config = CrossViTConfig.from_pretrained(timm_folder)
    model = AutoModelForImageClassification.from_pretrained(timm_folder, config=config)
    assert type(model) is CrossViTForImageClassification


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 1},
        {"num_classes": 0},
        {"in_chans": 1},
        {"in_chans": 4},
        {"qkv_bias": False},
        {"drop_path_rate": 0.1, "attn_drop_rate": 0.2, "proj_drop_rate": 0.3},
        {"depth": ((1, 1, 1), (2, 2, 0), (1, 3, 3))},
        {"img_size": (36, 18), "patch_size": (6, 4)},
        {"img_size": 48, "img_scale": (1.0, 1.0), "patch_size": (12, 16), "multi_conv": True},
    ],
    ids=str,
)
def test_model_args(tmp_path, options):
    reference = small_timm(**options)
    arguments = {name: value for name, value in options.items() if name.endswith("_rate")}
    folder = save_timm_folder(reference, tmp_path / "timm", model_args=arguments)
    model = CrossViTForImageClassification.from_pretrained(folder)
    assert_equal_logits(model, reference)
    assert model.config.drop_path_rate == arguments.get("drop_path_rate", 0.0)
    assert model.config.attention_probs_dropout_prob == arguments.get("attn_drop_rate", 0.0)


@pytest.mark.parametrize("labels", [["a", "b", "c", "d", "e"], {"0": "a", "3": "d"}], ids=["list", "dict"])
def test_names_of_classes(tmp_path, labels):
    folder = save_timm_folder(small_timm(), tmp_path / "timm", label_names=labels)
    config = CrossViTConfig.from_pretrained(folder)
    expected = dict(enumerate("abcde")) if isinstance(labels, list) else {
        0: "a", 1: "LABEL_1", 2: "LABEL_2", 3: "d", 4: "LABEL_4"
    }  # fmt: skip
    assert config.id2label == expected and config.label2id == {name: index for index, name in expected.items()}


def test_descriptions_of_classes(tmp_path):
    names = {"label_names": ["n1", "n2", "n3", "n4", "n5"], "label_descriptions": {"n1": "ant", "n5": "elk"}}
    folder = save_timm_folder(small_timm(), tmp_path / "timm", **names)
    config = CrossViTConfig.from_pretrained(folder)
    assert list(config.id2label.values()) == ["ant", "n2", "n3", "n4", "elk"] and config.label2id["elk"] == 4
    # timm has them from the same file
    pretrained_cfg = timm.create_model(f"local-dir:{folder}").pretrained_cfg
    assert pretrained_cfg["label_descriptions"] == names["label_descriptions"]


@pytest.mark.parametrize(
    ("options", "preprocessing"),
    [
        ({}, {"crop_pct": 0.9, "interpolation": "bilinear", "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}),
        ({}, {"crop_pct": 0.9, "crop_mode": "squash"}),
        ({}, {"crop_pct": 1.0, "crop_mode": "squash"}),
        ({}, {"crop_pct": None, "interpolation": None, "mean": None, "std": None}),
        ({}, {"test_input_size": [3, 54, 54], "test_crop_pct": 1.0}),  # which timm uses on request only
        ({"in_chans": 1}, {"mean": [0.4], "std": [0.1]}),
        ({"img_size": 54}, {}),
        ({"img_size": (54, 54)}, {"input_size": [3, 36, 36]}),
        ({"img_size": (36, 54)}, {"crop_mode": "squash"}),
        ({"img_scale": (1.0, 40 / 36)}, {"crop_pct": 0.8}),
        ({"num_classes": 3, "drop_rate": 0.5}, {}),
    ],
    ids=str,
)
def test_config_json_means_what_it_means_to_timm(tmp_path, image, options, preprocessing):
    """Logits and pixels are those of what timm builds from the same folder."""
    model = small_timm(**options)
    folder = save_timm_folder(model, tmp_path / "timm", pretrained_cfg=preprocessing, model_args={**SMALL, **options})
    reference = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    data_config = timm.data.resolve_model_data_config(reference)
    # As timm's validation script opens images
    pixels = image if data_config["input_size"][0] == 3 else image.convert("L")
    expected = timm.data.create_transform(**data_config)(pixels)[None]
    values = CrossViTImageProcessorPil.from_pretrained(folder)(image, return_tensors="pt").pixel_values
    assert torch.equal(values, expected)
    ours = CrossViTForImageClassification.from_pretrained(folder)
    assert ours.num_labels == reference.num_classes
    with torch.no_grad():
        # The bound of test_parity_timm.py, which says why
        torch.testing.assert_close(ours(values).logits, reference(expected), atol=1e-5, rtol=0)


def test_one_channel_with_the_statistics_of_three(tmp_path, image):
    """timm averages them when it adapts a configuration, but cannot use such a folder by itself."""
    model = small_timm(in_chans=1)
    folder = save_timm_folder(model, tmp_path / "timm", pretrained_cfg={"mean": [0.5, 0.4, 0.3], "std": [0.1] * 3})
    transform = timm.data.create_transform((1, 36, 36), mean=[0.4], std=[0.1], crop_pct=0.875, interpolation="bicubic")
    for processor in (
        CrossViTImageProcessorPil.from_pretrained(folder),
        CrossViTImageProcessor.from_pretrained(folder),
    ):
        processor.save_pretrained(tmp_path / "ours")
        loaded = type(processor).from_pretrained(tmp_path / "ours")
        for pixels in (image, image.convert("L"), image.convert("RGBA")):
            values = loaded(pixels, return_tensors="pt").pixel_values
            # The filter of torchvision differs by 2 of 255 at most
            torch.testing.assert_close(
                values[0], transform(image.convert("L")), atol=0 if loaded.backend == "pil" else 0.08, rtol=0
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "vit_base_patch16_224"}, "vit_base_patch16_224"),
        ({"architecture": "crossvit_tiny_dagger_240"}, "crossvit_tiny_dagger_240"),
        ({"global_pool": "avg"}, "global_pool='avg'"),
        ({"model_args": {"global_pool": "avg"}}, "global_pool='avg'"),
        ({"model_args": {"crop_scale": True}}, "crop_scale=True"),
        ({"model_args": {"norm_layer": "rmsnorm"}}, "norm_layer"),
        ({"label_names": ["a", "b"]}, "2 label_names for 5 classes"),
        ({"label_descriptions": {"a": "ant"}}, "label_descriptions but no label_names"),
        ({"model_args": {"img_size": 44}}, "images of 44x44, of which a branch makes 44x44"),
    ],
    ids=str,
)
def test_models_without_a_counterpart_are_refused_by_name(timm_folder, changes, message):
    config = json.loads((timm_folder / "config.json").read_text())
    if "global_pool" in changes:
        del config["model_args"]["global_pool"]  # It would count
    model_args = {**config["model_args"], **changes.get("model_args", {})}
    write_config(timm_folder, {**config, **changes, "model_args": model_args})
    (timm_folder / "model.safetensors").unlink()  # It is refused before its weights are downloaded
    for cls in (CrossViTConfig, CrossViTForImageClassification):
        with pytest.raises(ValueError, match=message):
            cls.from_pretrained(timm_folder)


@pytest.mark.parametrize(
    ("options", "preprocessing", "message"),
    [
        ({}, {"crop_mode": "border"}, "crop_mode='border'"),
        ({}, {"interpolation": "random"}, "interpolation='random'"),
        ({"img_size": (36, 18), "patch_size": (6, 4)}, {"crop_mode": "center"}, "crop_mode='center'.*36x18"),
    ],
    ids=str,
)
def test_transforms_without_a_counterpart_are_refused_by_name(tmp_path, options, preprocessing, message):
    folder = save_timm_folder(small_timm(**options), tmp_path / "timm", pretrained_cfg=preprocessing)
    with pytest.raises(ValueError, match=message):
        CrossViTImageProcessor.from_pretrained(folder)


def test_model_without_an_image_processor_does_not_get_one(tmp_path, small_config):
    small_config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="image processor"):
        CrossViTImageProcessor.from_pretrained(tmp_path)


def test_save_load_keeps_weights_and_writes_our_names(timm_folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # for caplog
    model = CrossViTForImageClassification.from_pretrained(timm_folder)
    model.save_pretrained(tmp_path / "ours")
    CrossViTImageProcessor.from_pretrained(timm_folder).save_pretrained(tmp_path / "ours")
    assert_same_weights(load_file(tmp_path / "ours" / "model.safetensors"), source_weights(timm_folder))
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "crossvit"

    with caplog.at_level(logging.WARNING):
        reloaded, info = CrossViTForImageClassification.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not caplog.records and not any(info.values())
    assert_same_weights(reloaded.state_dict(), model.state_dict())
    processor, expected = map(CrossViTImageProcessor.from_pretrained, (tmp_path / "ours", timm_folder))
    assert processor.to_dict() == expected.to_dict()
