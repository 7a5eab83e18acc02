"""Each promise in a process of its own, so that what another test imported cannot hide a missing registration."""

import os
import subprocess
import sys
import textwrap
from functools import partial

import numpy as np
import PIL.Image
import pytest
import torch
from timm_reference import perturb

from crossvit import (
    CrossViTConfig,
    CrossViTForImageClassification,
    CrossViTImageProcessor,
    CrossViTModel,
)


def run(code: str, tmp_path, **environment) -> str:
    """Runs `code` in a new process without network and returns what it prints."""
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture
def checkpoint(small_config, tmp_path):
    """A folder with a small classifier and its image processor."""
    perturb(CrossViTForImageClassification(small_config)).save_pretrained(tmp_path / "checkpoint")
    processor = CrossViTImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 36, "width": 36})
    processor.save_pretrained(tmp_path / "checkpoint")
    generator = np.random.default_rng(0)
    for index in range(11):
        pixels = generator.integers(0, 256, (30 + 7 * index, 90 - 5 * index, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{index:02}.png")
    return tmp_path / "checkpoint"


def test_import_registers_every_auto_class(checkpoint, tmp_path):
    run(
        """
        import crossvit
        from transformers import AutoBackbone, AutoConfig, AutoImageProcessor
        from transformers import AutoModel, AutoModelForImageClassification

        config = AutoConfig.from_pretrained("checkpoint")
        assert type(config) is crossvit.CrossViTConfig
        assert type(AutoConfig.for_model("crossvit")) is crossvit.CrossViTConfig
        assert type(AutoModel.from_pretrained("checkpoint")) is crossvit.CrossViTModel
        classifier = AutoModelForImageClassification.from_pretrained("checkpoint")
        assert type(classifier) is crossvit.CrossViTForImageClassification
        assert type(AutoBackbone.from_config(config)) is crossvit.CrossViTBackbone
        assert type(AutoImageProcessor.from_pretrained("checkpoint")) is crossvit.CrossViTImageProcessor
        processor = AutoImageProcessor.from_pretrained("checkpoint", backend="pil")
        assert type(processor) is crossvit.CrossViTImageProcessorPil
        assert processor.crop_size["height"] == 36
        """,
        tmp_path,
    )


def test_without_import_the_model_type_is_unknown(checkpoint, tmp_path):
    with pytest.raises(AssertionError, match="crossvit"):
        run('from transformers import AutoConfig; AutoConfig.from_pretrained("checkpoint")', tmp_path)


def test_import_twice_and_beside_another_registration(checkpoint, tmp_path):
    run(
        """
        import importlib
        from transformers import AutoConfig, AutoModel, PreTrainedConfig

        class OtherConfig(PreTrainedConfig):
            model_type = "crossvit"

        AutoConfig.register("crossvit", OtherConfig)
        import crossvit
        importlib.reload(crossvit)
        assert type(AutoConfig.from_pretrained("checkpoint")) is crossvit.CrossViTConfig
        assert type(AutoModel.from_pretrained("checkpoint")) is crossvit.CrossViTModel
        """,
        tmp_path,
    )


@pytest.mark.parametrize("task", ["image-classification", "image-feature-extraction"])
def test_pipelines_in_batches(checkpoint, tmp_path, task):
    # Eleven images: batches of eight and a ragged last one of three
    run(
        f"""
        import glob
        import crossvit, numpy, PIL.Image, torch
        from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

        images = [PIL.Image.open(path) for path in sorted(glob.glob("*.png"))]
        pipe = pipeline("{task}", model="checkpoint")
        singly = [pipe(image) for image in images]
        for batch_size in (1, 8):
            for outputs, expected in zip(pipe(images, batch_size=batch_size), singly, strict=True):
                if "{task}" == "image-feature-extraction":
                    numpy.testing.assert_allclose(outputs, expected, atol=1e-5)
                    assert numpy.shape(outputs) == (1, 17, 32)
                else:
                    assert [entry["label"] for entry in outputs] == [entry["label"] for entry in expected]
                    scores = [[entry["score"] for entry in entries] for entries in (outputs, expected)]
                    numpy.testing.assert_allclose(*scores, atol=1e-6)
        if "{task}" == "image-feature-extraction":
            assert numpy.shape(pipe(images[0], pool=True)) == (1, 24 + 32)
        else:
            model = AutoModelForImageClassification.from_pretrained("checkpoint")
            inputs = AutoImageProcessor.from_pretrained("checkpoint")(images, return_tensors="pt")
            with torch.no_grad():
                labels = model(**inputs).logits.argmax(-1)
            assert [entry[0]["label"] for entry in singly] == [model.config.id2label[i.item()] for i in labels]
        """,
        tmp_path,
    )


@pytest.mark.parametrize("saved", ["classifier", "base model"])
def test_checkpoint_with_its_code_needs_no_package(small_config, checkpoint, tmp_path, saved):
    # Registration is for good, hence in a process of its own too
    run(
        f"""
        from crossvit import *

        CrossViTConfig.register_for_auto_class()
        CrossViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
        CrossViTModel.register_for_auto_class("AutoModel")
        CrossViTImageProcessor.register_for_auto_class()
        model = CrossViTForImageClassification.from_pretrained("checkpoint")
        (model if {saved == "classifier"} else model.crossvit).save_pretrained("with_code")
        CrossViTImageProcessor.from_pretrained("checkpoint").save_pretrained("with_code")
        """,
        tmp_path,
    )
    run(
        f"""
        import sys
        sys.modules["crossvit"] = None  # an import of it fails from here on
        import glob, PIL.Image, torch
        from transformers import AutoBackbone, AutoConfig, AutoImageProcessor
        from transformers import AutoModel, AutoModelForImageClassification, pipeline

        options = dict(trust_remote_code=True)
        config = AutoConfig.from_pretrained("with_code", **options)
        assert config.depth == ((1, 2, 0), (2, 1, 0)) and type(config).__module__.startswith("transformers_modules")
        processor = AutoImageProcessor.from_pretrained("with_code", **options)
        assert type(processor).__name__ == "CrossViTImageProcessor"
        images = processor([PIL.Image.open(path) for path in sorted(glob.glob("*.png"))], return_tensors="pt")
        base = AutoModel.from_pretrained("with_code", **options)
        outputs = {{"pixel_values": images.pixel_values}}
        with torch.no_grad():
            outputs["features"] = base(**images).pooler_output
            if {saved == "classifier"}:
                classifier = AutoModelForImageClassification.from_pretrained("with_code", **options)
                outputs["logits"] = classifier(**images).logits
                pipe = pipeline("image-classification", model="with_code", **options)
                assert pipe("00.png")[0]["label"] == config.id2label[outputs["logits"][0].argmax().item()]
                features = pipeline("image-feature-extraction", model="with_code", **options)
                assert len(features("00.png")[0]) == 17
            backbone = AutoBackbone.from_config(config, **options)
            assert len(backbone(**images).feature_maps) == 1
        torch.save(outputs, "outputs.pt")
        """,
        tmp_path,
    )
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    classifier = CrossViTForImageClassification.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        # The same weights elsewhere in memory may round otherwise: up to 3.6e-7 apart in models of this size
        same = partial(torch.testing.assert_close, atol=1e-5, rtol=0)
        same(classifier.crossvit(outputs["pixel_values"]).pooler_output, outputs["features"])
        if saved == "classifier":
            same(classifier(outputs["pixel_values"]).logits, outputs["logits"])


def test_checkpoint_with_its_code_keeps_it_when_the_package_saves_it_again(checkpoint, tmp_path):
    names = ["configuration", "image_processing", "image_processing_pil", "modeling"]
    code = {*(f"{name}_crossvit.py" for name in names), "timm_checkpoints.py"}
    run(
        """
        from pathlib import Path
        from crossvit import *

        model = CrossViTForImageClassification.from_pretrained("checkpoint")
        CrossViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
        CrossViTImageProcessor.register_for_auto_class()
        model.save_pretrained("with_code")
        CrossViTImageProcessor.from_pretrained("checkpoint").save_pretrained("with_code")
        """,
        tmp_path,
    )
    run(
        """
        from pathlib import Path
        from crossvit import *

        CrossViTForImageClassification.from_pretrained("with_code").save_pretrained("again")
        CrossViTImageProcessorPil.from_pretrained("with_code").save_pretrained("again")
        assert CrossViTForImageClassification._auto_class is CrossViTImageProcessorPil._auto_class is None
        CrossViTModel.from_pretrained("checkpoint").save_pretrained("without")
        # The code of the Hub's repository is named and not copied
        model = CrossViTModel.from_pretrained("with_code")
        model.config.auto_map = {key: f"me/crossvit--{name}" for key, name in model.config.auto_map.items()}
        model.save_pretrained("elsewhere")
        assert "me/crossvit--modeling_crossvit.CrossViTModel" in Path("elsewhere/config.json").read_text()
        """,
        tmp_path,
    )
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == code
    assert not list((tmp_path / "without").glob("*.py")) and not list((tmp_path / "elsewhere").glob("*.py"))
    run(
        """
        import sys
        sys.modules["crossvit"] = None
        from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

        AutoImageProcessor.from_pretrained("again", backend="pil", trust_remote_code=True)
        AutoModel.from_pretrained("again", trust_remote_code=True)
        AutoModelForImageClassification.from_pretrained("again", trust_remote_code=True)
        """,
        tmp_path,
    )


def test_checkpoint_without_code_names_none(checkpoint):
    assert not list(checkpoint.glob("*.py"))
    assert "auto_map" not in (checkpoint / "config.json").read_text()
    assert isinstance(CrossViTModel.from_pretrained(checkpoint).config, CrossViTConfig)
