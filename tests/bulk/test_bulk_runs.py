"""What is written: values, types, metadata, bad images; and what is said and refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bulk_runs import (
    BAD,
    CLASSES,
    COUNT,
    SIDE,
    asked,
    contents,
    name_of,
    pa,
    parts,
    pq,
    ran,
    whole,
    write_folder,
    write_tar,
    write_weights,
)
from safetensors.torch import save_file

from cpvit import Plan, __version__, unprune_
from cpvit.adapters import open_host
from cpvit.bulk import read_description
from cpvit.bulk.columns import stored
from cpvit.bulk.features import FeatureReader
from cpvit.bulk.stages import Stages, throughput
from cpvit.commands.cli import main
from cpvit.data import Preprocessing, find_samples, make_loader
from cpvit.export.program import digest
from cpvit.plans.config import PruneConfig
from cpvit.plans.escalation import Escalation
from cpvit.pruning.escalation import escalate
from cpvit.pruning.prune import prune_
from cpvit.pruning.record import record
from cpvit.weights.create import create_model
from cpvit.weights.loading import load_checkpoint

MERGED = ["--method", "cpvit-merge", "--macs", "0.7"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images") / "folder", COUNT)


@pytest.fixture
def model(weights: Path) -> Any:
    made = create_model("test_vit", num_classes=CLASSES, image_size=SIDE).eval()
    load_checkpoint(made, weights)
    return made


@pytest.fixture(scope="module")
def images(folder: Path, weights: Path) -> torch.Tensor:
    made = create_model("test_vit", num_classes=CLASSES, image_size=SIDE)
    source = find_samples(folder, split=None)
    loader = make_loader(source, Preprocessing.from_model(made), labels=None, batch_size=COUNT)
    (batch,) = list(loader)
    assert batch.keys == tuple(name_of(number) for number in range(COUNT))
    return batch.images


def column(table: Any, name: str) -> torch.Tensor:
    return torch.tensor(np.array(table[name].to_pylist()))


@pytest.mark.parametrize("pruned", [False, True])
@torch.inference_mode()
def test_predictions_are_those_of_the_model(
    weights: Path, folder: Path, tmp_path: Path, model: Any, images: torch.Tensor, pruned: bool
) -> None:
    found = ran(
        "predict", weights, folder, tmp_path / "out", "--top-k", "3", *(MERGED if pruned else ["--dense"])
    )
    if pruned:
        prune_(model, PruneConfig(method="cpvit-merge", macs=0.7))
    expected = model(images).softmax(1).topk(3, dim=1)
    assert found["row"].to_pylist() == list(range(COUNT))
    assert found["key"].to_pylist() == [name_of(number) for number in range(COUNT)]
    assert torch.equal(column(found, "classes"), expected.indices)
    torch.testing.assert_close(column(found, "probabilities").float(), expected.values, atol=1e-5, rtol=1e-5)
    assert found["error"].null_count == COUNT
    assert [pq.read_metadata(path).num_rows for path in parts(tmp_path / "out")] == [8, 8, 8, 6]


@pytest.mark.parametrize("features", ["pooled", "class", "mean", "tokens"])
@pytest.mark.parametrize("method", ["dense", "cpvit-merge", "cpvit"])
@torch.inference_mode()
def test_features_are_those_of_the_model(
    weights: Path, folder: Path, tmp_path: Path, model: Any, images: torch.Tensor, features: str, method: str
) -> None:
    budget = ["--dense"] if method == "dense" else ["--method", method, "--macs", "0.75"]
    found = ran("embed", weights, folder, tmp_path / "out", "--features", features, *budget)
    described = read_description(tmp_path / "out/part-00000.parquet")
    sizes = torch.ones(COUNT, 16)
    if method != "dense":
        (tmp_path / "plan.json").write_text(json.dumps(described["plan"]))
        plan = Plan.load(tmp_path / "plan.json")
        prune_(model, plan)
        with record(model) as trace:
            tokens = model.forward_features(images)
        counts = trace.carriers[-1]
        sizes = torch.ones(COUNT, plan.patches_per_block[-1])
        if counts is not None:
            sizes = torch.stack([row.bincount(minlength=sizes.shape[1]) for row in counts]).float()
    else:
        tokens = model.forward_features(images)
    if features == "tokens":
        first = found["tokens"].to_pylist()
        torch.testing.assert_close(torch.tensor(first), tokens, atol=1e-4, rtol=1e-4)
        positions = column(found, "positions")
        assert (positions[:, 0] == -1).all()
        assert ((positions[:, 1:] >= 0) & (positions[:, 1:] < 16)).all()
        assert torch.equal(column(found, "sizes")[:, 1:].float(), sizes)
        return
    patches = tokens[:, 1:]
    expected = {
        "pooled": model.forward_head(tokens, pre_logits=True),
        "class": tokens[:, 0],
        "mean": (patches * sizes[..., None]).sum(1) / sizes.sum(1, keepdim=True),
    }[features]
    torch.testing.assert_close(column(found, "embedding").float(), expected, atol=1e-4, rtol=1e-4)


def test_values_as_they_are_stored() -> None:
    values = torch.tensor([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0], [1e-3, 2e-3, -4e-3]])
    small, scales = stored(values, "int8")
    assert small.dtype == np.int8
    assert scales is not None
    assert np.abs(small * scales[:, None] - values.numpy()).max() <= scales.max() / 2 + 1e-9
    assert small[0, 0] == 127
    assert not small[1].any()
    assert stored(values, "float16")[0].dtype == np.float16
    with pytest.raises(ValueError, match="too large for float16"):
        stored(values * 1e6, "float16")
    with pytest.raises(ValueError, match="not finite"):
        stored(values / 0, "float32")


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("features", ["pooled", "tokens"])
def test_duckdb_and_polars_read_the_files_as_they_are(
    weights: Path, folder: Path, tmp_path: Path, dtype: str, features: str
) -> None:
    duckdb, polars = pytest.importorskip("duckdb"), pytest.importorskip("polars")
    out = tmp_path / "out"
    found = ran("embed", weights, folder, out, "--features", features, "--dtype-out", dtype, *MERGED)
    name = "embedding" if features == "pooled" else "tokens"
    wanted = np.array([np.ravel(row) for row in found[name].to_pylist()], np.float32)
    by_duckdb = duckdb.sql(f"select row, {name} from '{out}/*.parquet' order by row").fetchall()
    by_polars = polars.read_parquet(f"{out}/*.parquet").sort("row")
    for values in ([row[1] for row in by_duckdb], by_polars[name].to_list()):
        assert np.array_equal(np.array([np.ravel(row) for row in values], np.float32), wanted)
    assert by_polars["key"].to_list() == [name_of(number) for number in range(COUNT)]
    assert duckdb.sql(f"select count(*) from '{out}/*.parquet' where error is null").fetchall() == [(COUNT,)]
    if dtype == "int8":
        dense = ran("embed", weights, folder, tmp_path / "float", "--features", features, *MERGED)
        exact = np.array([np.ravel(row) for row in dense[name].to_pylist()])
        scales = found["scale" if features == "pooled" else "scales"].to_pylist()
        repeated = np.repeat(
            np.array(scales).reshape(COUNT, -1), wanted.shape[1] // np.array(scales[0]).size, axis=1
        )
        assert np.abs(wanted * repeated - exact).max() <= repeated.max() / 2 + 1e-6


def test_the_metadata_says_what_made_the_file(
    weights: Path, folder: Path, tmp_path: Path, model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "record.json"
    ran("embed", weights, folder, tmp_path / "out", "--dtype-out", "float16", *MERGED, "--json", str(found))
    described = read_description(tmp_path / "out/part-00003.parquet")
    assert described["command"] == "embed"
    assert described["model"] == "test_vit"
    assert described["weights_sha256"] == digest(model)
    assert described["plan"]["dial"] == "macs=0.7"
    assert described["plan"]["method"] == "cpvit-merge"
    assert described["preprocessing"] == Preprocessing.from_model(model).to_dict()
    assert described["version"] == __version__
    assert (described["features"], described["dtype_out"], described["dtype"]) == (
        "pooled",
        "float16",
        "float32",
    )
    told = json.loads(found.read_text())
    assert (told["images"], told["done"], told["parts"], told["processes"]) == (COUNT, COUNT, 4, 1)
    stages = told["stages"]
    assert stages["bottleneck"] in ("reading", "decoding", "forward", "writing")
    assert min(stages[name] for name in ("reading", "decoding", "forward", "writing")) > 0
    shown = capsys.readouterr().out
    assert f"30 images in {tmp_path / 'out'}: 30 done in" in shown
    assert f"bottleneck: {stages['bottleneck']}. What helps:" in shown
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="was not written by cpvit predict or cpvit embed"):
        read_description(tmp_path / "other.parquet")


def test_the_bottleneck_is_the_slowest_stage() -> None:
    spent = {"reading": 1.0, "decoding": 6.0, "forward": 4.0, "writing": 2.0, "waiting": 0.0}
    stages = Stages(images=100, **spent)
    alone = throughput(stages, 13, workers=0, processes=1)
    assert (alone.bottleneck, alone.decoding, alone.forward) == ("decoding", 100 / 6, 25)
    two = throughput(stages, 6, workers=2, processes=1)
    assert (two.bottleneck, two.decoding) == ("forward", 200 / 6)
    assert throughput(stages, 7, workers=1, processes=1).bottleneck == "decoding"
    assert throughput(stages, 3, workers=0, processes=2).forward == 50
    assert throughput(Stages(), 3, workers=0, processes=2).bottleneck == "none"


def test_two_stages(weights: Path, folder: Path, tmp_path: Path, model: Any, images: torch.Tensor) -> None:
    plan = prune_(model, PruneConfig(method="cpvit-merge", keep_per_block=(16, 8, 4, 3, 2, 1)))
    unprune_(model)
    pair = Escalation(plan, None, margin=0.3)
    pair.save(tmp_path / "pair.json")
    two = escalate(model, pair)
    again: list[int] = []
    two.second_model.register_forward_pre_hook(lambda _, args: again.append(len(args[0])))
    with torch.inference_mode():
        expected = two(images).softmax(1).topk(5, dim=1)
    assert 0 < sum(again) < COUNT, "some images run again, and some do not"
    asks = ["--plan", str(tmp_path / "pair.json")]
    found = ran("predict", weights, folder, tmp_path / "labels", *asks)
    assert torch.equal(column(found, "classes"), expected.indices)
    tokens = ran("embed", weights, folder, tmp_path / "tokens", "--features", "tokens", *asks)
    counts = [len(row) for row in tokens["positions"].to_pylist()]
    assert set(counts) == {2, 17}
    assert counts.count(17) == sum(again)
    vectors = ran("embed", weights, folder, tmp_path / "class", "--features", "class", *asks)
    firsts = torch.tensor([row[0] for row in tokens["tokens"].to_pylist()])
    torch.testing.assert_close(column(vectors, "embedding").float(), firsts)
    assert read_description(tmp_path / "tokens/part-00000.parquet")["plan"]["margin"] == 0.3


@pytest.mark.parametrize("more", [[], ["--with-preprocessing"], ["--batch-size", "4"]])
def test_an_exported_file(weights: Path, folder: Path, tmp_path: Path, more: list[str]) -> None:
    file = str(tmp_path / "tiny.pt2")
    common = [
        "--model",
        "test_vit",
        "--image-size",
        str(SIDE),
        "--device",
        "cpu",
        "--checkpoint",
        str(weights),
    ]
    assert main(["export", *common, "--to", "torch", "--out", file, *MERGED, *more]) == 0
    line = ["--exported", file, "--data", str(folder), "--rows-per-part", "8", "--batch-size", "4"]
    assert main(["predict", *line, "--out", str(tmp_path / "file")]) == 0
    expected = ran("predict", weights, folder, tmp_path / "model", *MERGED)
    found = whole(tmp_path / "file")
    assert found["classes"].equals(expected["classes"])
    torch.testing.assert_close(
        column(found, "probabilities"), column(expected, "probabilities"), atol=1e-4, rtol=1e-4
    )
    of_file, of_model = (
        read_description(tmp_path / name / "part-00000.parquet") for name in ("file", "model")
    )
    assert of_file["weights_sha256"] == of_model["weights_sha256"]
    assert (of_file["runtime"], of_file["plan"]) == ("torch", of_model["plan"]) or of_file[
        "runtime"
    ] == "torch"


def test_features_of_an_exported_file(
    weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", "test_vit", "--image-size", str(SIDE), "--device", "cpu"]
    headless = str(tmp_path / "features.pt2")
    assert main(["export", *common, "--num-classes", "0", "--to", "torch", "--out", headless, "--dense"]) == 0
    line = ["embed", "--data", str(folder), "--out", str(tmp_path / "out"), "--batch-size", "4", "--exported"]
    assert main([*line, headless, "--features", "tokens"]) == 1
    assert "an exported file gives its output alone" in capsys.readouterr().err
    assert main([*line, headless, "--features", "pooled"]) == 0
    assert len(whole(tmp_path / "out")["embedding"][0]) == 64


def test_bad_images_are_rows_with_the_reason(
    weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write_folder(tmp_path / "bad", COUNT, bad=True)
    good = ran("predict", weights, folder, tmp_path / "good", "--dense", "--batch-size", "1")
    found = ran("predict", weights, bad, tmp_path / "found", "--dense", "--batch-size", "1")
    assert "1 images could not be read; their rows say why" in capsys.readouterr().out
    said = found["error"][BAD].as_py()
    assert said.startswith(
        f"cannot read image {name_of(BAD)}: Pillow does not recognise it as an image of a format"
    )
    assert said.endswith("WEBP); repair or remove it")
    assert found["classes"][BAD].as_py() is None
    others = [row for row in range(COUNT) if row != BAD]
    for name in ("row", "key", "classes", "probabilities", "error"):
        assert found[name].take(others).equals(good[name].take(others))
    polars = pytest.importorskip("polars")
    assert (
        polars.read_parquet(f"{tmp_path}/found/*.parquet").filter(polars.col("error").is_not_null()).height
        == 1
    )


def test_a_bad_image_in_a_batch_and_a_batch_of_bad_images(
    weights: Path, folder: Path, tmp_path: Path
) -> None:
    bad = write_folder(tmp_path / "bad", COUNT, bad=True)
    for number in (8, 9, 10, 11):
        (bad / name_of(number)).write_bytes(b"")
    for features in ("tokens", "class"):
        found = ran("embed", weights, bad, tmp_path / features, "--features", features, *MERGED)
        errors = [row for row in range(COUNT) if found["error"][row].as_py() is not None]
        assert errors == [8, 9, 10, 11, BAD]
        assert all(found[found.column_names[2]][row].as_py() is None for row in errors)


def test_a_bad_image_stops_the_run_where_asked(
    weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, out = write_folder(tmp_path / "bad", COUNT, bad=True), tmp_path / "out"
    assert main(asked("predict", weights, bad, out, "--dense", "--on-error", "stop")) == 1
    said = capsys.readouterr().err
    assert f"{name_of(BAD)}: Pillow does not recognise it as an image" in said
    assert "--on-error row" in said
    assert [path.name for path in parts(out)] == ["part-00000.parquet", "part-00001.parquet"]
    assert not list(out.glob(".part*")), "nothing half-written is left"
    # Repaired, the run goes on and ends as if nothing had been.
    (bad / name_of(BAD)).write_bytes((folder / name_of(BAD)).read_bytes())
    assert main(asked("predict", weights, bad, out, "--dense", "--on-error", "stop", "--resume")) == 0
    assert contents(out) == contents(_ran_into(weights, folder, tmp_path / "whole"))


def _ran_into(weights: Path, folder: Path, out: Path) -> Path:
    ran("predict", weights, folder, out, "--dense")
    return out


def test_a_damaged_tar_stops_the_run(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = write_tar(tmp_path / "images.tar", COUNT)
    tar.write_bytes(tar.read_bytes()[:20_000])
    assert main(asked("predict", weights, tar, tmp_path / "out", "--dense")) == 1
    assert "as a tar archive" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["predict", "--top-k", "8"], "--top-k is 8; expected 1 to 7, the classes of the model"),
        (["predict", "--dense", "--macs", "0.6"], "--dense says what runs; leave out --method, --macs"),
        (["predict", "--dense", "--plan", "x.json"], "give one of --plan, --dense"),
        (["predict", "--exported", "x.onnx"], "leave out --model"),
        (["predict", "--align", "auto"], "--align auto measures anew"),
        (["predict", "--rows-per-part", "0"], "--rows-per-part is 0"),
        (["predict", "--batch-size", "0"], "batch_size is 0"),
        (["predict", "--column", "x"], "--column is for a .parquet or .csv file"),
    ],
)
def test_what_cannot_be_is_refused(
    weights: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    line: list[str],
    says: str,
) -> None:
    assert main(asked(line[0], weights, folder, tmp_path / "out", *line[1:])) == 1
    assert says in capsys.readouterr().err


def test_a_folder_that_is_no_place_for_output(
    weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(asked("predict", weights, folder, folder / "out", "--dense")) == 1
    assert "would be taken for images" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("")
    assert main(asked("predict", weights, folder, tmp_path / "full", "--dense")) == 1
    assert "is not empty (notes)" in capsys.readouterr().err
    assert main(asked("predict", weights, folder, tmp_path / "full/notes", "--dense")) == 1
    assert "is a file; give a folder" in capsys.readouterr().err


def test_a_model_without_a_class_token() -> None:
    host = open_host(create_model("vit_tiny_patch16_224", image_size=64, num_classes=0))
    with pytest.raises(ValueError, match="has no class token; use --features mean or pooled"):
        FeatureReader(dataclasses.replace(host, num_prefix=0), "class")


def test_a_model_without_a_classifier_predicts_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = create_model("test_vit", num_classes=0, image_size=SIDE)
    save_file(made.state_dict(), tmp_path / "headless.safetensors")
    line = asked(
        "predict",
        tmp_path / "headless.safetensors",
        folder,
        tmp_path / "out",
        "--dense",
        "--num-classes",
        "0",
    )
    assert main(line) == 1
    assert "has no classifier, so it predicts no classes; use cpvit embed" in capsys.readouterr().err
    found = ran(
        "embed", tmp_path / "headless.safetensors", folder, tmp_path / "out", "--dense", "--num-classes", "0"
    )
    assert len(found["embedding"][0]) == 64


def test_features_of_patches_do_not_lose_them_in_the_last_block(
    weights: Path, folder: Path, tmp_path: Path
) -> None:
    left = {}
    for features in ("class", "mean"):
        ran("embed", weights, folder, tmp_path / features, "--features", features, *MERGED)
        left[features] = read_description(tmp_path / features / "part-00000.parquet")["plan"][
            "patches_per_block"
        ]
    assert left["class"][-1] < left["mean"][-1]
