"""The README's and the docstrings' examples run, in the order in which a reader meets them."""

import doctest
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import timm
from reference_files import timm_repository

import crossvit


ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A Git repository that ignores what this one does."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    subprocess.run(["git", "init", "-q", tmp_path / "checkout"], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path / "checkout")
    return tmp_path / "checkout"


def test_readme_examples_run(hub, checkout, tmp_path):
    model = timm.create_model("crossvit_15_dagger_240")
    hub.add_repository("timm/crossvit_15_dagger_240.in1k", timm_repository(model))
    PIL.Image.effect_noise((300, 260), 90).convert("RGB").save(checkout / "image.jpg")
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 5
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    process = subprocess.run(
        [sys.executable, script],
        cwd=checkout,
        env={**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[0] in crossvit.CrossViTConfig.from_pretrained(checkout / "my-crossvit").label2id
    assert (checkout / "with-code" / "modeling_crossvit.py").is_file()
    status = ["git", "-C", checkout, "status", "--porcelain"]
    untracked = subprocess.run(status, capture_output=True, text=True, check=True).stdout.split("\n")
    assert untracked == ["?? .gitignore", "?? image.jpg", ""]  # nothing that the examples have written


def test_what_documented_commands_write_is_ignored(checkout):
    texts = [README.read_text(), (ROOT / "conversion" / "README.md").read_text()]
    texts += [script.read_text() for folder in ("examples", "conversion") for script in (ROOT / folder).glob("*.py")]
    options = r"(?:--output_dir|--output|--space) ([a-z][\w./-]*)"
    arguments = r"python conversion/convert_\w+\.py \S+ \"?([a-z][\w./-]*)"
    paths = {path for text in texts for pattern in (options, arguments) for path in re.findall(pattern, text)}
    assert {"outputs/photos", "my-space", "labels.csv", "checkpoints/crossvit_15", "my-timm-crossvit"} <= paths
    for path in paths:
        if "." not in path:  # patterns for folders match only folders
            (checkout / path).mkdir(parents=True, exist_ok=True)
    command = ["git", "-C", checkout, "check-ignore", *paths]
    assert set(subprocess.run(command, capture_output=True, text=True).stdout.split()) == paths


@pytest.mark.parametrize("name", crossvit.__all__)
def test_docstring_examples_run(name):
    documented = getattr(crossvit, name)
    docstrings = [inspect.getdoc(documented), inspect.getdoc(documented.__dict__.get("forward"))]
    examples = [docstring.replace("```python", "").replace("```", "") for docstring in docstrings if docstring]
    assert examples, f"{name} has no docstring"
    for example in examples:
        test = doctest.DocTestParser().get_doctest(example, {}, name, None, None)
        assert doctest.DocTestRunner().run(test).failed == 0
