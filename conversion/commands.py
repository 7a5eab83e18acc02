"""What the commands share: errors of one line, and folders that appear whole or not at all."""

import os
import shutil
import signal
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError, HTTPError
from safetensors import SafetensorError


class ConversionError(Exception):
    """What the user did, gave or met, in one line."""


# What can go wrong outside this program: the user's input, the network, the Hub, the disk
EXPECTED_ERRORS = (ConversionError, HTTPError, OSError, SafetensorError)


def some(names: Iterable[object], limit: int = 3) -> str:
    """The first of many names for a message."""
    words = [str(name) for name in names]
    return ", ".join(words[:limit]) + (f" and {len(words) - limit} more" if len(words) > limit else "")


def run(command: Callable[[], None]):
    """Runs a command; ends the process with status 1 and one line on stderr for what went wrong, 130 for Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that folders begun are removed
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(fail("interrupted", 130))
    except EXPECTED_ERRORS as error:
        sys.exit(fail(in_one_line(error)))


def in_one_line(error: Exception) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError):
        return f"the connection to {error.request.url.host} failed, try again later: {message}"
    return message


def fail(message: str, status: int = 1) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


def check_output(output: Path, overwrite: bool):
    """Raises `ConversionError` for an output that cannot or must not be written, before any work is done."""
    if os.path.lexists(output) and not overwrite:
        raise ConversionError(f"{output} exists: choose another place or pass --overwrite")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ConversionError(f"{output} is no folder and is not overwritten")
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConversionError(f"{output} cannot be written: {parent} is no folder that you can write to")


@contextmanager
def whole_folder(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """
    Gives an empty folder beside `output` that takes its place when the block ends without an exception, and vanishes
    otherwise. What was at `output` stays until then.

    Raises:
        `ConversionError`: when `output` exists and `overwrite` is `False`.
    """
    output = output.absolute()
    check_output(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.incomplete")
    try:
        folder.mkdir()
        yield folder
        for path in folder.iterdir():
            path.chmod(0o666 & ~current_umask())  # safetensors makes files for the owner's eyes alone
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # on the disk before the name is, for a power cut
        check_output(output, overwrite)  # somebody may have been faster
        if output.exists():
            replaced = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.replaced")
            output.rename(replaced)
            try:
                folder.rename(output)
            except BaseException:
                replaced.rename(output)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def current_umask() -> int:
    umask = os.umask(0o022)
    os.umask(umask)
    return umask
