# Copyright 2026 The CrossViT for Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The command line: options, models by their names, errors on one line, and Ctrl-C without a traceback."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CommandError, one_line


# These are imported where they are needed: a typo in an option then costs little time
if TYPE_CHECKING:
    from transformers import HfArgumentParser

    from crossvit import CrossViTConfig, CrossViTForImageClassification


DEFAULT_MODEL = "timm/crossvit_15_dagger_240.in1k"
DTYPES = ("float32", "bfloat16", "float16")


def positive_int(text: str) -> int:
    """The value of an option that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options of `load_model` in inference.py, and the size of batches."""
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help="folder or Hub ID of a CrossViT; default: %(default)s")
    add("--batch_size", type=positive_int, default=32, help="images per forward pass; default: %(default)s")
    add("--dtype", choices=DTYPES, help="data type of the model; default: that of the checkpoint")


def add_predict_options(parser: argparse.ArgumentParser) -> None:
    """The options of `load_model` and `predict` in inference.py."""
    add_model_options(parser)
    workers = "processes that read images; default: with a GPU one per core, at most 8, else none"
    parser.add_argument("--num_workers", type=int, help=workers)
    parser.add_argument("--compile", action="store_true", help="compile the model first, worthwhile for many images")


def make_parser(groups: Any, description: str, defaults: dict[str, Any]) -> "HfArgumentParser":
    """The parser of a command: the options are those of the dataclasses, some with other defaults."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(groups, description=description, usage="%(prog)s [options]\n%(prog)s --help")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(**defaults)
    return parser


def parse(parser: "HfArgumentParser") -> tuple[Any, ...]:
    """The options of this command, as dataclasses. Values that do not fit each other end it as wrong options do."""
    parser.parse_args()  # the next line would report an unknown option by a trace
    try:
        return parser.parse_args_into_dataclasses(look_for_args_file=False)
    except (TypeError, ValueError) as error:
        parser.error(one_line(error))


def read_config(name: str, **options) -> "CrossViTConfig":
    """The configuration of a CrossViT, in a checkpoint of this package or of timm."""
    from crossvit import CrossViTConfig

    model_type = CrossViTConfig.get_config_dict(name)[0].get("model_type")
    if model_type != CrossViTConfig.model_type:
        raise ValueError(f"a {model_type!r}, not a CrossViT")
    return CrossViTConfig.from_pretrained(name, **options)


def load_checkpoint(name: str, dtype: Any = None, **options) -> tuple["CrossViTForImageClassification", Any]:
    """
    A classifier, from a folder or the Hub, of this package or of timm, and its image processor. The weights have the
    type that they were saved in, or `dtype`; `options` are of the configuration. Raises a `CommandError`.
    """
    import huggingface_hub.utils
    from transformers.utils.logging import disable_progress_bar

    from crossvit import CrossViTForImageClassification, CrossViTImageProcessor

    disable_progress_bar()  # loading takes a moment
    huggingface_hub.utils.enable_progress_bars()  # a download takes longer
    try:
        config = read_config(name, **options)
        model = CrossViTForImageClassification.from_pretrained(name, config=config, dtype=dtype or "auto")
        return model, CrossViTImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:  # a typo, no network, another model
        raise CommandError(
            f"--model {name}: not a CrossViT checkpoint, locally or on the Hub ({one_line(error)})"
        ) from error


def load_config(name: str, **options) -> tuple["CrossViTConfig", Any]:
    """
    The configuration of a model to train from scratch, from a folder, a file or the Hub, and its image processor: the
    one beside it, or else one of its size as in the paper. Raises a `CommandError`.
    """
    from crossvit import CrossViTImageProcessor
    from crossvit.training.image_sizes import make_image_processor

    try:
        config = read_config(name, **options)
        if config.num_channels != 3:
            raise ValueError(f"for images of {config.num_channels} channels")
        config.validate_architecture()  # with the options, which come after its own validation
    except (OSError, ValueError) as error:  # as above
        raise CommandError(
            f"--config {name}: no configuration of a CrossViT for RGB images ({one_line(error)})"
        ) from error
    try:
        processor = CrossViTImageProcessor.from_pretrained(name)
    except OSError:
        processor = make_image_processor(config)
    config.name_or_path = ""  # the model will be trained from scratch
    return config, processor


def run_command(main: Callable[[], None]) -> None:
    """
    Runs a command. What its user did wrong (`CommandError`, which is a `ValueError`, or `OSError`) ends the process
    with status 1 and one line, Ctrl-C with status 130; other errors have their trace.
    """
    try:
        main()
    except (OSError, ValueError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
