"""Where weights of the reference come from: the Hub, a URL, a folder or a file, read without executing anything."""

import argparse
import difflib
import hashlib
import json
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from commands import ConversionError, in_one_line, some, user_path
from filelock import FileLock
from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    get_session,
    hf_hub_download,
    hf_hub_url,
    hf_raise_for_status,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, validate_repo_id
from memory import page_out
from safetensors.torch import load_file
from torch import nn
from transformers.utils.hub import extract_commit_hash
from variants import IBM_RELEASE, VARIANTS


# A CrossViT has some 300 tensors, whose names and shapes take 40 kB
MAX_SAFETENSORS_HEADER = 10_000_000
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")


@dataclass
class Source:
    """A file of weights on this machine, and what is known about it."""

    path: Path
    # What to tell others of it: no path of this machine
    record: dict[str, str]
    # The entry of variants.json whose published weights these are
    published: dict[str, Any] | None = None
    # The config.json beside the weights in a folder or repository of timm's, unless they are published ones
    timm_config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.record.items())


def add_source_options(parser: argparse.ArgumentParser):
    """The options that say which weights of a source are meant."""
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--filename", help="the file of weights in a Hub repository or folder that has several")
    parser.add_argument("--sha256", help="refuse weights whose file has another SHA-256")
    parser.add_argument("--entry", help="which weights of a training checkpoint: model, model_ema, state_dict, ...")


def find_source(source: str, revision: str | None = None, filename: str | None = None) -> Source:
    """
    Finds the weights that `source` names and downloads them if need be, with a progress bar; a download that was cut
    is resumed.

    Args:
        source (`str`): a name of variants.json (timm's weights), a repository of the Hub, an https URL, or the path of
            a file or folder.
        revision (`str`, *optional*): branch, tag or commit of a repository.
        filename (`str`, *optional*): the file in a repository or folder.

    Raises:
        `ConversionError`: for what is none of these.
    """
    if source in VARIANTS:
        return find_on_hub(VARIANTS[source]["timm_id"], revision, filename)
    is_url = re.match(r"https?://", source, re.IGNORECASE)
    path = Path(source) if is_url else user_path(source)
    if is_url or path.exists():
        if revision is not None:
            raise ConversionError(f"--revision is for repositories of the Hub, and {source} is none")
        if filename is not None and not path.is_dir():
            raise ConversionError(f"--filename is for repositories and folders, and {source} is none")
        if is_url:
            return find_at_url(source)
        if path.is_dir():
            return find_in_folder(path, filename)
        if not path.is_file():
            raise ConversionError(f"{source} is neither a file nor a folder")
        return Source(path, {"file": path.name})
    if source.count("/") == 1 and not source.startswith((".", "/", "~")) and path.suffix not in WEIGHT_SUFFIXES:
        return find_on_hub(source, revision, filename)
    similar = difflib.get_close_matches(source, VARIANTS, n=3, cutoff=0.5) or list(VARIANTS)
    raise ConversionError(
        f"there is no file or folder {source!r}, and it is no URL, repository (owner/name) or variant: did you mean"
        f" {some(similar, len(VARIANTS))}?"
    )


def choose_weights(names: list[str], filename: str | None, place: str) -> str:
    """The file of weights among the files of a folder or repository."""
    if filename:
        if filename not in names:
            raise ConversionError(f"{place} has no {filename}, only {some(sorted(names), 10)}")
        return filename
    candidates = sorted(name for name in names if name.endswith(WEIGHT_SUFFIXES))
    if "model.safetensors" in candidates:
        return "model.safetensors"
    if len(candidates) != 1:
        found = f"several: {some(candidates, 10)}" if candidates else "none"
        raise ConversionError(f"{place} must have a file of weights, and has {found}; choose with --filename")
    return candidates[0]


