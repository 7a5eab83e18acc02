"""Weights from the Hub and to the Hub, by processes that talk to a small Hub on this machine."""

import json
import re
from hashlib import sha256
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from python_process import run_process, run_python
from reference import VARIANTS, to_transformers_name
from reference_files import timm_repository
from safetensors.torch import load
from timm_reference import timm_variant


CONVERTER = Path(__file__).parents[1] / "conversion" / "convert_crossvit_to_hf.py"
VARIANT = VARIANTS["crossvit_tiny"]
REPO = VARIANT["timm_id"]


@pytest.fixture
def image(tmp_path) -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "image.jpg", quality=100)
    return PIL.Image.open(tmp_path / "image.jpg").convert("RGB")


@torch.no_grad()
def test_published_weights_in_one_line_online_and_offline(hub, tmp_path, image):
    references = {"old": timm_variant(VARIANT, seed=1), "main": timm_variant(VARIANT)}
    repository = hub.add_repository(REPO, timm_repository(references["old"]))
    repository.commit(timm_repository(references["main"]))
    code = f"""
        import sys
        sys.modules["timm"] = None  # as if it were not installed
        import huggingface_hub.constants, PIL.Image, torch, transformers.utils.hub
        from crossvit import CrossViTForImageClassification, CrossViTImageProcessorPil

        def load_and_run(file, **options):
            model = CrossViTForImageClassification.from_pretrained("{REPO}", **options).eval()
            processor = CrossViTImageProcessorPil.from_pretrained("{REPO}", **options)
            commit = options.get("revision", "{repository.hashes[1]}")
            assert getattr(model.config, "_commit_hash", commit) == commit  # later releases of Transformers have none
            inputs = processor(PIL.Image.open("image.jpg"), return_tensors="pt")
            with torch.no_grad():
                torch.save((inputs.pixel_values, model(**inputs).logits), file)

        load_and_run("old.pt", revision="{repository.hashes[0]}")
        load_and_run("main.pt")
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        assert transformers.utils.hub.is_offline_mode()
        load_and_run("offline.pt")
        """
    run_python(code, tmp_path, **hub.environment)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(references["main"]))
    pixel_values = transform(image)[None]
    for file, reference in (("old", "old"), ("main", "main"), ("offline", "main")):
        pixels, logits = torch.load(tmp_path / f"{file}.pt", weights_only=True)
        assert torch.equal(pixels, pixel_values)
        # The bound of test_parity_timm.py, which says why
        torch.testing.assert_close(logits, references[reference](pixel_values), atol=1e-5, rtol=0)


def test_published_variant_is_converted_and_published(hub, tmp_path, image):
    files = timm_repository(timm_variant(VARIANT))
    source = hub.add_repository(REPO, files)
    source.commit(timm_repository(timm_variant(VARIANT, seed=1)))
    options = ("--revision", source.hashes[0], "--push-to-hub", "tester/tiny")
    printed = run_process(tmp_path, CONVERTER, "crossvit_tiny", "out", *options, **hub.environment)
    assert "crossvit_tiny, 304 tensors" in printed and "tester/tiny: published" in printed
    published = hub.repositories["tester/tiny"].files
    output = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert output == {name: content for name, content in published.items() if name != ".gitattributes"}
    weights, expected = load(published["model.safetensors"]), load(files["model.safetensors"])
    assert all(torch.equal(weights[to_transformers_name(name)], weight) for name, weight in expected.items())
    assert json.loads(published["conversion.json"])["source"] == {
        "repository": REPO,
        "revision": source.hashes[0],
        "sha256": sha256(files["model.safetensors"]).hexdigest(),
    }

    # Accuracy and license of the published weights are known
    card = ModelCard(published["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("apache-2.0", REPO)
    assert {(result.metric_type, result.metric_value) for result in card.data.eval_results} == {
        ("accuracy", VARIANT["imagenet_top1"]["timm"]),
        ("top_5_accuracy", VARIANT["imagenet_top5"]["timm"]),
    }
    # The code of the card runs where the package is not installed
    (usage,) = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
    usage = 'import sys; sys.modules["crossvit"] = None\n' + usage
    assert run_python(usage, tmp_path, **hub.environment).strip() in json.loads(published["config.json"])["label2id"]
