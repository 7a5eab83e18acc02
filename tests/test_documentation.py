"""What the pages and docstrings say works: code runs, the options in commands exist, and links lead somewhere."""

import doctest
import inspect
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import timm
import torch
from quickstart import write_digits
from reference import VARIANTS
from reference_files import timm_repository
from torch.utils.flop_counter import FlopCounterMode

import crossvit
from crossvit import CrossViTConfig, CrossViTForImageClassification, CrossViTImageProcessor
from crossvit.interpretability import AttentionMaps, attention_iou, attention_rollout, draw_attention
from crossvit.timm_checkpoints import ARCHITECTURES


ROOT = Path(__file__).parents[1]
FOLDERS = ("", "conversion", "examples", "tests", "tests/benchmarks")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for folder in FOLDERS for path in (ROOT / folder).glob("*.md")
}
NOTEBOOK = json.loads((ROOT / "examples" / "crossvit.ipynb").read_text())
NOTEBOOK_TEXT = "\n".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")
SCRIPTS = [path for folder in ("conversion", "examples") for path in (ROOT / folder).glob("*.py")]
SCRIPT_IN_COMMAND = re.compile(r"((?:conversion|examples|tests/benchmarks|tests/transformers_common)/\w+\.py)(.*)")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A Git repository that ignores what this one does."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    subprocess.run(["git", "init", "-q", tmp_path / "checkout"], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path / "checkout")
    return tmp_path / "checkout"


