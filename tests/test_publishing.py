"""Weights from the Hub and to the Hub, by processes of their own that talk to a small Hub on this machine."""

import json
import os
import re
import subprocess
import sys
import textwrap
from hashlib import sha256
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from reference import VARIANTS, to_transformers_name
from reference_files import save_timm_folder, small_timm, timm_repository
from safetensors.torch import load, load_file
from timm_reference import timm_variant


CONVERTER = Path(__file__).parents[1] / "conversion" / "convert_crossvit_to_hf.py"
REPO = VARIANTS["crossvit_tiny"]["timm_id"]


@pytest.fixture
def image(tmp_path) -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "image.jpg", quality=100)
    return PIL.Image.open(tmp_path / "image.jpg").convert("RGB")


def run(hub, tmp_path, *arguments, status: int = 0, **environment) -> str:
    """Runs Python in a new process and returns what it prints, or its errors where it must fail."""
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=tmp_path,
        env={**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "hf"), **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == status, process.stderr
    return process.stderr if status else process.stdout


def run_without(hub, tmp_path, package: str, code: str, **environment) -> str:
    """Runs code in a process that cannot import a package."""
    return run(
        hub, tmp_path, "-c", f"import sys; sys.modules[{package!r}] = None\n" + textwrap.dedent(code), **environment
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.no_grad()
def test_published_weights_in_one_line_online_and_offline(hub, tmp_path, image):
    references = [timm_variant(VARIANTS["crossvit_tiny"]) for _ in range(2)]  # Initialized one after the other
    repository = hub.add_repository(REPO, timm_repository(references[0]))
    repository.commit(timm_repository(references[1]))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(references[0]))
    pixel_values = transform(image)[None]
    code = f"""
    import PIL.Image, torch
    from crossvit import CrossViTForImageClassification, CrossViTImageProcessorPil

    for revision in ("main", "{repository.hashes[0]}"):
        model = CrossViTForImageClassification.from_pretrained("{REPO}", revision=revision).eval()
        processor = CrossViTImageProcessorPil.from_pretrained("{REPO}", revision=revision)
        inputs = processor(PIL.Image.open("image.jpg"), return_tensors="pt")
        with torch.no_grad():
            torch.save((inputs.pixel_values, model(**inputs).logits), revision + ".pt")
    """
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        run_without(hub, tmp_path, "timm", code, **environment)
        for revision, reference in (("main", references[1]), (repository.hashes[0], references[0])):
            pixels, logits = torch.load(tmp_path / f"{revision}.pt", weights_only=True)
            assert torch.equal(pixels, pixel_values)
            # The bound of test_parity_timm.py, which says why
            torch.testing.assert_close(logits, reference(pixel_values), atol=1e-5, rtol=0)
            (tmp_path / f"{revision}.pt").unlink()


def test_other_architectures_are_refused_before_their_weights_are_downloaded(hub, tmp_path):
    config = {"architecture": "resnet50", "pretrained_cfg": {"input_size": [3, 224, 224]}}
    hub.add_repository("timm/resnet50", {"config.json": json.dumps(config).encode(), "model.safetensors": b""})
    code = "from crossvit import CrossViTForImageClassification as C; C.from_pretrained('timm/resnet50')"
    assert "'resnet50'" in run(hub, tmp_path, "-c", code, status=1)
    assert not any("safetensors" in path for _, path in hub.requests)


