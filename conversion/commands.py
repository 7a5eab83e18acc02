"""What the commands share: errors of one line, and folders that appear whole or not at all."""

import argparse
import io
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

# What the folders that these commands make contain, at least one of them
OUTPUT_FILES = {"config.json", "model.pth"}


def some(names: Iterable[object], limit: int = 3) -> str:
    """The first of many names for a message, which they must not make long or unreadable."""
    words = [str(name) if str(name).isprintable() else ascii(name) for name in names]
    words = [word if len(word) <= 100 else f"{word[:100]}..." for word in words]
    return ", ".join(words[:limit]) + (f" and {len(words) - limit} more" if len(words) > limit else "")


def user_path(text: str) -> Path:
    """A path as a user writes it in an option, `~` included."""
    try:
        if text:
            return Path(text).expanduser()
    except RuntimeError as error:  # no such user
        raise ConversionError(f"{text}: {error}") from error
    raise ConversionError("an empty path names nothing")


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def run(command: Callable[[], None]):
    """Runs a command; ends the process with status 1 and one line on stderr for what went wrong, 130 for Ctrl-C."""
    received: list[int] = []

    def interrupt(number: int, frame: object):
        received.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for names of all kinds
    try:
        command()
    except (Exception, KeyboardInterrupt) as error:
        if received:  # which libraries may have turned into an exception of theirs
            sys.exit(fail("interrupted", 128 + received[0]))
        if isinstance(error, EXPECTED_ERRORS):
            sys.exit(fail(in_one_line(error)))
        sys.exit(fail(f"unexpected {type(error).__name__}, please report it: {in_one_line(error)}"))


def in_one_line(error: BaseException) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError):
        return f"the connection to {error.request.url.host} failed, try again later: {message}"
    return message


def fail(message: str, status: int = 1) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


def nearest_folder(path: Path) -> Path:
    """The folder that `path` is in, or the one that the missing folders above `path` are in."""
    return next((parent for parent in path.absolute().parents if os.path.lexists(parent)), Path("/"))


def check_output(output: Path, overwrite: bool):
    """Raises `ConversionError` for an output that cannot or must not be written, before any work is done."""
    if os.path.lexists(output):
        if not overwrite:
            raise ConversionError(f"{output} exists: choose another place or pass --overwrite")
        if output.is_symlink() or not output.is_dir():
            raise ConversionError(f"{output} is no folder and is not overwritten")
        if Path.cwd().is_relative_to(output.resolve()):
            raise ConversionError(f"{output} is the current folder, or holds it, and is not overwritten")
        names = {path.name for path in output.iterdir()}
        if names and not names & OUTPUT_FILES:
            raise ConversionError(f"{output} is no checkpoint ({some(sorted(names))}) and is not overwritten")
    parent = nearest_folder(output)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConversionError(f"{output} cannot be written: {parent} is no folder that you can write to")


@contextmanager
def whole_folder(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """
    Gives an empty folder that becomes `output` when the block ends without an exception, and vanishes otherwise. What
    was at `output` stays until then.

    Raises:
        `ConversionError`: when `output` exists and `overwrite` is `False`.
    """
    output = output.absolute()
    check_output(output, overwrite)
    # On the disk of `output`. The folders above it are not made for what may fail.
    folder = nearest_folder(output) / f".{output.name}.{uuid.uuid4().hex[:8]}.incomplete"
    try:
        folder.mkdir()
        yield folder
        for path in folder.iterdir():
            path.chmod(0o666 & ~current_umask())  # safetensors makes files for the owner's eyes alone
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # on the disk before the name is, for a power cut
        with signals_deferred():
            check_output(output, overwrite)  # somebody may have been faster
            output.parent.mkdir(parents=True, exist_ok=True)
            if output.exists():
                replaced = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.replaced")
                output.rename(replaced)
                try:
                    folder.rename(output)
                except OSError:
                    replaced.rename(output)
                    raise
                shutil.rmtree(replaced, ignore_errors=True)
            else:
                folder.rename(output)
    finally:
        with signals_deferred():
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM wait until the block has ended."""
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


def current_umask() -> int:
    umask = os.umask(0o022)
    os.umask(umask)
    return umask
