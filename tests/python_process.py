"""Python in a separate process, where nothing is imported or registered yet."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def run_process(folder: Path, *arguments: object, **environment: str) -> str:
    """Runs Python in `folder`, without network unless `environment` provides one, and returns what it prints."""
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def run_python(code: str, folder: Path, **environment: str) -> str:
    """As `run_process`, for a piece of code."""
    return run_process(folder, "-c", textwrap.dedent(code), **environment)
