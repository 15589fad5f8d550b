"""Turn encoded bytes into an RGB image, or say precisely why that cannot be done."""

from __future__ import annotations

import errno
import io
import threading
import warnings
from contextlib import ExitStack
from functools import cache

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

SKIP_HINT = ", or leave such files out with skip_bad_images=True (--skip-bad-images)"
"""How every message of `bad_image` ends; for callers that do not offer this, to take it off."""


FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""What is read, whatever a file is called. Pillow knows thirty more: rare ones, whose decoders break, and PostScript,
which it has another program run."""


class BadImageError(ValueError):
    """A file that should be an image cannot be read or decoded; the message names the file and the cause."""


def bad_image(name: str, cause: str) -> BadImageError:
    """The error for the image `name`, with the one way to go on without it."""
    return BadImageError(f"cannot read image {name}: {cause}; repair or remove it{SKIP_HINT}")


_OF_THE_MACHINE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def unreadable(path: str, error: OSError) -> BadImageError | OSError:
    """What to raise where a file cannot be read: a bad image, unless it is the machine that has no more of something.

    Such an image must not be skipped or become a row without values: nothing is wrong with it.
    """
    if error.errno in _OF_THE_MACHINE:
        return OSError(error.errno, f"cannot read image {path}: {error.strerror}")
    return bad_image(path, error.strerror or str(error))


def decode(data: bytes, name: str) -> Image.Image:
    """Decode `data` to an RGB image in memory.

    The same pixels as torchvision's ImageFolder: `convert("RGB")`, first frame, EXIF orientation not applied.
    Only 16-bit greyscale differs: it is scaled to 8 bits, where a plain conversion would clip it to white.

    Args:
        data: The encoded file.
        name: How to call the file in an error.

    Raises:
        BadImageError: The data is empty, truncated, corrupt, not an image, or far too large.
        OSError: The machine has no more files to open.
    """
    if not data:
        raise bad_image(name, "the file is empty")
    try:
        with _STRICT, opened(data) as image:
            return _to_rgb(image)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        known = ", ".join(_formats())
        raise bad_image(
            name, f"Pillow does not recognise it as an image of a format that is read ({known})"
        ) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            raise
        # Broken files make Pillow's plugins raise almost anything (OSError, SyntaxError, struct.error, ...).
        raise bad_image(name, str(error) or type(error).__name__) from error


def opened(data: bytes) -> Image.Image:
    """The image, of which only the header has been read; whatever Pillow raises, if it is none of `FORMATS`."""
    return Image.open(io.BytesIO(data), formats=_formats())


@cache
def _formats() -> tuple[str, ...]:
    """Those that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        eight_bits = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(eight_bits.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "RGB":
        image.load()
        return image.copy()
    return image.convert("RGB")


class _StrictPillow:
    """While any thread is in it, truncated files fail even if other code made Pillow accept them, harmless warnings
    stay quiet, and the one about size is an error.

    Pillow's switch and Python's warning filters belong to the whole process: the first thread sets them, the last one
    puts them back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._undo = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._set()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._undo.close()

    def _set(self) -> None:
        self._undo.callback(setattr, ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES)
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        self._undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)


_STRICT = _StrictPillow()
