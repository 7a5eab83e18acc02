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
"""Errors of the commands, and the wording of their one line."""

from collections.abc import Iterable


class CommandError(ValueError):
    """A user error. Its one-line message states the problem and the fix."""


def one_line(error: Exception) -> str:
    """The message of an error on one line, or else its type."""
    return " ".join(str(error).split()) or type(error).__name__


def shorten_list(names: Iterable[str], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit:,} more" if len(names) > limit else "")
