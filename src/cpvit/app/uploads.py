"""Files that somebody drops on the page: limited in size and pixels, and decoded as everywhere else."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

from PIL import Image
from torch import Tensor

from cpvit.data import Preprocessing
from cpvit.data.images import SKIP_HINT, BadImageError, decode, opened

MOST_BYTES = 20 << 20
MOST_PIXELS = 40_000_000
"""What a camera takes fits; decoded it is 120 MB."""


class UploadError(ValueError):
    """The file is not an image that can be shown; the message says why."""


class Uploads:
    """Reads files; one at a time, since Pillow's settings are those of the whole process."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._transform = preprocessing.transform()
        self._lock = threading.Lock()

    def read(self, path: Path) -> Tensor:
        """The image of a file, prepared for the model: [1 3 H W].

        Raises:
            UploadError: Too large, or not an image.
        """
        if path.stat().st_size > MOST_BYTES:
            raise UploadError(f"{path.name} has more than {MOST_BYTES >> 20} MB; give a smaller file")
        return self.prepare(self._decoded(path.read_bytes(), path.name))

    def prepare(self, image: Image.Image) -> Tensor:
        """Resized, cropped and normalised: [1 3 H W]."""
        return self._transform(image)[None]

    def _decoded(self, data: bytes, name: str) -> Image.Image:
        with self._lock:
            width, height = _size(data)
            if width * height > MOST_PIXELS:
                raise UploadError(
                    f"{name} has {width}x{height} pixels, more than {MOST_PIXELS // 1_000_000} million; give a "
                    "smaller image"
                )
            try:
                return decode(data, name)
            except BadImageError as error:
                raise UploadError(str(error).removesuffix(SKIP_HINT)) from None


def _size(data: bytes) -> tuple[int, int]:
    """Width and height by the file's header; 0 for what is no image, which ``decode`` then says precisely."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with opened(data) as image:
                return image.size
    except Exception:  # whatever Pillow's plugins make of a broken file, a decompression bomb among it
        return 0, 0