def check_timm_config(config: Any, place: str) -> dict[str, Any]:
    """
    The contents of a config.json as timm writes them, `pretrained_cfg` and `model_args` included, or nothing if it is
    not timm's.
    """
    if not isinstance(config, dict):
        raise ConversionError(f"config.json of {place} is no JSON object")
    if "model_type" in config:
        raise ConversionError(
            f"{place} is a checkpoint of Transformers already, of model type {config['model_type']!r}, none of the"
            " reference's"
        )
    if "architecture" not in config:
        return {}
    if not str(config["architecture"]).startswith("crossvit"):
        raise ConversionError(f"config.json of {place} says that it is a {config['architecture']}, no CrossViT")
    config = {"pretrained_cfg": {}, "model_args": {}, **config}
    for name in ("pretrained_cfg", "model_args"):
        if not isinstance(config[name], dict):
            raise ConversionError(f"config.json of {place} has {name} {config[name]!r}, which must be an object")
    return config


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is no JSON: {error}") from error


def find_in_folder(folder: Path, filename: str | None) -> Source:
    name = choose_weights([path.name for path in folder.iterdir() if path.is_file()], filename, str(folder))
    config_path = folder / "config.json"
    config = check_timm_config(read_json(config_path), str(folder)) if config_path.exists() else {}
    return Source(folder / name, {"file": name}, timm_config=config)


def find_on_hub(repo_id: str, revision: str | None, filename: str | None) -> Source:
    published = next((variant for variant in VARIANTS.values() if variant["timm_id"] == repo_id), None)
    try:
        validate_repo_id(repo_id)
        if filename is None:
            # timm's own need no listing, and so no network when they are in the cache
            names = ["model.safetensors"] if published else HfApi().list_repo_files(repo_id, revision=revision)
            filename = choose_weights(names, None, repo_id)
        path, commit = download_from_hub(repo_id, filename, revision)
        # Of the same commit, should the repository change right now
        config = {} if published else config_on_hub(repo_id, commit)
    except HFValidationError as error:
        raise ConversionError(f"{repo_id!r} is no file, variant or repository: {error}") from error
    except RevisionNotFoundError as error:
        raise ConversionError(f"{repo_id} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ConversionError(
            f"there is no file {repo_id!r}, and no repository of that name on the Hub that you may read"
        ) from error
    except LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub does not answer, try again later"
        raise ConversionError(f"{repo_id} is not in the cache, or not all of it, and {reason}") from error
    except EntryNotFoundError as error:
        raise ConversionError(f"{repo_id} has no {filename}") from error
    return Source(path, {"repository": repo_id, "revision": commit, "file": filename}, published, config)


def config_on_hub(repo_id: str, commit: str) -> dict[str, Any]:
    try:
        path = hf_hub_download(repo_id, "config.json", revision=commit)
    except RemoteEntryNotFoundError:
        return {}
    return check_timm_config(read_json(Path(path)), repo_id)


def download_from_hub(repo_id: str, filename: str, revision: str | None) -> tuple[Path, str]:
    """
    The file of a repository and its commit. From the client's cache if it is there. It is not the client that
    downloads it, since the client begins anew when its process was killed.
    """
    if constants.HF_HUB_OFFLINE:
        cached_path = hf_hub_download(repo_id, filename, revision=revision)
        return Path(cached_path), str(extract_commit_hash(cached_path, None))
    url = hf_hub_url(repo_id, filename, revision=revision)
    metadata = get_hf_file_metadata(url)
    cached = try_to_load_from_cache(repo_id, filename, revision=metadata.commit_hash)
    if isinstance(cached, str):
        return Path(cached), metadata.commit_hash
    headers = build_hf_headers() if metadata.location == url else None  # the token is for the Hub alone
    path = download(metadata.location, filename, metadata.size, metadata.etag, headers)
    return path, metadata.commit_hash


def find_at_url(url: str) -> Source:
    if not url.lower().startswith("https://"):
        raise ConversionError(f"{url} is not encrypted, anybody on the way could change the weights: use https")
    published = next((variant for variant in VARIANTS.values() if url == IBM_RELEASE + variant["ibm_file"]), None)
    response = get_session().head(url, follow_redirects=True)
    hf_raise_for_status(response)
    # Only an ETag tells that the rest of a download belongs to its beginning
    etag = response.headers.get("etag") if response.headers.get("accept-ranges") == "bytes" else None
    size = response.headers.get("content-length")
    name = Path(urlsplit(url).path).name or "weights"
    return Source(download(url, name, int(size) if size else None, etag), {"url": url}, published)


