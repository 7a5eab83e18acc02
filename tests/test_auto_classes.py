"""What `import crossvit` registers and needs, in processes where no other import hides a fault; and pipelines."""

import numpy as np
import PIL.Image
import pytest
import torch
from python_process import run_python
from timm_reference import perturb
from transformers import pipeline

from crossvit import CrossViTForImageClassification, CrossViTImageProcessor


@pytest.fixture
def checkpoint(small_config, tmp_path):
    """A folder with a small classifier and its image processor."""
    perturb(CrossViTForImageClassification(small_config)).save_pretrained(tmp_path / "checkpoint")
    processor = CrossViTImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 36, "width": 36})
    processor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_import_registers_every_auto_class_even_over_another_registration(checkpoint, tmp_path):
    run_python(
        """
        import importlib
        from transformers import AutoBackbone, AutoConfig, AutoImageProcessor
        from transformers import AutoModel, AutoModelForImageClassification, PreTrainedConfig

        class OtherConfig(PreTrainedConfig):
            model_type = "crossvit"

        AutoConfig.register("crossvit", OtherConfig)
        import crossvit
        importlib.reload(crossvit)

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


def test_import_needs_neither_torchvision_nor_optional_packages(checkpoint, tmp_path):
    run_python(
        """
        import sys
        sys.modules["torchvision"] = sys.modules["matplotlib"] = None  # so that importing them fails
        import crossvit, PIL.Image
        from crossvit.interpretability import *
        from transformers import AutoImageProcessor, pipeline

        assert {"datasets", "timm", "crossvit.training"}.isdisjoint(sys.modules)
        try:
            crossvit.CrossViTImageProcessor()
        except ImportError as error:
            assert "Torchvision" in str(error), error
        else:
            raise AssertionError("the torchvision backend was created without torchvision")
        image = PIL.Image.new("RGB", (300, 250))
        processor = crossvit.CrossViTImageProcessorPil.from_pretrained("checkpoint")
        assert processor(image).pixel_values[0].shape == (3, 36, 36)
        if not getattr(AutoImageProcessor, "is_dummy", False):  # as in Transformers 5.10
            assert type(AutoImageProcessor.from_pretrained("checkpoint")) is crossvit.CrossViTImageProcessorPil
            assert len(pipeline("image-classification", model="checkpoint")(image)) == 5
        """,
        tmp_path,
    )


@pytest.fixture
def images() -> list[PIL.Image.Image]:
    """Eleven images: batches of eight and a last one of three."""
    generator = np.random.default_rng(0)
    sizes = [(30 + 7 * index, 90 - 5 * index) for index in range(11)]
    return [PIL.Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def test_classification_pipeline_in_batches(checkpoint, images):
    model = CrossViTForImageClassification.from_pretrained(checkpoint).eval()
    inputs = CrossViTImageProcessor.from_pretrained(checkpoint)(images, return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits.softmax(dim=-1)
    pipe = pipeline("image-classification", model=str(checkpoint))
    for batch_size in (1, 8):
        for outputs, expected in zip(pipe(images, batch_size=batch_size), probabilities, strict=True):
            order = expected.argsort(descending=True)
            assert [entry["label"] for entry in outputs] == [model.config.id2label[i.item()] for i in order]
            np.testing.assert_allclose([entry["score"] for entry in outputs], expected[order], atol=1e-6)


def test_feature_pipeline_in_batches(checkpoint, images):
    pipe = pipeline("image-feature-extraction", model=str(checkpoint))
    singly = [pipe(image) for image in images]
    for outputs, expected in zip(pipe(images, batch_size=8), singly, strict=True):
        assert np.shape(outputs) == (1, 17, 32)
        np.testing.assert_allclose(outputs, expected, atol=1e-5)
    assert np.shape(pipe(images[0], pool=True)) == (1, 24 + 32)
