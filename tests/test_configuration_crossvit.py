import json

import pytest
from huggingface_hub.errors import StrictDataclassError

from crossvit import CrossViTConfig, CrossViTForImageClassification


ERRORS = (ValueError, AttributeError, StrictDataclassError)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"embed_dim": (192,)}, r"embed_dim.*two or more branches, got \(192,\)"),
        ({"embed_dim": ()}, r"embed_dim.*two or more branches, got \(\)"),
        ({"embed_dim": (192, "384")}, r"embed_dim.*\(192, '384'\)"),
        ({"embed_dim": (192, -384)}, r"embed_dim.*positive.*-384"),
        ({"patch_size": (12,)}, r"patch_size.*each of the 2 branches.*\(12,\)"),
        ({"patch_size": 16}, r"patch_size.*16"),
        ({"num_heads": (6, 6, 6)}, r"num_heads.*each of the 2 branches.*\(6, 6, 6\)"),
        ({"num_heads": (6, 0)}, r"num_heads.*positive.*\(6, 0\)"),
        ({"num_heads": (5, 6)}, r"multiple of `num_heads`.*\(192, 384\), 'num_heads': \(5, 6\)"),
        ({"num_attention_heads": (6, "6")}, r"num_heads.*'6'"),
        ({"mlp_ratio": (3.0,)}, r"mlp_ratio.*\(3.0,\)"),
        ({"mlp_ratio": (3.0, float("nan"))}, r"mlp_ratio.*nan"),
        ({"image_size": (240, 224, 208)}, r"image_size.*\(240, 224, 208\)"),
        ({"image_size": (240, (224, 224, 3))}, r"image_size.*\(224, 224, 3\)"),
        ({"image_size": (240, 0)}, r"image_size.*above 0.*\(240, 0\)"),
        ({"image_size": "240"}, r"image_size.*'240'"),
        ({"img_size": (8, 224)}, r"patch_size.*not be larger.*\(12, 16\), 'image_size': \(8, 224\)"),
        ({"depth": ()}, r"depth.*must have stages.*got \(\)"),
        ({"depth": ((1, 5),)}, r"depth.*each of the 2 branches.*\(1, 5\)"),
        ({"depth": ((1, -5, 0),)}, r"depth.*none negative.*\(1, -5, 0\)"),
        ({"depth": (1, 5, 0)}, r"depth.*\(1, 5, 0\)"),
        (
            {"multi_conv": True, "patch_size": (8, 16)},
            r"multi_conv.*12 or 16 pixels.*'patch_size': \(8, 16\)",
        ),
        ({"multi_conv": True, "image_size": (250, 224)}, r"multi_conv.*whole patches.*'image_size': \(250, 224\)"),
        (
            {"multi_conv": True, "embed_dim": (3, 384), "num_heads": (3, 6)},
            r"multi_conv.*widths of 4 or more.*'embed_dim': \(3, 384\)",
        ),
        ({"hidden_act": "step"}, r"hidden_act.*one of .*gelu.*got 'step'"),
        ({"num_channels": 0}, r"num_channels.*positive, got 0"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate.*below 1, got 1.0"),
        ({"hidden_dropout_prob": -0.1}, r"hidden_dropout_prob.*got -0.1"),
        ({"layer_norm_eps": 0.0}, r"layer_norm_eps.*positive, got 0.0"),
        ({"qkv_bias": "yes"}, r"qkv_bias.*'yes'"),
        ({"hidden_size": 384}, r"hidden_size"),
        ({"num_hidden_layers": 12}, r"num_hidden_layers"),
        ({"out_features": ["stage4_0"]}, r"stage4_0"),
        ({"out_features": ["stage1"]}, r"stage1_0.*got \['stage1'\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_invalid_values_are_named(values, message):
    with pytest.raises(ERRORS, match=f"(?s){message}"):
        CrossViTConfig(**values)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("img_size", "240", "image_size.*'240'"),
        ("num_attention_heads", 6, "num_heads.*6"),
        ("depth", [[1, "5", 0]], "depth.*'5'"),
        ("num_branches", 3, "num_branches"),
    ],
)
def test_assignment_is_checked_by_either_name(name, value, message):
    with pytest.raises(ERRORS, match=f"(?s){message}"):
        setattr(CrossViTConfig(), name, value)


def test_model_refuses_values_assigned_later_that_do_not_fit(small_config):
    small_config.num_heads = (5, 4)
    with pytest.raises(ValueError, match=r"multiple of `num_heads`"):
        CrossViTForImageClassification(small_config)


def test_other_names_mean_the_same():
    config = CrossViTConfig(img_size=96, num_classes=7, num_attention_heads=(3, 4))
    assert (config.image_size, config.num_labels, config.num_heads) == (96, 7, (3, 4))
    assert (config.img_size, config.num_classes, config.num_attention_heads) == (96, 7, (3, 4))
    assert config.image_sizes == ((96, 96), (96, 96))
    config.img_size, config.num_classes = [(96, 48), 80], 3
    assert config.image_sizes == ((96, 48), (80, 80))
    assert len(config.id2label) == 3


def test_save_load_keeps_every_value(tmp_path):
    config = CrossViTConfig(
        image_size=((48, 96), 64),
        patch_size=(6, 8),
        num_channels=1,
        embed_dim=(32, 48),
        depth=((1, 2, 0), (0, 3, 2)),
        num_heads=(4, 6),
        mlp_ratio=(2, 3.5),
        qkv_bias=False,
        hidden_act="relu",
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.2,
        drop_path_rate=0.3,
        initializer_range=0.01,
        layer_norm_eps=1e-5,
        out_features=["stem_1", "stage2_0"],
        id2label={0: "cat", 1: "dog", 2: "ant"},
        label2id={"cat": 0, "dog": 1, "ant": 2},
        problem_type="multi_label_classification",
    )
    config.save_pretrained(tmp_path)
    reloaded = CrossViTConfig.from_pretrained(tmp_path)
    assert reloaded.to_dict() == config.to_dict()
    assert (reloaded.depth, reloaded.image_size) == (((1, 2, 0), (0, 3, 2)), ((48, 96), 64))  # tuples, not lists
    assert reloaded.out_indices == [1, 4]
    derived = {"hidden_size", "num_hidden_layers", "num_branches", "num_hidden_states", "stage_names", "image_sizes"}
    assert not derived & json.loads((tmp_path / "config.json").read_text()).keys()


def test_derived_values_follow_their_source(tmp_path):
    config = CrossViTConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_branches) == (384, 3, 2)
    assert config.stage_names == [
        *("stem_0", "stem_1", "stage1_0", "stage1_1", "stage2_0", "stage2_1", "stage3_0", "stage3_1")
    ]
    assert config.out_features == ["stage3_1"]
    config.save_pretrained(tmp_path)

    # Fewer stages, at loading and by assignment: the default feature map follows
    reloaded = CrossViTConfig.from_pretrained(tmp_path, depth=[[1, 2, 0]])
    config.depth = [[1, 2, 0]]
    for changed in (config, reloaded):
        assert changed.depth == ((1, 2, 0),)
        assert (changed.out_features, changed.out_indices) == (["stage1_1"], [3])
        assert changed.num_hidden_states == 4
    config.embed_dim = (192, 384, 96)
    assert (config.hidden_size, config.out_features) == (96, ["stage1_2"])
