"""From the commands to the Hub and back: what is published, what is refused, and what is left when something fails."""

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from argparse import Namespace
from functools import partial
from hashlib import sha256
from pathlib import Path

import convert_crossvit_to_hf
import numpy as np
import PIL.Image
import publishing
import pytest
import torch
from commands import ConversionError
from hub_server import GIT_ATTRIBUTES, Fault, HubServer
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from model_card import PAPER, TIMM_RESULTS
from publishing import Repository
from reference_checkpoint import read_reference
from safetensors.torch import load, load_file, save, save_file
from timm_reference import perturb, timm_of_config, timm_variant
from variants import VARIANTS, timm_name
from weight_names import to_transformers_name

from crossvit import CrossViTForImageClassification, CrossViTImageProcessor


CONVERSION = Path(__file__).parents[1] / "conversion"
NUM_HEADS = ["--num-heads", 2, 4]
WEIGHTS = "model.safetensors"


@pytest.fixture
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture
def client(hub, tmp_path, monkeypatch):
    """Lets the client of this process talk to the server: starting another one takes its time."""
    monkeypatch.setattr(publishing, "HfApi", partial(HfApi, endpoint=hub.endpoint, token=hub.token))
    settings = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path / "hf" / "hub")}
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)


@pytest.fixture
def weights(small_config, tmp_path) -> Path:
    """Weights of timm's that nobody has published."""
    small_config.depth = ((1, 2, 0), (1, 1, 0))  # timm builds no stage whose first branch is the deeper one
    save_file(timm_of_config(small_config).state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.fixture
def image(tmp_path) -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "image.jpg")
    return PIL.Image.open(tmp_path / "image.jpg")


@pytest.fixture
def checkpoint(weights, tmp_path) -> Path:
    """What the command makes of `weights` for tester/x."""
    options = dict.fromkeys(["revision", "filename", "sha256", "entry", "image_size", "patch_size"])
    reference = read_reference(str(weights), Namespace(**options, num_heads=[2, 4]))
    convert_crossvit_to_hf.convert(reference, tmp_path / "checkpoint", repo_id="tester/x")
    return tmp_path / "checkpoint"


