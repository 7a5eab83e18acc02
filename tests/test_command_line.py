"""Wrong options cost little time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import benchmark
from examples_in_process import EXAMPLES


@pytest.mark.parametrize(
    "script",
    [
        *(
            EXAMPLES / f"{name}.py"
            for name in ("app", "classify", "explain", "export", "quickstart", "retrieve", "segment")
        ),
        Path(benchmark.__file__),
    ],
    ids=lambda script: script.stem,
)
def test_options_are_parsed_before_torch_is_imported(script):
    code = """
import runpy, sys
sys.modules["torch"] = None  # so that importing it fails
sys.argv[0] = sys.argv.pop(1)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    process = subprocess.run(
        [sys.executable, "-c", code, script, "--typo"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2 and f"usage: {script.name}" in process.stderr, process.stderr
