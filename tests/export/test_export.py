"""Exported files answer as torch does, in their own runtimes, for any number of images; or nothing is written."""

from __future__ import annotations

import io
import json
import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import torch
from conftest import IMAGE, random_images, randomize_, tiny_vit
from torch import Tensor, nn

from cpvit import Escalation, PruneConfig, calibrate, escalate, plan_of, prune_, unprune_
from cpvit.data import Preprocessing
from cpvit.export import ExportedModel, ExportError, ExportOptions, export, open_exported
from cpvit.export.program import to_uint8

pytest.importorskip("onnxscript", reason="the extras onnx, openvino and int8 are not installed")
for package in ("onnxruntime", "openvino", "nncf"):
    pytest.importorskip(package)

SUFFIX = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
PREPROCESSING = Preprocessing(IMAGE, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
TOLERANCE = 2e-5


def images_of(batch: int, seed: int = 1) -> Tensor:
    return random_images(batch, seed=seed, dtype=torch.float32)


def pruned_vit(method: str = "cpvit-merge", variant: str = "class", **config: Any) -> nn.Module:
    model = tiny_vit(variant, depth=2).float()
    prune_(model, PruneConfig(method=method, **(config or {"keep_per_block": (24, 12)})))
    return model


@torch.inference_mode()
def check(model: nn.Module, exported: ExportedModel, batches: tuple[int, ...] = (1, 2, 5)) -> None:
    for batch in batches:
        images = images_of(batch, seed=batch)
        torch.testing.assert_close(exported(images), model(images), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("method", ["cpvit", "cpvit-merge", "tome", "pitome"])
def test_every_method_for_any_number_of_images(tmp_path: Path, method: str) -> None:
    model = pruned_vit(method)
    for to, suffix in SUFFIX.items():
        if to == "openvino" and method != "cpvit-merge":
            continue
        found = export(model, tmp_path / f"m{suffix}", ExportOptions(to=to))  # type: ignore[arg-type]
        exported = open_exported(found.path)
        check(model, exported)
        assert exported.description == found.description
        assert exported.description.plan == plan_of(model)
    check(model, in_openvino(tmp_path / "m.onnx"))


def in_openvino(path: Path) -> ExportedModel:
    """An ONNX file in OpenVINO: what an export for OpenVINO is converted from."""
    import openvino

    request = openvino.Core().compile_model(
        path, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    )
    return ExportedModel(path, open_exported(path).description, lambda images: request([images])[0].copy())


KINDS: dict[str, Any] = {
    "distilled": lambda: tiny_vit(depth=2, variant="distilled"),
    "registers and LayerScale": lambda: tiny_vit(depth=2, variant="registers"),
    "average pooling, no class token": lambda: tiny_vit(depth=2, variant="none"),
    "attention pooling": lambda: tiny_vit(depth=2, variant="map"),
    "average pooling": lambda: tiny_vit(depth=2, variant="avg"),
    "q/k norm": lambda: tiny_vit(depth=2, variant="qk_norm"),
    "rotary": lambda: small("eva02_tiny_patch14_224"),
    "rotary, registers": lambda: small("vit_small_patch16_dinov3"),
    "relative positions": lambda: small("vit_relpos_small_patch16_224"),
    "relative positions, BEiT": lambda: small("beit_base_patch16_224"),
}


def small(name: str) -> nn.Module:
    """Of 35 patches, as the others."""
    with torch.device("meta"):
        patch = timm.create_model(name).patch_embed.patch_size[0]
    model = timm.create_model(
        name, img_size=(5 * patch, 7 * patch), embed_dim=48, depth=2, num_heads=3, num_classes=11
    )
    randomize_(model, 0)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_graph(tmp_path: Path, kind: str) -> None:
    """Written as ONNX, and read by both ONNX Runtime and OpenVINO."""
    model = KINDS[kind]().float()
    prune_(model, PruneConfig(method="cpvit-merge", keep_per_block=(24, 12)))
    shape = (
        3,
        *(5 * side if axis == 0 else 7 * side for axis, side in enumerate(model.patch_embed.patch_size)),
    )
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))
    path = export(model, tmp_path / "m.onnx").path
    with torch.inference_mode():
        expected = model(images)
    for exported in (open_exported(path), in_openvino(path)):
        torch.testing.assert_close(exported(images), expected, atol=5e-5, rtol=5e-5)


