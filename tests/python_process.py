"""Python in a process of its own, where nothing is imported or registered yet."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def run_python(code: str, folder: Path) -> str:
    """Runs `code` in `folder`, without network and with empty caches, and returns what it prints."""
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout
