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
"""What commands share: errors of one line, and an end without a trace for Ctrl-C."""

import argparse
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import HfArgumentParser

from crossvit.configuration_crossvit import CrossViTConfig
from crossvit.image_processing_crossvit import CrossViTImageProcessor
from crossvit.modeling_crossvit import CrossViTForImageClassification
from crossvit.training.errors import CommandError
from crossvit.training.image_sizes import make_image_processor


QUICKSTART = Path("outputs/quickstart")


def make_parser(groups: Any, description: str, defaults: dict[str, Any]) -> HfArgumentParser:
    """
    The parser of a command.

    Args:
        groups (`list[type]`): dataclasses of its options.
        description (`str`): what it does.
        defaults (`dict[str, Any]`): of options, where they are others than those of the dataclasses.
    """
    parser = HfArgumentParser(groups, description=description, usage="%(prog)s [options]\n%(prog)s --help")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(**defaults)
    return parser


def parse(parser: HfArgumentParser) -> tuple[Any, ...]:
    """The options of this command, as dataclasses. Values that do not fit each other end it as wrong options do."""
    parser.parse_args()  # The next line would report an unknown option by a trace
    try:
        return parser.parse_args_into_dataclasses(look_for_args_file=False)
    except (TypeError, ValueError) as error:
        parser.error(reason(error))


def read_config(name: str, **options) -> CrossViTConfig:
    """The configuration of a CrossViT, in a checkpoint of this package or of timm."""
    model_type = CrossViTConfig.get_config_dict(name)[0].get("model_type")
    if model_type != CrossViTConfig.model_type:
        raise ValueError(f"a {model_type!r}, not a CrossViT")
    return CrossViTConfig.from_pretrained(name, **options)


def load_checkpoint(name: str, dtype: Any = None, **options) -> tuple[CrossViTForImageClassification, Any]:
    """
    A classifier and its image processor.

    Args:
        name (`str`): folder or repository on the Hub, of this package or of timm.
        dtype (`torch.dtype`, *optional*): of the weights; as saved by default.
        options (`dict[str, Any]`, *optional*): of the configuration.

    Raises:
        `CommandError`: if there is no such CrossViT.
    """
    try:
        config = read_config(name, **options)
        model = CrossViTForImageClassification.from_pretrained(name, config=config, dtype=dtype or "auto")
        return model, CrossViTImageProcessor.from_pretrained(name)
    # Of many types: a typo, no network, a file that is missing, damaged or of another model
    except Exception as error:
        raise CommandError(f"{name}: no CrossViT in such a folder or on the Hub ({reason(error)})") from error


def load_config(name: str, **options) -> tuple[CrossViTConfig, Any]:
    """
    The configuration of a model to train from scratch, and its image processor: the one beside it, or else one of its
    size as in the paper.

    Args:
        name (`str`): folder, file or repository on the Hub.
        options (`dict[str, Any]`, *optional*): of the configuration.

    Raises:
        `CommandError`: if there is no configuration of a CrossViT for RGB images.
    """
    try:
        config = read_config(name, **options)
        if config.num_channels != 3:
            raise ValueError(f"images of {config.num_channels} channels")
        config.validate_architecture()  # with the options, which come after its own validation
        try:
            processor = CrossViTImageProcessor.from_pretrained(name)
        except OSError:
            processor = make_image_processor(config)
    except Exception as error:  # of many types, as above
        raise CommandError(f"{name}: no configuration of a CrossViT for RGB images ({reason(error)})") from error
    config.name_or_path = ""  # the weights will come from nowhere
    return config, processor


def quickstart_model(script: Path) -> str:
    """
    The folder of the quickstart's model, which is trained if need be.

    Args:
        script (`Path`): `quickstart.py`. To import it, its folder would have to hide the library evaluate.
    """
    if not (QUICKSTART / "model.safetensors").is_file():
        print(f"No model in {QUICKSTART} yet: the quickstart trains it", flush=True)
        QUICKSTART.mkdir(parents=True, exist_ok=True)
        runpy.run_path(str(script))["train"](QUICKSTART, seed=0)
    return str(QUICKSTART)


def reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def run(main: Callable[[], None]) -> None:
    """Runs a command; ends the process with status 1 and one line for what went wrong outside it, 130 for Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except (CommandError, HfHubHTTPError, OSError, SafetensorError) as error:
        # The error of a worker process has its trace in the message, and says what went wrong in the last line
        message = reason(error)
        if message.startswith("Caught "):  # in a process that reads images; its trace ends with the error itself
            message = str(error).strip().splitlines()[-1].partition(": ")[2]
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


__all__ = ["QUICKSTART", "load_checkpoint", "load_config", "make_parser", "parse", "quickstart_model", "run"]
