"""Ways to int8, dense and pruned: what they cost in accuracy and what they gain on this machine.

    python studies/quantisation.py --checkpoint deit_tiny_patch16_224.safetensors --data imagenet-val-650.tar

The first 128 images of a fixed draw calibrate, the others compare with dense float32 torch. "linear" is what
``cpvit export --int8`` does: what has weights, and nothing else. Speed: a batch through each in turn, over dense
float32 torch. Needs the extras onnx, openvino and int8. ``--torchao`` adds torchao's own ways, compiled, which take
seconds for an image on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from cpvit import PruneConfig, prune_
from cpvit.data import Preprocessing, find_samples, label_map, make_loader
from cpvit.export import ExportOptions, export, open_exported
from cpvit.export.description import INPUT
from cpvit.files import write_atomically
from cpvit.machine.environment import describe_environment
from cpvit.machine.timer import interleave
from cpvit.measure.metrics import Predictions, agreement, kl_divergence
from cpvit.weights.create import create_model
from cpvit.weights.loading import load_checkpoint

Run = Callable[[Tensor], Tensor]
FORMATS = (("onnx", "onnx", "ONNX Runtime"), ("openvino", "xml", "OpenVINO"))
"""Of ``cpvit export``: name, ending, runtime."""


class Case(NamedTuple):
    name: str
    pruned: bool
    run: Run


class Images(NamedTuple):
    calibration: Tensor
    others: Tensor
    labels: Tensor


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--macs", type=float, default=0.6)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument(
        "--runtimes", nargs="+", choices=("onnxruntime", "openvino"), default=["onnxruntime", "openvino"]
    )
    parser.add_argument("--torchao", action="store_true", help="its rows too (pip install torchao)")
    parser.add_argument("--json", type=Path)
    return parser


def main() -> None:
    arguments = parser().parse_args()
    logging.disable(logging.WARNING)

    model = create_model(arguments.model).eval()
    load_checkpoint(model, arguments.checkpoint)
    images = read(model, arguments.data)
    pruned = copy.deepcopy(model)
    prune_(pruned, PruneConfig(method="cpvit-merge", macs=arguments.macs))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        cases = [
            Case(name, form is pruned, run)
            for form in (model, pruned)
            for name, run in ways(form, images.calibration, Path(folder) / str(form is pruned), arguments)
        ]
        rows = table(cases, images, arguments.batch_size, arguments.seconds)
    for row in rows:
        print(
            f"| {row['name']} | {'pruned' if row['pruned'] else 'dense'} | {row['kl']:.4f}, {row['agreement']:.3f}, "
            f"{row['lost']:.2f} | {row['speedup']:.2f}x |",
            flush=True,
        )
    if arguments.json:
        environment = describe_environment(torch.device("cpu"), torch.float32, 0)
        record = {"macs": arguments.macs, "rows": rows, "environment": vars(environment)}
        write_atomically(arguments.json, json.dumps(record, indent=2, default=str) + "\n")


def read(model: nn.Module, data: str) -> Images:
    source = find_samples(data)
    labels_of = label_map(source, model.num_classes)
    batches = list(make_loader(source, Preprocessing.from_model(model), labels=labels_of, batch_size=65))
    everything = torch.cat([batch.images for batch in batches])
    labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
    return Images(everything[order[:128]], everything[order[128:]], labels[order[128:]])


def ways(
    model: nn.Module, images: Tensor, folder: Path, arguments: argparse.Namespace
) -> Iterator[tuple[str, Run]]:
    folder.mkdir()
    yield "float32, torch", model
    for to, suffix, runtime in FORMATS:
        if runtime.replace(" ", "").lower() not in arguments.runtimes:
            continue
        for int8 in (False, True):
            path = folder / f"{int8}.{suffix}"
            export(model, path, ExportOptions(to=to, int8=int8), images=images)
            name = "NNCF, linear (cpvit export --int8)" if int8 else "float32"
            yield f"{name}, {runtime}", open_exported(path)
            if to == "openvino":
                half = f"{name}, the rest in bfloat16" if int8 else "bfloat16"
                yield f"{half}, {runtime}", open_exported(path, bfloat16=True)
    if "openvino" in arguments.runtimes:
        yield "NNCF as it comes, OpenVINO", nncf_as_it_comes(folder / "False.xml", images)
    if "onnxruntime" in arguments.runtimes:
        yield from onnx_runtime_ways(folder, images)
    if arguments.torchao:
        yield from torchao_ways(model, images)


def nncf_as_it_comes(path: Path, images: Tensor) -> Run:
    import nncf
    import openvino

    samples = nncf.Dataset([image[None].numpy() for image in images])
    quantized = nncf.quantize(
        openvino.Core().read_model(path),
        samples,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(images),
    )
    compiled = openvino.compile_model(
        quantized,
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()},
    )
    return lambda batch: torch.from_numpy(compiled(batch.numpy())[0].copy())


def onnx_runtime_ways(folder: Path, images: Tensor) -> Iterator[tuple[str, Run]]:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.images = iter(images.split(1))

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.images, None)
            return None if image is None else {INPUT: image.numpy()}

    whole = folder / "False.onnx"
    for linear in (True, False):
        path = folder / f"static-{linear}.onnx"
        quantize_static(
            whole,
            path,
            Reader(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_quantize=with_weights(whole) if linear else None,
        )
        yield f"ONNX Runtime static, {'linear' if linear else 'as it comes'}", session(path)
    path = folder / "dynamic.onnx"
    quantize_dynamic(whole, path, per_channel=True, weight_type=QuantType.QInt8)
    yield "ONNX Runtime dynamic", session(path)


def with_weights(path: Path) -> list[str]:
    import onnx

    graph = onnx.load(path).graph
    constants = {tensor.name for tensor in graph.initializer}
    return [
        node.name
        for node in graph.node
        if node.op_type in ("MatMul", "Gemm", "Conv") and constants & set(node.input)
    ]


def session(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(numpy.asarray(opened.run(None, {INPUT: batch.numpy()})[0]))


def torchao_ways(model: nn.Module, images: Tensor) -> Iterator[tuple[str, Run]]:
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    for name, config in (
        ("torchao dynamic, torch.compile", Int8DynamicActivationInt8WeightConfig()),
        ("torchao weights only, torch.compile", Int8WeightOnlyConfig()),
    ):
        copied = copy.deepcopy(model)
        quantize_(copied, config)
        yield name, torch.compile(copied, dynamic=True)
    yield "PT2E (x86 inductor), torch.compile", pt2e(model, images)


def pt2e(model: nn.Module, images: Tensor) -> Run:
    """torch's own static quantisation of an exported graph, in the form it has moved to torchao in."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torch.export import Dim
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    shape = ({0: Dim("batch", min=2, max=512)},)
    with torch.no_grad():
        traced = torch.export.export(model, (images[:4],), dynamic_shapes=shape).module()
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(traced, quantizer)
        for part in images.split(32):
            prepared(part)
        return torch.compile(convert_pt2e(prepared), dynamic=True)


def table(cases: list[Case], images: Images, batch_size: int, seconds: float) -> list[dict[str, Any]]:
    answers = [predictions(case.run, images.others) for case in cases]
    print("accuracy is done; the speeds follow", flush=True)
    dense = answers[0]
    right = (dense.log_probs.argmax(1) == images.labels).float().mean()
    batch = images.others[:batch_size].contiguous()
    times = interleave([lambda run=case.run: run(batch) for case in cases], batch.device, seconds)
    rows = []
    for case, found, own in zip(cases, answers, times, strict=True):
        correct = (found.log_probs.argmax(1) == images.labels).float().mean()
        ratios = [first / other for first, other in zip(times[0], own, strict=True)]
        rows.append(
            {
                "name": case.name,
                "pruned": case.pruned,
                "kl": kl_divergence(dense, found),
                "agreement": agreement(dense, found),
                "lost": 100 * float(right - correct),
                "speedup": median(ratios),
            }
        )
    return rows


def predictions(run: Run, images: Tensor) -> Predictions:
    logits = torch.cat([run(part.contiguous()).clone() for part in images.split(58)])
    return Predictions(logits.float().log_softmax(dim=-1), None)


if __name__ == "__main__":
    main()
