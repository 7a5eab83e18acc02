"""Publishing checkpoints on the Hub: one commit each, so that nothing half-published can be loaded."""

import argparse
import hashlib
from pathlib import Path

from commands import ConversionError, some
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from sources import file_sha256, read_json


# The record of a conversion, in its folder
RECORD_NAME = "conversion.json"


def add_repository_options(parser: argparse.ArgumentParser):
    parser.add_argument("--private", action="store_true", help="make a new repository private")


def check_namespace(repo_id: str):
    """Raises `ConversionError` unless the token on this machine may write to the owner of `repo_id` (owner/name)."""
    try:
        user = HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise ConversionError("there is no token of the Hub on this machine: run 'hf auth login'") from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            raise ConversionError(
                "the Hub does not know the token: run 'hf auth login' again, unless HF_TOKEN is set"
            ) from error
        raise
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ConversionError("the token may only read the Hub: run 'hf auth login' with one that may write")
    namespaces = [user["name"], *(organization["name"] for organization in user.get("orgs", []))]
    if repo_id.count("/") != 1 or repo_id.split("/")[0] not in namespaces:
        raise ConversionError(
            f"{repo_id} is no repository of yours: the owner (owner/name) must be one of {some(namespaces, 10)}"
        )


class Repository:
    """
    A repository of the Hub to publish a checkpoint in. It is looked at when this object is made, so that a wrong
    token, a wrong name or a repository of somebody else's is known before any work is done.

    Raises:
        `ConversionError`: when nothing could be published there.
    """

    def __init__(self, repo_id: str, private: bool = False, overwrite: bool = False):
        self.repo_id, self.private, self.overwrite = repo_id, private, overwrite
        self.api = HfApi()
        check_namespace(repo_id)
        self.info = self.find()
        files = published_files(self.info)
        if files and RECORD_NAME not in files and not overwrite:
            raise self.refusal(files)

    def refusal(self, files: list[str]) -> ConversionError:
        return ConversionError(f"{self.repo_id} exists and has other files ({some(files)}): pass --overwrite")

    def find(self) -> ModelInfo | None:
        try:
            return self.api.model_info(self.repo_id, files_metadata=True)
        except RepositoryNotFoundError:
            return None
        except HFValidationError as error:
            raise ConversionError(f"{self.repo_id} is no name of a repository: {error}") from error

    def publish(self, folder: Path) -> str:
        """
        Makes the repository hold the files of `folder` and nothing else, in one commit; the client does some retries.

        Returns:
            `str`: what was done, for the user.

        Raises:
            `ConversionError`: when the repository holds something else than a conversion of the same weights, and
                `overwrite` is `False`.
            `HfHubHTTPError`: when the Hub refuses or fails. What was in the repository is still there.
        """
        self.info = self.find()
        if self.info and is_equal(folder, self.info):
            return f"{self.repo_id}: is equal already"
        files = published_files(self.info)
        if files and not self.overwrite and not self.has_same_source(folder):
            raise self.refusal(files)
        if self.info is None:
            self.api.create_repo(self.repo_id, private=self.private)
            self.info = self.find()
        names = {path.name for path in folder.iterdir()}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in sorted(names)),
            *(CommitOperationDelete(path_in_repo=name) for name in files if name not in names),
        ]
        try:
            # One commit, where `upload_folder` may make several
            commit = self.api.create_commit(
                self.repo_id,
                operations,
                commit_message="Upload the converted checkpoint",
                # Refused by the Hub if somebody else has committed meanwhile
                parent_commit=self.info.sha if self.info else None,
            )
        except RuntimeError as error:  # the client's, after its retries
            raise ConversionError(f"{self.repo_id}: nothing is published, {error}: {error.__cause__}") from error
        return f"{self.repo_id}: published, {commit.commit_url}"

    def has_same_source(self, folder: Path) -> bool:
        """Whether the repository holds an earlier conversion of the weights that the checkpoint in `folder` is of."""
        try:
            published = read_json(Path(self.api.hf_hub_download(self.repo_id, RECORD_NAME, revision=self.info.sha)))
            return published["source"]["sha256"] == read_json(folder / RECORD_NAME)["source"]["sha256"]
        except (RemoteEntryNotFoundError, ConversionError, LookupError, TypeError):
            return False


def published_files(info: ModelInfo | None) -> list[str]:
    siblings = info.siblings if info else None
    return [file.rfilename for file in siblings or [] if file.rfilename != ".gitattributes"]


def is_equal(folder: Path, info: ModelInfo) -> bool:
    """Whether a repository has the files of a folder, all of them and no others, byte by byte."""
    published = {file.rfilename: file for file in info.siblings or []}
    return set(published_files(info)) == {path.name for path in folder.iterdir()} and all(
        published[path.name].lfs.sha256 == file_sha256(path)
        if published[path.name].lfs
        else published[path.name].blob_id == git_blob_id(path)
        for path in folder.iterdir()
    )


def git_blob_id(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
