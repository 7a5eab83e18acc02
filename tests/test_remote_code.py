"""Checkpoints that carry their code load where the package is not installed, and keep the code when saved again."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from python_process import run_python
from timm_reference import perturb
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

import crossvit
from crossvit import (
    CrossViTForImageClassification,
    CrossViTImageProcessor,
    CrossViTImageProcessorPil,
    CrossViTModel,
)
from crossvit.remote_code import AUTO_MAP, CODE_FILES


CROP = {"size": {"shortest_edge": 40}, "crop_size": {"height": 36, "width": 36}}


@pytest.fixture
def with_code(small_config, tmp_path) -> Path:
    """A checkpoint that carries its code."""
    model, processor = perturb(CrossViTForImageClassification(small_config)), CrossViTImageProcessor(**CROP)
    model.config.auto_map = processor.auto_map = dict(AUTO_MAP)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "with_code")
    return tmp_path / "with_code"


def auto_map(file: Path) -> dict:
    return json.loads(file.read_text())["auto_map"]


def assert_carries_its_code(folder: Path):
    assert {path.name for path in folder.glob("*.py")} == set(CODE_FILES)
    assert auto_map(folder / "config.json") == AUTO_MAP
    assert auto_map(folder / "preprocessor_config.json") == AUTO_MAP


def test_files_are_all_that_the_classes_import():
    for file in CODE_FILES:
        path = Path(crossvit.__file__).with_name(file)
        assert "crossvit" not in get_imports(path)
        assert {Path(needed).name for needed in get_relative_import_files(path)} <= set(CODE_FILES)


def test_loads_without_the_package_and_keeps_its_code(with_code, tmp_path):
    assert_carries_its_code(with_code)
    image = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    PIL.Image.fromarray(image).save(tmp_path / "image.png")
    run_python(
        """
        import sys
        sys.modules["crossvit"] = None  # as if it were not installed
        import PIL.Image, torch
        from transformers import AutoBackbone, AutoConfig, AutoImageProcessor
        from transformers import AutoModel, AutoModelForImageClassification, pipeline

        def load(auto_class, folder="with_code", **kwargs):
            loaded = auto_class.from_pretrained(folder, trust_remote_code=True, **kwargs)
            assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
            return loaded

        image = PIL.Image.open("image.png")
        config = load(AutoConfig)
        assert config.depth == ((1, 2, 0), (2, 1, 0))
        outputs = {
            str(backend): load(AutoImageProcessor, backend=backend)(image, return_tensors="pt").pixel_values
            for backend in (None, "torchvision", "pil")
        }
        classifier = load(AutoModelForImageClassification)
        pairs = load(AutoImageProcessor, backend="pil")([(image, image)], return_tensors="pt").pixel_values
        with torch.no_grad():
            outputs["logits of pairs"] = classifier(pairs).logits
            outputs["features"] = load(AutoModel)(outputs["pil"]).pooler_output
            outputs["logits"] = classifier(outputs["pil"]).logits
        backbone = AutoBackbone.from_config(config, trust_remote_code=True)
        assert len(backbone(outputs["pil"]).feature_maps) == 1
        assert len(pipeline("image-feature-extraction", model="with_code", trust_remote_code=True)(image)[0]) == 17
        torch.save(outputs, "outputs.pt")

        classifier.save_pretrained("again")
        load(AutoImageProcessor, backend="pil").save_pretrained("again")
        for auto_class in (AutoModel, AutoModelForImageClassification):
            load(auto_class, "again")
        for backend, suffix in (("torchvision", ""), ("pil", "Pil")):
            processor = load(AutoImageProcessor, "again", backend=backend)
            assert type(processor).__name__ == f"CrossViTImageProcessor{suffix}"
        """,
        tmp_path,
    )
    assert_carries_its_code(tmp_path / "again")

    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    assert torch.equal(outputs["None"], outputs["torchvision"])
    for name, processor in (("torchvision", CrossViTImageProcessor), ("pil", CrossViTImageProcessorPil)):
        assert torch.equal(outputs[name], processor(**CROP)(image, return_tensors="pt").pixel_values)
    classifier = CrossViTForImageClassification.from_pretrained(with_code).eval()
    # The same weights elsewhere in memory may round otherwise: up to 3.6e-7 apart in models of this size
    same = partial(torch.testing.assert_close, atol=1e-5, rtol=0)
    with torch.no_grad():
        same(classifier.crossvit(outputs["pil"]).pooler_output, outputs["features"])
        same(classifier(outputs["pil"]).logits, outputs["logits"])
        same(outputs["logits of pairs"], outputs["logits"])


def test_package_keeps_the_code(with_code, tmp_path):
    classifier, base_model = CrossViTForImageClassification, CrossViTModel
    for classes in ((classifier, CrossViTImageProcessor), (base_model, CrossViTImageProcessorPil)):
        folder = tmp_path / classes[0].__name__
        for part in classes:
            part.from_pretrained(with_code).save_pretrained(folder)
        assert_carries_its_code(folder)


def test_registered_classes_carry_all_of_the_code(small_config, tmp_path, monkeypatch):
    for part, auto_class in ((CrossViTModel, "AutoModel"), (CrossViTImageProcessorPil, "AutoImageProcessor")):
        monkeypatch.setattr(part, "_auto_class", None)  # undone after the test
        part.register_for_auto_class(auto_class)
    CrossViTModel(small_config).save_pretrained(tmp_path)
    CrossViTImageProcessorPil().save_pretrained(tmp_path)
    assert_carries_its_code(tmp_path)


def test_other_code_is_left_as_it_is(small_config, tmp_path, monkeypatch):
    # Of a repository
    small_config.auto_map = {"AutoModel": "me/crossvit--modeling_crossvit.CrossViTModel"}
    small_config.save_pretrained(tmp_path / "repository")
    assert auto_map(tmp_path / "repository" / "config.json") == small_config.auto_map
    assert not list((tmp_path / "repository").glob("*.py"))

    # Of the user
    class OwnImageProcessor(CrossViTImageProcessor):
        pass

    OwnImageProcessor.register_for_auto_class()
    OwnImageProcessor().save_pretrained(tmp_path / "own")
    own = {"AutoImageProcessor": "test_remote_code.OwnImageProcessor"}
    assert auto_map(tmp_path / "own" / "preprocessor_config.json") == own
    processor = OwnImageProcessor()
    processor.auto_map = dict(AUTO_MAP)
    processor.save_pretrained(tmp_path / "both")
    assert auto_map(tmp_path / "both" / "preprocessor_config.json") == {**AUTO_MAP, **own}


def test_only_checkpoints_get_the_code(small_config, tmp_path):
    small_config.auto_map = dict(AUTO_MAP)
    small_config.to_json_file(tmp_path / "config.json")
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_checkpoint_without_code_names_none(small_config, tmp_path):
    CrossViTForImageClassification(small_config).save_pretrained(tmp_path)
    CrossViTImageProcessor().save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    for file in ("config.json", "preprocessor_config.json"):
        assert "auto_map" not in (tmp_path / file).read_text()
