"""Classify pictures with a file that ``cpvit export`` wrote. Needs no torch and no cpvit: Pillow, numpy and a runtime.

    pip install numpy pillow onnxruntime    # or openvino, for .xml files
    python classify.py deit.onnx picture.jpg ...

Everything about the input is read from the JSON beside the file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def main(model: Path, pictures: list[Path]) -> None:
    about = json.loads(model.with_name(model.name + ".json").read_text())
    pixels = np.stack([crop(Image.open(picture), about) for picture in pictures])
    logits = opened(model)(pixels if about["normalized_inside"] else normalized(pixels, about))
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    names = about["classes"] or [str(number) for number in range(about["num_outputs"])]
    for picture, row in zip(pictures, probabilities, strict=True):
        best = row.argsort()[::-1][:3]
        print(f"{picture.name}: " + ", ".join(f"{names[number]} {row[number]:.1%}" for number in best))


def crop(picture: Image.Image, about: dict[str, Any]) -> np.ndarray:
    """Shorter side resized, centre cut out: [H W 3] uint8."""
    how = about["preprocessing"]
    height, width = how["image_size"]
    if how["crop_mode"] != "center" or height != width:
        raise SystemExit("this example knows the usual resize and centre crop to a square only")
    picture = picture.convert("RGB")
    side = int(height / how["crop_pct"])
    scale = side / min(picture.size)
    size = [side if length == min(picture.size) else int(length * scale) for length in picture.size]
    picture = picture.resize((size[0], size[1]), FILTERS[how["interpolation"]])
    left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
    return np.asarray(picture.crop((left, top, left + width, top + height)))


def normalized(pixels: np.ndarray, about: dict[str, Any]) -> np.ndarray:
    """[B H W 3] uint8 -> [B 3 H W] float32."""
    mean, std = (np.array(about["preprocessing"][name], np.float32) for name in ("mean", "std"))
    return np.ascontiguousarray(((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))


def opened(model: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The file in its runtime."""
    if model.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {"images": images})[0]
    import openvino

    compiled = openvino.Core().compile_model(model, "CPU")
    return lambda images: compiled([images])[0]


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
