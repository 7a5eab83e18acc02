"""
Runs the common tests of the installed Transformers release on CrossViT:

    python tests/transformers_common/run.py [--cache FOLDER] [arguments of pytest, such as -n 2 or -k save]

They are part of its source distribution only, which pip downloads once into the cache folder. A skipped test fails the
run too, unless `ALLOWED_SKIPS` says why it may be skipped: what our classes declare must not be a reason.
"""

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path


HERE = Path(__file__).resolve().parent
# Files of the repository of Transformers that its tests open and that are not distributed
STAND_INS = {
    "src/transformers/__init__.py": "",
    "tests/__init__.py": "",
}

# What may be skipped ("name of the test: reason") and why: the environment or the kind of model
ALLOWED_SKIPS = {
    r": test requires |parallel tests require": "an accelerator or a library that is not installed",
    r"spawn one process per device|mixin tests are CPU-only": "the tests of sharding run on the CPU only",
    r"inputs_embeds|language modeling head|test_resize_embeddings": "no text, hence no vocabulary",
    r"take a cache as input": "nothing is generated, token by token",
    r"RoPE|sliding window": "position embeddings are learned, attention is global",
    r"grouped_mm|[Ee]xpert|MoE|router_logits": "no experts",
    r"dispatch_composite_models: |not (a )?composite|No subconfigs": "one model, not composed of several",
    r"_keep_in_fp32_modules": "as in ViT, nothing must stay in float32",
    r"No conversion found": "no checkpoints with older names",
    r"dict size or list image_mean|No validation found for `preprocess`": "so are all processors of Transformers 5",
}


def get_suite(cache: Path) -> Path:
    """The folder whose `tests` package is that of the installed release, downloaded unless it is there."""
    version = importlib.metadata.version("transformers")
    suite = cache / f"transformers-{version}"
    if not suite.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = f"pip download --quiet --no-deps --no-binary transformers transformers=={version} --dest"
            subprocess.run([sys.executable, "-m", *command.split(), folder], check=True)
            (archive,) = Path(folder).glob("transformers-*.tar.gz")
            with tarfile.open(archive) as tar:
                members = [member for member in tar if member.name.split("/")[1:2] == ["tests"]]
                # Python 3.11 has the filter since 3.11.4
                tar.extractall(
                    folder, members=members, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
                )
            for name, text in STAND_INS.items():
                file = Path(folder, suite.name, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
            (Path(folder) / suite.name).rename(suite)
    return suite


class SkipCounter:
    """Plugin of pytest that counts the skipped tests by reason and by why it is allowed, `None` if it is not."""

    def __init__(self):
        self.skips = Counter()

    def pytest_runtest_logreport(self, report):
        if report.skipped:
            test, reason = report.nodeid.split("::")[-1], report.longrepr[2].removeprefix("Skipped: ")
            allowed = (why for pattern, why in ALLOWED_SKIPS.items() if re.search(pattern, f"{test}: {reason}"))
            # One line for what differs in the name of a class or task only
            reason = re.sub(r"^.* is skipped: |<class .*?>|\bCrossViT\w+|`\w+(-\w+)+`", "...", reason)
            self.skips[reason, next(allowed, None)] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=HERE.parents[1] / ".cache", help="where the release is kept")
    args, pytest_args = parser.parse_known_args()

    suite = get_suite(args.cache.resolve())
    # Read at the imports of this process and of those that it starts; such small models gain nothing from threads
    for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "RUN_SLOW"):
        os.environ.setdefault(name, "1")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(suite), str(HERE), os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, str(suite))

    import pytest

    skips = SkipCounter()
    # Our own options are strict about markers, which these tests leave to a conftest.py that is not distributed
    options = ["-o", "addopts=", "-W", "ignore::pytest.PytestUnknownMarkWarning"]
    code = pytest.main([str(HERE / "crossvit_common.py"), *options, *pytest_args], plugins=[skips])

    print("\nSkipped:")
    for (reason, why), count in skips.skips.most_common():
        print(f"{count:4} {reason} ({why or 'NOT ALLOWED, see ALLOWED_SKIPS'})")
        code = code or why is None
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
