"""The notebook of examples/: its cells run in order, on a small model, and its outputs are stored."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from crossvit import CrossViTConfig, CrossViTForImageClassification, CrossViTImageProcessor


NOTEBOOK = Path(__file__).parents[1] / "examples" / "crossvit.ipynb"
CODE_CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_stored_outputs_are_of_one_run():
    for cell in CODE_CELLS:
        assert all(output["output_type"] in ("stream", "execute_result") for output in cell["outputs"])
    counts = [cell["execution_count"] for cell in CODE_CELLS]
    assert counts == list(range(1, len(counts) + 1))
    assert NOTEBOOK.stat().st_size < 200_000


@pytest.mark.slow
def test_cells_run(tmp_path, monkeypatch, capsys):
    sizes: dict[str, Any] = {"image_size": (24, 20), "patch_size": (6, 10), "embed_dim": (24, 32), "num_heads": (2, 4)}
    config = CrossViTConfig(**sizes, depth=((1, 1, 0),), num_labels=10)
    CrossViTForImageClassification(config).save_pretrained(tmp_path / "small")
    size = {"height": 24, "width": 24}
    CrossViTImageProcessor(size={"shortest_edge": 24}, crop_size=size).save_pretrained(tmp_path / "small")
    monkeypatch.setenv("CROSSVIT_CHECKPOINT", str(tmp_path / "small"))
    monkeypatch.delenv("CROSSVIT_IMAGE", raising=False)
    monkeypatch.chdir(tmp_path)

    cells = ["".join(cell["source"]) for cell in CODE_CELLS]
    script = tmp_path / "notebook.py"
    script.write_text("\n".join(cell for cell in cells if "%pip" not in cell))
    variables: dict[str, Any] = runpy.run_path(str(script))
    assert variables["maps"].rollout().on_image().shape == variables["image"].size[::-1]
    assert set(variables["model"].config.id2label.values()) == {"even", "odd"}
    assert "held-out images: " in capsys.readouterr().out
    assert variables["PUSH_TO"] is None
