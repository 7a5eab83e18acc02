"""
Converts and publishes all eleven checkpoints.

    python conversion/publish_all.py --namespace NAME

They become NAME/crossvit_tiny, ..., NAME/crossvit_18_dagger_384. What is on the Hub already and equal is skipped, so
that the same command goes on where it stopped. One that fails does not stop the others; the command then ends with
status 1.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from commands import EXPECTED_ERRORS, ConversionError, in_one_line, run
from convert_crossvit_to_hf import convert
from publishing import Repository, add_repository_options, check_namespace
from reference_checkpoint import read_reference
from tqdm import tqdm
from variants import VARIANTS


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--namespace", required=True, help="the user or organization on the Hub")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="only these")
    parser.add_argument("--overwrite", action="store_true", help="replace repositories that have other files")
    add_repository_options(parser)
    # For the sources, which are the published ones
    parser.set_defaults(
        revision=None, filename=None, sha256=None, entry=None, num_heads=None, image_size=None, patch_size=None
    )
    options = parser.parse_args()

    check_namespace(f"{options.namespace}/{options.variants[0]}")
    failed = []
    with tempfile.TemporaryDirectory(prefix="crossvit-") as folder:
        for name in tqdm(options.variants, desc="checkpoints"):
            repo_id, output = f"{options.namespace}/{name}", Path(folder) / name
            try:
                repository = Repository(repo_id, options.private, options.overwrite)
                convert(read_reference(name, options), output, repo_id=repo_id)
                tqdm.write(repository.publish(output))
            except EXPECTED_ERRORS as error:
                tqdm.write(f"{repo_id}: failed, {in_one_line(error)}")
                failed.append(name)
            finally:
                shutil.rmtree(output, ignore_errors=True)
    if failed:
        raise ConversionError(f"{len(failed)} of {len(options.variants)} are not published: {', '.join(failed)}")


if __name__ == "__main__":
    run(main)