def download(url: str, name: str, size: int | None, etag: str | None, headers: dict[str, str] | None = None) -> Path:
    """
    Downloads a file, with a progress bar, and keeps it with the files of huggingface_hub. One that is there with the
    same `etag` is not downloaded again, and one that was cut is resumed.
    """
    folder = Path(constants.HF_HOME) / "crossvit"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(f'{name} {etag or url}'.encode()).hexdigest()[:16]}-{Path(name).name}"
    incomplete = path.with_name(f"{path.name}.incomplete")
    with FileLock(f"{path}.lock"):
        if etag is None:
            path.unlink(missing_ok=True)
            incomplete.unlink(missing_ok=True)
        if not path.exists():
            if size is not None and incomplete.exists() and incomplete.stat().st_size > size:
                incomplete.unlink()  # by a server that sent all of it when asked for the rest
            with open(incomplete, "ab") as file:
                http_get(
                    url,
                    file,
                    resume_size=file.tell(),
                    headers=headers,
                    expected_size=size,
                    displayed_filename=name,
                )
            # The Hub's ETags of weights are their SHA-256
            if etag and re.fullmatch("[0-9a-f]{64}", etag) and file_sha256(incomplete) != etag:
                incomplete.unlink()
                raise ConversionError(f"{name} was damaged on its way here: try again")
            incomplete.rename(path)
    return path


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str | None) -> str:
    """The SHA-256 of a file; raises `ConversionError` if it is not the expected one."""
    digest = file_sha256(path)
    if expected is not None and digest != expected.lower():
        raise ConversionError(f"{path.name} has the SHA-256 {digest}, not {expected.lower()}")
    return digest


def read_tensors(path: Path, entry: str | None = None) -> tuple[dict[str, torch.Tensor], str | None]:
    """
    Reads the tensors of a file of safetensors or of torch's, told by its content. They stay on the disk until they are
    used. Pickles are read by torch's restricted reader, which makes tensors and plain data and calls nothing.

    Args:
        path (`Path`): the file.
        entry (`str`, *optional*): which weights of a training checkpoint.

    Returns:
        `tuple[dict[str, torch.Tensor], str | None]`: the tensors by name, and the entry that they were in, if any.

    Raises:
        `ConversionError`: for a file that is damaged, harmful or no file of weights, and for one that has several sets
            of weights of which none was chosen.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        magic = file.read(64)
    if magic[8:9] == b"{":
        if entry is not None:
            raise ConversionError(f"{path.name} holds weights and no entries, hence no --entry {entry}")
        tensors = read_safetensors(path, int.from_bytes(magic[:8], "little"), size)
    elif magic.startswith((b"PK\x03\x04", b"\x80")):
        tensors, entry = choose_entry(read_pickle(path, zipped=magic.startswith(b"PK")), entry)
    elif magic.startswith(b"version https://git-lfs"):
        raise ConversionError(f"{path.name} is a pointer of Git LFS, not the weights: fetch them with 'git lfs pull'")
    else:
        raise ConversionError(
            f"{path.name} is neither a file of safetensors nor one of torch.save: it is {size} bytes long and begins"
            f" with {magic[:16]!r}"
        )
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > size:
        raise ConversionError(f"{path.name} claims more weights than its {size} bytes can hold")
    check_values(tensors)
    return tensors, entry


def read_safetensors(path: Path, header_size: int, size: int) -> dict[str, torch.Tensor]:
    if header_size > min(size - 8, MAX_SAFETENSORS_HEADER):
        raise ConversionError(
            f"{path.name} is truncated or no file of safetensors: it claims a header of {header_size} bytes, and the"
            f" file has {size}"
        )

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in pairs)
        if len(counts) < len(pairs):
            duplicates = [name for name, count in counts.items() if count > 1]
            raise ConversionError(f"{path.name} has two tensors or fields named {some(duplicates)}")
        return dict(pairs)

    with open(path, "rb") as file:
        file.seek(8)
        try:
            json.loads(file.read(header_size), object_pairs_hook=refuse_duplicates)
        except (ValueError, RecursionError) as error:
            raise ConversionError(f"{path.name} is damaged: its header is no JSON, {error}") from error
    try:
        return load_file(path)
    except Exception as error:
        raise ConversionError(f"{path.name} is damaged or truncated: {in_one_line(error)}") from error


def read_pickle(path: Path, zipped: bool) -> Any:
    if zipped:
        check_archive(path)
    try:
        # The options of the reference's training script, plain values in an object without behavior
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    # Damaged pickles end in all kinds of exceptions. torch's texts are not repeated: they advise to run the pickle.
    except Exception as error:
        if harmful := re.search(r"unsupported global:?(?: GLOBAL)? ([\w.]+)", str(error), re.IGNORECASE):
            raise ConversionError(
                f"{path.name} is refused and nothing of it was run: its pickle asks for {harmful[1]}, which weights do"
                " not need; save the state_dict alone if you can"
            ) from error
        if isinstance(error, OSError):
            raise
        raise ConversionError(
            f"{path.name} is damaged, truncated or no file of weights: torch's restricted reader cannot read it"
            f" ({type(error).__name__})"
        ) from error


def check_archive(path: Path):
    """Raises `ConversionError` for a zip file that is damaged or none of torch.save's."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save does not compress: an archive that does could be a bomb
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise ConversionError(f"{path.name} is a compressed archive, none of torch.save's")
            if len(set(archive.namelist())) < len(archive.namelist()):
                raise ConversionError(f"{path.name} is an archive with two records of the same name")
            # torch does not look at the checksums
            if damaged := archive.testzip():
                raise ConversionError(f"{path.name} is damaged: the checksum of its record {damaged} is another one")
    except (zipfile.BadZipFile, ValueError, LookupError, NotImplementedError, EOFError) as error:
        raise ConversionError(f"{path.name} is damaged or truncated: {error}") from error