def test_readme_examples_run(hub, checkout, tmp_path):
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("README.md", "python")))
    names = set(re.findall(r"timm/(crossvit_\w+)\.in1k", script.read_text()))
    assert names
    for name in names:
        hub.add_repository(f"timm/{name}.in1k", timm_repository(timm.create_model(name)))
    PIL.Image.effect_noise((300, 260), 90).convert("RGB").save(checkout / "image.jpg")
    process = subprocess.run(
        [sys.executable, script],
        cwd=checkout,
        env={**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    status = ["git", "-C", checkout, "status", "--porcelain"]
    untracked = subprocess.run(status, capture_output=True, text=True, check=True).stdout.split("\n")
    assert untracked == ["?? .gitignore", "?? image.jpg", ""]  # nothing that the examples have written


@pytest.fixture
def names_from_the_text(tmp_path, monkeypatch) -> dict[str, object]:
    """What the text around the code introduces: the quickstart's model in its folder, two images, a batch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = CrossViTConfig(
        image_size=(24, 20),
        patch_size=(6, 10),
        embed_dim=(24, 32),
        num_heads=(2, 4),
        depth=((1, 1, 0),),
        id2label={digit: str(digit) for digit in range(10)},
        label2id={str(digit): digit for digit in range(10)},
    )
    model = CrossViTForImageClassification(config)
    processor = CrossViTImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    for folder in ("outputs/quickstart", "my-crossvit", "outputs/pairs"):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    for documented in (CrossViTConfig, CrossViTForImageClassification, CrossViTImageProcessor):
        monkeypatch.setattr(documented, "_auto_class", documented._auto_class)  # which a page registers
    write_digits(Path("outputs/data"))
    rows = {"path": ["a", "b", "c"], "embedding": torch.randn(3, 56).tolist(), "error": [None, None, "cannot be read"]}
    datasets.Dataset.from_dict(rows).to_parquet("outputs/labels/part.parquet")
    photo, depth_image = (PIL.Image.fromarray(np.full((30, 30, 3), value, np.uint8)) for value in (50, 200))
    return {
        "AttentionMaps": AttentionMaps,
        "attention_iou": attention_iou,
        "attention_rollout": attention_rollout,
        "depth_image": depth_image,
        "draw_attention": draw_attention,
        "labels": torch.tensor([3, 7]),
        "masks": torch.rand(2, 24, 24),
        "model": model,
        "photo": photo,
        "pixel_values": torch.randn(2, 3, 24, 24),
        "processor": processor,
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(set(PAGES) - {"README.md"}))
def test_examples_of_other_pages_run(page, names_from_the_text):
    for block in blocks(page, "python"):
        names = dict(names_from_the_text)
        exec(compile(block, f"{page}: {block[:60]}", "exec"), names)
        for name in [name for name in names if name.startswith("test_")]:
            names[name]()


def commands(text: str) -> list[tuple[str, list[str]]]:
    """The scripts of this repository in commands, in code blocks and in lines of text, with their options."""
    code = re.findall(r"^```bash\n(.*?)^```|`([^`\n]+)`|^ {4}(python .*)$", text, flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join("".join(groups) for groups in code).replace("\\\n", " ").splitlines()
    matches = [match for line in lines if (match := SCRIPT_IN_COMMAND.search(line))]
    return [(match[1], OPTION.findall(match[2].partition(" #")[0])) for match in matches]


@pytest.fixture
def options_of(monkeypatch, capsys) -> Callable[[str], set[str]]:
    """The options in the help of a script."""
    known: dict[str, set[str]] = {}

    def read_help(script: str) -> set[str]:
        if script not in known:
            monkeypatch.setattr(sys, "argv", [script, "--help"])
            capsys.readouterr()
            with pytest.raises(SystemExit, match="0"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            known[script] = set(OPTION.findall(capsys.readouterr().out))
        return known[script]

    return read_help


def test_commands_have_scripts_and_options_that_exist(options_of):
    texts = PAGES | {path.relative_to(ROOT).as_posix(): path.read_text() for path in SCRIPTS}
    texts["examples/crossvit.ipynb"] = NOTEBOOK_TEXT
    documented = [(page, *command) for page, text in texts.items() for command in commands(text)]
    assert len(documented) > 40
    for page, script, options in documented:
        assert (ROOT / script).is_file(), f"{page}: there is no {script}"
        unknown = set(options) - options_of(script) if options else None
        assert not unknown, f"{page}: {script} has no options {unknown}"


def test_what_documented_commands_read_is_written_by_others():
    """Folders below outputs/ come from a command or the code of a page, so a reader can run all commands."""
    text = "\n".join([*PAGES.values(), NOTEBOOK_TEXT, *(path.read_text() for path in SCRIPTS)]).replace("\\\n", " ")
    path = r'\s*"?(outputs/[\w/.-]+)'
    written = re.findall(rf"(?:--output_dir|--output|--write_digits|save_pretrained\(|Path\(){path}", text)
    read = set(re.findall(rf"(?:--model|--data|--config|\.py){path}", text))
    assert len(read) > 8
    written.append("outputs/quickstart")  # by default
    assert not {path for path in read if not path.startswith(tuple(written))}


def test_table_of_variants():
    """Parameters, multiply-adds and image sizes are those of the models, accuracies those of variants.json."""
    columns = r"`(\w+)` \| ([\d.]+) M \| ([\d.]+) G \| (\d+), (\d+) \| ([\d.]+) \| ([\d.]+)"
    rows = re.findall(rf"^\| {columns} \|", PAGES["README.md"], flags=re.MULTILINE)
    assert [name for name, *_ in rows] == list(VARIANTS)
    for name, parameters, multiply_adds, *numbers in rows:
        config = CrossViTConfig(**ARCHITECTURES[VARIANTS[name]["architecture"]], num_labels=1000)
        with torch.device("meta"):
            model: Any = CrossViTForImageClassification._from_config(config, attn_implementation="eager").eval()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(torch.empty(1, 3, *config.image_sizes[0]))
        assert parameters == f"{model.num_parameters() / 1e6:.1f}", name
        assert multiply_adds == f"{counter.get_total_flops() / 2e9:.1f}", name
        top1 = VARIANTS[name]["imagenet_top1"]
        sizes = [str(size) for size, _ in config.image_sizes]
        assert numbers == [*sizes, f"{top1['paper']:.1f}", f"{top1['timm']:.1f}"], name


def test_every_script_is_documented():
    scripts = {path.name for path in SCRIPTS if path.parent.name == "examples"}
    headings = re.findall(r"^## (\w+\.py)$", PAGES["examples/README.md"], flags=re.MULTILINE)
    assert set(headings) == scripts


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "examples/crossvit.ipynb"])
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", PAGES.get(page, NOTEBOOK_TEXT), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    for target in targets:
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: there is no {target}"
        assert not anchor or anchor in anchors(file.read_text()), f"{page}: {file.name} has no heading #{anchor}"


def test_what_documented_commands_write_is_ignored(checkout):
    texts = [*PAGES.values(), *(script.read_text() for script in SCRIPTS)]
    options = r"(?:--output_dir|--output|--space|--write_digits) (?!\w+://)([a-z][\w./-]*)"
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
