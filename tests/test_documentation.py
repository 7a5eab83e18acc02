"""The README's and the docstrings' examples run, in the order in which a reader meets them."""

import doctest
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import timm
from reference_files import timm_repository

import crossvit


README = Path(__file__).parents[1] / "README.md"


def test_readme_examples_run(hub, tmp_path):
    model = timm.create_model("crossvit_15_dagger_240")
    hub.add_repository("timm/crossvit_15_dagger_240.in1k", timm_repository(model))
    PIL.Image.effect_noise((300, 260), 90).convert("RGB").save(tmp_path / "image.jpg")
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 5
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    process = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[0] in crossvit.CrossViTConfig.from_pretrained(tmp_path / "my-crossvit").label2id
    assert (tmp_path / "with-code" / "modeling_crossvit.py").is_file()


@pytest.mark.parametrize("name", crossvit.__all__)
def test_docstring_examples_run(name):
    documented = getattr(crossvit, name)
    docstrings = [inspect.getdoc(documented), inspect.getdoc(documented.__dict__.get("forward"))]
    examples = [docstring.replace("```python", "").replace("```", "") for docstring in docstrings if docstring]
    assert examples, f"{name} has no docstring"
    for example in examples:
        test = doctest.DocTestParser().get_doctest(example, {}, name, None, None)
        assert doctest.DocTestRunner().run(test).failed == 0