def is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items())
    )


def choose_entry(checkpoint: Any, entry: str | None) -> tuple[dict[str, torch.Tensor], str | None]:
    """The weights of what was pickled: a state dict, or a training checkpoint with state dicts among its entries."""
    if is_state_dict(checkpoint):
        if entry is not None:
            raise ConversionError(f"it holds weights and no entries, hence no --entry {entry}")
        return dict(checkpoint), None
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        raise ConversionError(f"it holds a {type(checkpoint).__name__}, no weights")
    candidates = [name for name, value in checkpoint.items() if isinstance(name, str) and is_state_dict(value)]
    if entry is None and len(candidates) == 1:
        entry = candidates[0]
    if entry not in candidates:
        if not candidates:
            others = [name for name, value in checkpoint.items() if not isinstance(value, torch.Tensor)]
            raise ConversionError(f"it holds no weights under a name of their own, but {some(others, 10)}")
        chosen = f"not under {entry!r}" if entry else "under several names"
        raise ConversionError(f"it holds weights under {some(candidates, 10)}, {chosen}: choose one with --entry")
    return dict(checkpoint[entry]), entry


def check_values(tensors: Mapping[str, torch.Tensor]):
    """Raises `ConversionError` for what cannot be weights: other layouts and types than dense floats, NaN and Inf."""
    for name, tensor in tensors.items():
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_nested:
            raise ConversionError(f"{some([name])} is no plain tensor ({type(tensor).__name__}, {tensor.layout})")
        if tensor.device.type != "cpu" or tensor.ndim > 4:
            raise ConversionError(f"{some([name])} has {tensor.ndim} dimensions or no values: it is no weight")
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ConversionError(f"{some([name])} has {tensor.dtype} values, none of 16, 32 or 64 bits")
        if not tensor.isfinite().all():
            values = "NaN" if tensor.isnan().any() else "infinite values"
            raise ConversionError(f"{some([name])} has {values}: the weights are damaged")
        page_out(tensor)


def of_one_type(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in the widest of their types, which holds the others exactly, each contiguous."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    return {name: tensor.detach().to(dtype).contiguous() for name, tensor in tensors.items()}