def test_published_variant_is_converted_and_published(hub, tmp_path, image):
    files = timm_repository(timm_variant(VARIANTS["crossvit_tiny"]))
    source = hub.add_repository(REPO, files)
    printed = run(hub, tmp_path, CONVERTER, "crossvit_tiny", "out", "--push-to-hub", "tester/tiny")
    assert "crossvit_tiny, 304 tensors" in printed and "tester/tiny: published" in printed
    published = hub.repositories["tester/tiny"].files
    assert {**published, ".gitattributes": b""} == {**files_of(tmp_path / "out"), ".gitattributes": b""}
    weights, expected = load(published["model.safetensors"]), load(files["model.safetensors"])
    assert all(torch.equal(weights[to_transformers_name(name)], weight) for name, weight in expected.items())
    assert json.loads(published["conversion.json"])["source"] == {
        "repository": REPO,
        "revision": source.hashes[0],
        "sha256": sha256(files["model.safetensors"]).hexdigest(),
    }

    # These are the published weights, of which something is known
    card, variant = ModelCard(published["README.md"].decode()), VARIANTS["crossvit_tiny"]
    assert (card.data.license, card.data.base_model) == ("apache-2.0", REPO)
    assert {(result.metric_type, result.metric_value) for result in card.data.eval_results} == {
        ("accuracy", variant["imagenet_top1"]["timm"]),
        ("top_5_accuracy", variant["imagenet_top5"]["timm"]),
    }
    (usage,) = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
    label = run_without(hub, tmp_path, "crossvit", usage).strip()
    assert label in json.loads(published["config.json"])["label2id"]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["crossvit_9", "out"], {}, "timm/crossvit_9_240.in1k"),
        (["crossvit_tiny", "out", "--revision", "v0"], {}, "v0"),
        (["crossvit_tiny", "out", "--push-to-hub", "tester/x"], {"HF_TOKEN": "wrong"}, "401|token"),
        (["crossvit_tiny", "out", "--push-to-hub", "other/x"], {}, "rights"),
    ],
    ids=["repository", "revision", "token", "namespace"],
)
def test_what_the_hub_refuses(hub, tmp_path, arguments, environment, message):
    hub.add_repository(REPO, timm_repository(timm_variant(VARIANTS["crossvit_tiny"])))
    errors = run(hub, tmp_path, CONVERTER, *arguments, status=1, **environment)
    assert "Traceback" not in errors and re.search(f"^error: .*({message})", errors, re.MULTILINE)
    assert set(hub.repositories) == {REPO}


@pytest.mark.slow
def test_what_the_trainer_pushes(hub, tmp_path, convert):
    checkpoint = convert(save_timm_folder(small_timm(), tmp_path / "timm"))
    hub.add_repository("tester/x", files_of(checkpoint))
    training = """
    import torch
    from crossvit import CrossViTForImageClassification, CrossViTImageProcessor
    from transformers import Trainer, TrainingArguments

    model = CrossViTForImageClassification.from_pretrained("tester/x")
    trainer = Trainer(
        model,
        TrainingArguments("tuned", hub_model_id="tester/tuned", max_steps=1, report_to="none", use_cpu=True),
        train_dataset=[{"pixel_values": torch.randn(3, 36, 36), "labels": i % 5} for i in range(8)],
        processing_class=CrossViTImageProcessor.from_pretrained("tester/x"),
    )
    trainer.train()
    trainer.push_to_hub()
    torch.save(model.state_dict(), "tuned.pt")
    """
    run(hub, tmp_path, "-c", textwrap.dedent(training))
    card = ModelCard(hub.repositories["tester/tuned"].files["README.md"].decode())
    assert card.data.base_model == "tester/x" and "generated_from_trainer" in card.data.tags
    loading = """
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    AutoImageProcessor.from_pretrained("tester/tuned", trust_remote_code=True)
    model = AutoModelForImageClassification.from_pretrained("tester/tuned", trust_remote_code=True)
    torch.save(model.state_dict(), "loaded.pt")
    """
    run_without(hub, tmp_path, "crossvit", loading)
    tuned, loaded = (torch.load(tmp_path / name, weights_only=True) for name in ("tuned.pt", "loaded.pt"))
    assert tuned.keys() == loaded.keys() == load_file(checkpoint / "model.safetensors").keys()
    assert all(torch.equal(tuned[name], loaded[name]) for name in tuned)