def start(hub, tmp_path, *command, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=tmp_path,
        env={**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "hf"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(hub, tmp_path, *command, **environment) -> str:
    """Runs Python with these arguments, which must succeed, and returns what it prints."""
    process = start(hub, tmp_path, *command, **environment)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def convert(hub, tmp_path, *arguments) -> str:
    return run(hub, tmp_path, CONVERSION / "convert_crossvit_to_hf.py", *arguments)


def error_of(hub, tmp_path, script, *arguments, **environment) -> str:
    """Runs a command that must fail, and returns the one line that it says so with."""
    process = start(hub, tmp_path, CONVERSION / script, *arguments, **environment)
    _, errors = process.communicate()
    assert process.returncode == 1 and "Traceback" not in errors, errors
    # What is above it are the warnings of the client, which tries some things again
    (error,) = re.findall("^error: .*$", errors, re.MULTILINE)
    assert errors.endswith(f"{error}\n"), errors
    return error


def conversion_error(hub, tmp_path, *arguments, **environment) -> str:
    return error_of(hub, tmp_path, "convert_crossvit_to_hf.py", *arguments, **environment)


def run_without_package(hub, tmp_path, code: str) -> str:
    no_package = 'import sys; sys.modules["crossvit"] = None  # an import of it fails from here on\n'
    return run(hub, tmp_path, "-c", no_package + textwrap.dedent(code))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def writes(hub) -> list[tuple]:
    return [request for request in hub.requests if request[0] not in ("GET", "HEAD")]


def timm_files(name: str, seed: int = 0) -> dict[str, bytes]:
    """A repository of timm's in the shape of a published one, as timm writes it."""
    model = perturb(timm_variant(VARIANTS[name]), seed)
    pretrained_cfg = {"tag": "in1k", "input_size": [3, 240, 240], "crop_pct": 0.875, "interpolation": "bicubic"}
    config = {"architecture": timm_name(VARIANTS[name]), "num_classes": 1000, "pretrained_cfg": pretrained_cfg}
    return {"config.json": json.dumps(config).encode(), WEIGHTS: save(model.state_dict())}


def assert_same_weights(checkpoint: Path, timm_weights: bytes):
    weights, expected = load_file(checkpoint / WEIGHTS), load(timm_weights)
    assert len(weights) == len(expected)
    assert all(torch.equal(weights[to_transformers_name(name)], weight) for name, weight in expected.items())


@pytest.mark.slow
def test_published_checkpoint_is_the_folder_and_needs_no_package(hub, weights, image, tmp_path):
    output = convert(hub, tmp_path, weights, "out", *NUM_HEADS, "--push-to-hub", "tester/x", "--private")
    repository = hub.repositories["tester/x"]
    assert f"tester/x: published, {hub.endpoint}/tester/x/commit/{repository.hashes[-1]}" in output
    assert repository.private and len(repository.commits) == 2  # the Hub's own and ours
    assert repository.files == {".gitattributes": GIT_ATTRIBUTES, **files_of(tmp_path / "out")}
    # Nothing is claimed of weights that came from nowhere
    card = ModelCard.load(tmp_path / "out" / "README.md").data
    assert card.license is card.datasets is card.base_model is card.eval_results is None
    assert "is not recorded" in repository.files["README.md"].decode()

    run_without_package(
        hub,
        tmp_path,
        """
        import PIL.Image, torch
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        processor = AutoImageProcessor.from_pretrained("tester/x", trust_remote_code=True)
        model = AutoModelForImageClassification.from_pretrained("tester/x", trust_remote_code=True).eval()
        with torch.no_grad():
            torch.save(model(**processor(PIL.Image.open("image.jpg"), return_tensors="pt")).logits, "logits.pt")
        """,
    )
    model = CrossViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    processor = CrossViTImageProcessor.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = model(**processor(image, return_tensors="pt")).logits
    # The same weights elsewhere in memory may round otherwise: up to 3.6e-7 apart in models of this size
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("repo_id", "token", "message"),
    [
        ("tester/x", "hf_wrong", "the Hub does not know the token: .*'hf auth login'"),
        ("tester/x", "", "no token of the Hub .*'hf auth login'"),
        ("other/x", "hf_test", "other/x is no repository of yours: the owner .* must be one of tester"),
    ],
    ids=["wrong token", "no token", "other namespace"],
)
def test_who_cannot_publish_is_told_before_any_work(hub, weights, tmp_path, repo_id, token, message):
    error = conversion_error(hub, tmp_path, weights, "out", *NUM_HEADS, "--push-to-hub", repo_id, HF_TOKEN=token)
    assert re.search(message, error), error
    assert not hub.repositories and not writes(hub)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_other_files_are_refused_before_any_work_and_replaced_with_overwrite(hub, weights, tmp_path):
    others = {
        ".gitattributes": GIT_ATTRIBUTES,
        "README.md": b"mine",
        "config.json": b"{}",
        "pytorch_model.bin": b"old",
    }
    repository = hub.add_repository("tester/x", others)
    command = (weights, "out", *NUM_HEADS, "--push-to-hub", "tester/x")
    error = conversion_error(hub, tmp_path, *command)
    assert "tester/x exists and has other files (README.md, config.json, pytorch_model.bin)" in error
    assert "--overwrite" in error
    assert repository.commits == [others] and not writes(hub)
    assert not (tmp_path / "out").exists()

    convert(hub, tmp_path, *command, "--overwrite")
    assert repository.commits == [others, {".gitattributes": GIT_ATTRIBUTES, **files_of(tmp_path / "out")}]


@pytest.mark.parametrize("published", ["equal", "older", "of other weights"])
def test_a_conversion_that_is_there_is_left_replaced_or_refused(hub, client, checkpoint, published):
    files = {".gitattributes": GIT_ATTRIBUTES, **files_of(checkpoint)}
    before = dict(files)
    if published != "equal":
        before |= {"README.md": b"---\nlicense: mit\n---\n", "old.py": b"pass"}
    if published == "of other weights":
        record = json.loads(files["conversion.json"])
        before["conversion.json"] = json.dumps(record | {"source": {"sha256": "0" * 64}}).encode()
    there = hub.add_repository("tester/x", before)
    repository = Repository("tester/x")
    if published == "of other weights":
        with pytest.raises(ConversionError, match="--overwrite"):
            repository.publish(checkpoint)
    else:
        said = {"equal": "tester/x: is equal already", "older": "tester/x: published"}[published]
        assert said in repository.publish(checkpoint)
    assert there.commits == ([before, files] if published == "older" else [before])


def test_who_commits_at_the_same_time_is_not_overwritten(hub, client, checkpoint, monkeypatch):
    there = hub.add_repository("tester/x", {".gitattributes": GIT_ATTRIBUTES})
    theirs = {"README.md": b"theirs"}
    repository = Repository("tester/x")
    find = repository.find

    def find_and_be_overtaken():
        info = find()
        there.commit(theirs)
        return info

    monkeypatch.setattr(repository, "find", find_and_be_overtaken)
    with pytest.raises((ConversionError, HfHubHTTPError), match="A commit has happened since"):
        repository.publish(checkpoint)
    assert there.files == theirs


@pytest.mark.slow
def test_a_commit_that_fails_leaves_nothing_to_load_and_can_be_repeated(hub, weights, tmp_path):
    command = (weights, "out", *NUM_HEADS, "--push-to-hub", "tester/x")
    for kind, options in (("status 500", ()), ("cut", ("--overwrite",))):
        hub.faults.append(Fault("POST", "/commit/main", kind))
        assert "127.0.0.1" in conversion_error(hub, tmp_path, *command, *options)  # who it was
        repository = hub.repositories["tester/x"]
        assert repository.commits == [{".gitattributes": GIT_ATTRIBUTES}]
        # The work is not lost
        CrossViTForImageClassification.from_pretrained(tmp_path / "out")
    convert(hub, tmp_path, *command, "--overwrite")
    assert repository.commits[1:] == [{".gitattributes": GIT_ATTRIBUTES, **files_of(tmp_path / "out")}]


@pytest.mark.slow
def test_an_upload_that_never_succeeds_leaves_nothing_to_load(hub, weights, checkpoint, tmp_path):
    # Six times, which is when the client gives up
    hub.faults = [Fault("PUT", "/storage/", "status 500", times=3), Fault("PUT", "/storage/", "cut", times=3)]
    error = conversion_error(hub, tmp_path, weights, "out", *NUM_HEADS, "--push-to-hub", "tester/x")
    assert "tester/x" in error and WEIGHTS in error
    assert not any(fault.times for fault in hub.faults)
    assert hub.repositories["tester/x"].commits == [{".gitattributes": GIT_ATTRIBUTES}]
    assert files_of(tmp_path / "out") == files_of(checkpoint)


def test_hiccups_of_an_upload_are_passed_over(hub, weights, tmp_path):
    hub.faults = [
        Fault("POST", "/preupload/", "status 500"),
        Fault("POST", "/objects/batch", "status 500"),
        Fault("PUT", "/storage/", "cut"),
    ]
    convert(hub, tmp_path, weights, "out", *NUM_HEADS, "--push-to-hub", "tester/x")
    assert not any(fault.times for fault in hub.faults)
    assert hub.repositories["tester/x"].files == {".gitattributes": GIT_ATTRIBUTES, **files_of(tmp_path / "out")}


@pytest.mark.parametrize("which", ["newest", "older"])
def test_variant_comes_from_timm_on_the_hub(hub, tmp_path, which):
    older, newest = timm_files("crossvit_tiny", seed=1), timm_files("crossvit_tiny", seed=2)
    source = hub.add_repository("timm/crossvit_tiny_240.in1k", older)
    source.commit(newest)
    files, commit = (newest, source.hashes[1]) if which == "newest" else (older, source.hashes[0])
    options = [] if which == "newest" else ["--revision", commit]
    output = convert(hub, tmp_path, "crossvit_tiny", "out", *options, "--push-to-hub", "tester/tiny")
    assert "out: crossvit_tiny, 304 tensors" in output
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())["source"]
    assert record["repository"] == "timm/crossvit_tiny_240.in1k"
    assert record["revision"] == commit and len(commit) == 40
    assert record["sha256"] == sha256(files[WEIGHTS]).hexdigest()
    assert_same_weights(tmp_path / "out", files[WEIGHTS])

    # These are the published weights, of which something is known
    card = ModelCard.load(tmp_path / "out" / "README.md").data
    variant = VARIANTS["crossvit_tiny"]
    assert (card.license, card.datasets) == ("apache-2.0", ["ILSVRC/imagenet-1k"])
    assert card.base_model == variant["timm_id"] and card.model_name == "tiny"
    top1, top5 = variant["imagenet_top1"], variant["imagenet_top5"]
    claimed = {(result.metric_type, result.metric_value, result.source_url) for result in card.eval_results}
    assert claimed == {
        ("accuracy", top1["paper"], PAPER),
        ("accuracy", top1["timm"], TIMM_RESULTS),
        ("top_5_accuracy", top5["timm"], TIMM_RESULTS),
    }
    assert hub.repositories["tester/tiny"].files["README.md"] == (tmp_path / "out" / "README.md").read_bytes()


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("crossvit_tiny", ["--revision", "v0"], "timm/crossvit_tiny_240.in1k has no revision 'v0'"),
        ("crossvit_9", [], "no repository of that name on the Hub that you may read"),
    ],
    ids=["revision", "repository"],
)
def test_a_source_that_is_not_there(hub, tmp_path, source, options, message):
    hub.add_repository("timm/crossvit_tiny_240.in1k", {"config.json": b"{}"})
    assert message in conversion_error(hub, tmp_path, source, "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_download_is_resumed_after_the_process_was_killed(hub, tmp_path):
    files = timm_files("crossvit_tiny")
    hub.add_repository("timm/crossvit_tiny_240.in1k", files)
    # Half of 28 MB: the client writes what it has by 10 MiB and asks for the rest, again and again
    hub.faults = [Fault("GET", f"/resolve/.*{WEIGHTS}", "cut", times=6)]

    def ranges() -> list[str | None]:
        return [wanted for method, path, wanted in hub.requests if method == "GET" and path.endswith(WEIGHTS)]

    process = start(hub, tmp_path, CONVERSION / "convert_crossvit_to_hf.py", "crossvit_tiny", "out")
    while len(ranges()) < 2 and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert ranges()[0] is None and not (tmp_path / "out").exists()

    hub.faults.clear()
    hub.requests.clear()
    convert(hub, tmp_path, "crossvit_tiny", "out")
    assert ranges() == [f"bytes={10 * 2**20}-"]
    assert_same_weights(tmp_path / "out", files[WEIGHTS])


@pytest.mark.slow
def test_publish_all_goes_on_where_it_stopped(hub, tmp_path):
    command = ("--namespace", "tester", "--variants", "crossvit_tiny", "crossvit_9")
    hub.add_repository("timm/crossvit_tiny_240.in1k", timm_files("crossvit_tiny"))
    error = error_of(hub, tmp_path, "publish_all.py", *command)
    assert error == "error: 1 of 2 are not published: crossvit_9"
    tiny = hub.repositories["tester/crossvit_tiny"]
    assert len(tiny.commits) == 2 and "tester/crossvit_9" not in hub.repositories

    hub.add_repository("timm/crossvit_9_240.in1k", timm_files("crossvit_9"))
    output = run(hub, tmp_path, CONVERSION / "publish_all.py", *command)
    assert "tester/crossvit_tiny: is equal already" in output and "tester/crossvit_9: published" in output
    output = run(hub, tmp_path, CONVERSION / "publish_all.py", *command)
    assert output.count("is equal already") == 2
    for name in ("crossvit_tiny", "crossvit_9"):
        repository = hub.repositories[f"tester/{name}"]
        assert len(repository.commits) == 2
        assert json.loads(repository.files["conversion.json"])["variant"] == name


def test_usage_in_the_card_runs_without_the_package(hub, checkpoint, image, tmp_path):
    hub.add_repository("tester/x", files_of(checkpoint))
    (usage,) = re.findall(r"```python\n(.*?)```", (checkpoint / "README.md").read_text(), re.DOTALL)
    assert re.fullmatch(r"LABEL_[0-4]\n", run_without_package(hub, tmp_path, usage))


@pytest.mark.slow
def test_what_the_trainer_pushes_names_where_it_is_from(hub, checkpoint, tmp_path):
    hub.add_repository("tester/x", files_of(checkpoint))
    run(
        hub,
        tmp_path,
        "-c",
        textwrap.dedent(
            """
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
        ),
    )
    card = ModelCard(hub.repositories["tester/tuned"].files["README.md"].decode())
    assert card.data.base_model == "tester/x" and "generated_from_trainer" in card.data.tags
    assert not card.data.eval_results and "ImageNet" not in card.content
    run_without_package(
        hub,
        tmp_path,
        """
        import torch
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        AutoImageProcessor.from_pretrained("tester/tuned", trust_remote_code=True)
        model = AutoModelForImageClassification.from_pretrained("tester/tuned", trust_remote_code=True)
        torch.save(model.state_dict(), "loaded.pt")
        """,
    )
    tuned, loaded = (torch.load(tmp_path / name, weights_only=True) for name in ("tuned.pt", "loaded.pt"))
    published = load_file(checkpoint / WEIGHTS)
    assert tuned.keys() == loaded.keys() == published.keys()
    assert all(torch.equal(tuned[name], loaded[name]) for name in tuned)
    assert not all(torch.equal(tuned[name], published[name]) for name in tuned)
