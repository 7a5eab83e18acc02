"""Each promise in a process of its own, so that what another test imported cannot hide a missing registration."""

import numpy as np
import PIL.Image
import pytest
from python_process import run_python
from timm_reference import perturb

from crossvit import CrossViTForImageClassification, CrossViTImageProcessor


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
    run_python(
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
        run_python('from transformers import AutoConfig; AutoConfig.from_pretrained("checkpoint")', tmp_path)


def test_import_twice_and_beside_another_registration(checkpoint, tmp_path):
    run_python(
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
    run_python(
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
