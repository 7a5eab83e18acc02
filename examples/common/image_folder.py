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
"""
The loader of image folders, in its own module: in the module of a loader, `datasets` replaces `open`,
`os.path.join`, `glob.glob` and others by functions for URLs.
"""

from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder


class AvifImageFolder(ImageFolder):
    """A folder of images, which may be AVIF; `ImageFolder` leaves these out."""

    EXTENSIONS = [*ImageFolder.EXTENSIONS, ".avif"]