def test_heads_that_were_cut(tmp_path: Path) -> None:
    model = tiny_vit(depth=2).float()
    statistics = calibrate(model, images_of(4))
    prune_(model, PruneConfig(method="cpvit", macs=0.7, head_keep_rate=0.6), calibration=statistics)
    assert plan_of(model).heads is not None
    path = export(model, tmp_path / "m.onnx").path
    check(model, open_exported(path))
    check(model, in_openvino(path))


@pytest.mark.parametrize("to", SUFFIX)
def test_a_dense_model_a_fixed_batch_and_pixels(tmp_path: Path, to: str) -> None:
    model = tiny_vit(depth=2).float()
    path = tmp_path / f"m{SUFFIX[to]}"
    options = ExportOptions(to=to, batch_size=3, with_preprocessing=True)  # type: ignore[arg-type]
    found = export(model, path, options, preprocessing=PREPROCESSING)
    exported = open_exported(path)
    assert exported.description.plan is None
    assert exported.description.input_shape == (3, *IMAGE, 3)
    pixels = torch.randint(256, (3, *IMAGE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    mean, std = torch.tensor(PREPROCESSING.mean), torch.tensor(PREPROCESSING.std)
    normalised = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = model(normalised)
    answered = torch.from_numpy(exported.run(pixels.numpy()))
    torch.testing.assert_close(answered, expected, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(exported(normalised), expected, atol=TOLERANCE, rtol=TOLERANCE)
    with pytest.raises(ExportError, match=r"takes 3 images at once, got 2; give batches of that size"):
        exported(normalised[:2])
    assert found.parity.kl < 1e-8


def test_the_pixels_of_normalised_images() -> None:
    pixels = torch.randint(256, (2, *IMAGE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor(PREPROCESSING.mean), torch.tensor(PREPROCESSING.std)
    assert torch.equal(to_uint8(((pixels / 255 - mean) / std).permute(0, 3, 1, 2), PREPROCESSING), pixels)


def test_what_lies_beside_the_file(tmp_path: Path) -> None:
    model = pruned_vit()
    found = export(
        model,
        tmp_path / "deep" / "m.onnx",
        images=images_of(5),
        preprocessing=PREPROCESSING,
        classes=("a",) * 11,
    )
    values = json.loads((tmp_path / "deep" / "m.onnx.json").read_text())
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"m.onnx", "m.onnx.json"}
    assert values["input"] == {"name": "images", "dtype": "float32", "shape": ["batch", 3, *IMAGE]}
    assert values["output"]["shape"] == ["batch", 11]
    assert values["plan"]["patches_per_block"] == [24, 12]
    assert values["preprocessing"]["mean"] == [0.4, 0.5, 0.6]
    assert values["parity"]["real_images"] is True
    assert values["parity"]["images"] == 5
    assert len(values["classes"]) == 11
    assert set(values["versions"]) >= {"torch", "cpvit", "onnx", "onnxruntime"}
    assert found.bytes == (tmp_path / "deep" / "m.onnx").stat().st_size
    other = export(tiny_vit(depth=2, seed=1).float(), tmp_path / "other.onnx")
    assert other.description.weights_sha256 != found.description.weights_sha256
    unpruned = pruned_vit()
    unprune_(unpruned)
    assert (
        export(unpruned, tmp_path / "u.onnx").description.weights_sha256 == found.description.weights_sha256
    )


def test_no_path_of_this_machine_is_in_the_file(tmp_path: Path) -> None:
    export(pruned_vit(), tmp_path / "m.onnx")
    written = (tmp_path / "m.onnx").read_bytes()
    import onnx

    graph = onnx.load(tmp_path / "m.onnx").graph
    for value in (graph.input[0], graph.output[0]):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert b".py" not in written
    assert str(tmp_path).encode() not in written


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = pruned_vit().double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = export(model, tmp_path / "m.onnx")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert next(model.parameters()).dtype == torch.float64
    check(model.eval().float(), open_exported(found.path))


def int8(to: str, **more: Any) -> ExportOptions:
    return ExportOptions(to=to, int8=True, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_int8_is_near_and_leaves_the_matching_alone(tmp_path: Path, to: str) -> None:
    model = pruned_vit()
    found = export(model, tmp_path / f"m{SUFFIX[to]}", int8(to), images=images_of(12))
    whole = export(model, tmp_path / f"f{SUFFIX[to]}", ExportOptions(to=to), images=images_of(12))  # type: ignore[arg-type]
    assert found.description.precision == "int8"
    assert 1e-6 < found.parity.kl < 0.1
    assert found.bytes < whole.bytes
    linear = 2 * 4 + 1 + 1  # in two blocks, the patch embedding, the head
    assert quantized_operations(found.path) == linear
    assert not [name for name in (tmp_path).iterdir() if name.name.startswith(".")]


def quantized_operations(path: Path) -> int:
    """Operations that read an activation in int8."""
    if path.suffix == ".onnx":
        import onnx

        graph = onnx.load(path).graph
        made = {name: node for node in graph.node for name in node.output}
        constants = {tensor.name for tensor in graph.initializer}
        return sum(
            node.op_type in ("MatMul", "Gemm", "Conv")
            and all(
                made[name].op_type == "DequantizeLinear" for name in node.input[:2] if name not in constants
            )
            and node.input[0] in made
            and made[node.input[0]].op_type == "DequantizeLinear"
            for node in graph.node
        )
    import openvino

    model = openvino.Core().read_model(path)
    return sum(
        operation.get_type_name() in ("MatMul", "Convolution")
        and operation.input_value(0).get_node().get_type_name() == "FakeQuantize"
        for operation in model.get_ops()
    )


def test_weights_alone_in_int8(tmp_path: Path) -> None:
    model = tiny_vit(depth=2, embed_dim=160, name="vit_tiny_patch16_224").float()
    prune_(model, PruneConfig(method="cpvit", macs=0.7))
    options = ExportOptions(to="openvino", int8_weights=True)
    found = export(model, tmp_path / "m.xml", options)
    whole = export(model, tmp_path / "f.xml", ExportOptions(to="openvino"))
    assert found.description.precision == "int8-weights"
    assert found.bytes < 0.6 * whole.bytes
    assert 0 < found.parity.kl < 0.1


REFUSED: list[tuple[str, ExportOptions, dict[str, Any], str]] = [
    ("m.xml", ExportOptions(to="onnx"), {}, r"a file for onnx ends in \.onnx, got m\.xml"),
    ("m.onnx", ExportOptions(to="tflite"), {}, "to must be one of onnx, openvino, torch, got 'tflite'"),  # type: ignore[arg-type]
    ("m.onnx", ExportOptions(batch_size=0), {}, "batch_size must be at least 1, got 0"),
    ("m.onnx", ExportOptions(with_preprocessing=True), {}, "needs to know the model's preprocessing"),
    ("m.onnx", ExportOptions(int8=True), {}, "int8 needs calibration images"),
    (
        "m.onnx",
        ExportOptions(int8=True),
        {"images": torch.zeros(0, 3, *IMAGE)},
        "int8 needs calibration images",
    ),
    ("m.pt2", ExportOptions(to="torch", int8=True), {}, "int8 is written for onnx and openvino"),
    ("m.onnx", ExportOptions(int8_weights=True), {}, "are for openvino"),
    ("m.xml", ExportOptions(to="openvino", int8=True, int8_weights=True), {}, "not both"),
    ("m.onnx", ExportOptions(), {"images": torch.zeros(2, 3, 8, 8)}, r"images must be \[B 3 40 56\]"),
]


@pytest.mark.parametrize(("name", "options", "more", "message"), REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, name: str, options: ExportOptions, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export(pruned_vit(), tmp_path / name, options, **more)
    assert list(tmp_path.iterdir()) == []


def test_two_stages_are_refused(tmp_path: Path) -> None:
    model = tiny_vit(depth=2).float()
    plan = prune_(model, PruneConfig(method="cpvit-merge", macs=0.7))
    unprune_(model)
    with pytest.raises(ExportError, match=r"two stages cannot be exported.*export the light plan"):
        export(escalate(model, Escalation(plan, None, 0.3)), tmp_path / "m.onnx")


def test_a_file_that_answers_otherwise_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.onnx").write_text("the old one")
    export_module = __import__("cpvit.export.exporting", fromlist=["open_exported"])
    honest = export_module.open_exported

    def wrong(path: Path) -> ExportedModel:
        opened = honest(path)
        return ExportedModel(
            opened.path, opened.description, lambda images: opened.run(images)[:, ::-1].copy()
        )

    monkeypatch.setattr(export_module, "open_exported", wrong)
    with pytest.raises(
        ExportError, match=r"does not answer as torch does: on 16 images of noise KL .* nothing was"
    ):
        export(pruned_vit(), tmp_path / "m.onnx")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"m.onnx": "the old one"}


def test_a_wrong_number_of_outputs_and_nan_are_noticed(tmp_path: Path) -> None:
    model = tiny_vit(depth=2).float()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(ExportError, match=r"answers \(16, 11\) with NaN"):
        export(model, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_program_is_refused_without_the_traceback_that_torch_logs(tmp_path: Path) -> None:
    (tmp_path / "cut.pt2").write_bytes(b"PK")
    logged: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger("torch.export")
    handler.emit = logged.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with pytest.raises(ExportError, match=r"torch cannot read .*cut\.pt2"):
            open_exported(tmp_path / "cut.pt2")
    finally:
        logger.removeHandler(handler)
    assert logged == []
    assert not logger.disabled


def test_foreign_damaged_and_missing_files(tmp_path: Path) -> None:
    good = tmp_path / "m.onnx"
    export(pruned_vit(), good)
    for suffix, reader in ((".onnx", "ONNX Runtime"), (".xml", "OpenVINO"), (".pt2", "torch")):
        cut = tmp_path / f"cut{suffix}"
        cut.write_bytes(good.read_bytes()[:3000])
        with pytest.raises(ExportError, match=f"{reader} cannot read .*cut"):
            open_exported(cut)
        with pytest.raises(ExportError, match="is not a file"):
            open_exported(tmp_path / f"none{suffix}")
    with pytest.raises(ExportError, match=r"is no exported file: expected one of \.onnx, \.xml, \.pt2"):
        open_exported(tmp_path / "m.bin")
    import onnx

    foreign = onnx.load(good)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(ExportError, match="was not written by cpvit export"):
        open_exported(tmp_path / "foreign.onnx")
    foreign.metadata_props.add(key="cpvit", value='{"weights_sha256": "", "version": 99}')
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(ExportError, match="version 99 is newer than this cpvit reads"):
        open_exported(tmp_path / "foreign.onnx")


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.path,)


def test_a_torch_file_cannot_run_code(tmp_path: Path) -> None:
    export(tiny_vit(depth=1).float(), tmp_path / "m.pt2", ExportOptions(to="torch"))
    payload = io.BytesIO()
    torch.save(Bomb(tmp_path / "exploded"), payload)
    with zipfile.ZipFile(tmp_path / "m.pt2") as good, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as bad:
        inputs = [name for name in good.namelist() if "sample_inputs" in name]
        assert inputs, "what the program was traced with is kept as a pickle"
        for name in good.namelist():
            bad.writestr(name, payload.getvalue() if name in inputs else good.read(name))
    with pytest.raises(ExportError, match="torch cannot read"):
        open_exported(tmp_path / "bad.pt2")
    assert not (tmp_path / "exploded").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_damaged_openvino_file_is_read_as_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``read_model`` tries the readers of TensorFlow and Paddle on it; what OpenVINO quotes of it may be no text."""
    export(pruned_vit(), tmp_path / "m.xml", ExportOptions(to="openvino"))
    whole = (tmp_path / "m.xml").read_bytes()
    monkeypatch.setattr("openvino.Core.read_model", None)
    assert open_exported(tmp_path / "m.xml").description.format == "openvino"
    for damaged, said in (
        (b"no XML", "No document element"),
        (whole.replace(b'type="P', b'type="\xf2'), "is no text"),
    ):
        (tmp_path / "m.xml").write_bytes(damaged)
        with pytest.raises(ExportError, match=f"OpenVINO cannot read .*m.xml: .*{said}"):
            open_exported(tmp_path / "m.xml")


def test_a_missing_weights_file(tmp_path: Path) -> None:
    export(pruned_vit(), tmp_path / "m.xml", ExportOptions(to="openvino"))
    (tmp_path / "m.bin").unlink()
    with pytest.raises(ExportError, match="OpenVINO cannot read"):
        open_exported(tmp_path / "m.xml")


def test_a_missing_package_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(ExportError, match=r"pip install 'cpvit\[openvino\]'"):
        export(pruned_vit(), tmp_path / "m.xml", ExportOptions(to="openvino"))


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    exported = open_exported(export(pruned_vit(), tmp_path / "m.onnx").path)
    with pytest.raises(ExportError, match=r"takes images of \(3, 40, 56\), got \(3, 56, 40\)"):
        exported(torch.zeros(1, 3, 56, 40))
    assert exported.run(numpy.zeros((1, 3, *IMAGE), numpy.float32)).shape == (1, 11)
