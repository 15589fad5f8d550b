"""int8 by NNCF, for ONNX and OpenVINO: the linear layers and the patch embedding, and nothing else.

Matching and scoring are discrete: rounding a similarity changes who merges with whom. So what has no weights stays in
float32 (attention, similarities, scores, sizes, norms), which is a small part of the time.

SmoothQuant moves outliers of the activations into the weights. Whether that helps depends on the model: on DeiT-Tiny
NNCF's usual strength multiplies the damage by five. So several strengths are tried (:data:`SMOOTHING`), and compared on
images that the ranges were not fitted to: on those that they were, smoothing looks better than it is.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from cpvit.export.description import INPUT
from cpvit.export.requirements import required

SMOOTHING = (0.0, 0.5)
"""Strengths of SmoothQuant to try; 0 is none. The file that is closest to torch is kept."""


def quantized_openvino(model: Any, images: Tensor, smoothing: float) -> Any:
    """An ``openvino.Model`` with int8 weights and activations in its linear layers."""
    nncf = required("nncf")
    names = {operation.get_friendly_name() for operation in model.get_ops()}
    keep = names - {operation.get_friendly_name() for operation in model.get_ops() if _has_weights(operation)}
    with _quiet():
        return nncf.quantize(
            model, nncf.Dataset(_single(images)), **_settings(nncf, keep, len(images), smoothing)
        )


def quantized_onnx(path: Path, images: Tensor, smoothing: float) -> Any:
    """An ``onnx.ModelProto`` likewise, with the operations QuantizeLinear and DequantizeLinear."""
    nncf, onnx = required("nncf"), required("onnx")
    model = onnx.load(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    keep = {
        node.name
        for node in model.graph.node
        if not (node.op_type in ("MatMul", "Gemm", "Conv") and weights & set(node.input))
    }
    samples = [{INPUT: sample} for sample in _single(images)]
    with _quiet():
        return nncf.quantize(model, nncf.Dataset(samples), **_settings(nncf, keep, len(images), smoothing))


def compressed_weights(model: Any) -> Any:
    """An ``openvino.Model`` with weights in int8 and arithmetic in float32: less to read from memory."""
    nncf = required("nncf")
    with _quiet():
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)


def _settings(nncf: Any, keep: set[str], images: int, smoothing: float) -> dict[str, Any]:
    advanced = nncf.quantization.advanced_parameters
    alphas = advanced.AdvancedSmoothQuantParameters(convolution=-1, matmul=smoothing or -1)
    return {
        "model_type": nncf.ModelType.TRANSFORMER,
        "subset_size": images,
        "ignored_scope": nncf.IgnoredScope(names=sorted(keep), validate=False),
        # Half the range of the weights, which costs little: processors without VNNI saturate otherwise.
        "advanced_parameters": advanced.AdvancedQuantizationParameters(
            overflow_fix=advanced.OverflowFix.ENABLE, smooth_quant_alphas=alphas
        ),
    }


def _has_weights(operation: Any) -> bool:
    """Whether an operation of OpenVINO multiplies by a constant."""
    if operation.get_type_name() not in ("MatMul", "Convolution"):
        return False
    source = operation.input_value(1).get_node()
    while source.get_type_name() in ("Convert", "Transpose", "Reshape"):
        source = source.input_value(0).get_node()
    return bool(source.get_type_name() == "Constant")


def _single(images: Tensor) -> list[Any]:
    return [images[number : number + 1].numpy() for number in range(len(images))]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without NNCF's progress bars and advice, which name its own options."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
