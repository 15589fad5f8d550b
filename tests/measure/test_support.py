"""The support table: every case is verified, pruned and saved; compiling and exporting once per kind of graph."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import cpvit.commands.support as command
from cpvit import PruneConfig, prune_
from cpvit.adapters import open_host
from cpvit.commands.cli import main
from cpvit.measure import support
from cpvit.measure.support import NOT_INSTALLED, YES, SupportRow, measure, random_images, small_model
from cpvit.measure.support_cases import CASES, Case, representatives

# Where cutting a head out of one block would not be exact it is refused, with the reason.
HEADLESS = {
    "vit_srelpos_small_patch16_224": "all blocks share one relative position bias",
    "vit_base_patch16_rope_mixed_224": "its rotary embedding is learned for each head",
    "eva02_base_patch16_clip_224": "its attention normalises the joined heads",
    "BeitModel, base": "all blocks share one relative position bias",
}


def case_id(case: Case) -> str:
    return f"{case.family}: {case.name}"


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def test_the_table_is_broad() -> None:
    assert len(CASES) >= 40
    assert max(Counter((case.family, case.name) for case in CASES).values()) == 1
    families = {case.family for case in representatives()}
    assert families == {case.family for case in CASES}
    assert any("huge" in case.name for case in CASES)
    assert any("5 x 9" in case.name for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_case_is_exact_and_can_be_pruned(case: Case) -> None:
    if case.package:
        pytest.importorskip(case.package)
    model = open_host(small_model(case))
    support.check(model)
    images = random_images(model, 2)
    survivors = support.measure_survivors(model, images)
    patches = 45 if "5 x 9" in case.name else 2 * 64 if "Video" in case.name else 64
    assert patches > survivors[0] > survivors[-1] >= 1
    heads, plan = support.prune_heads(model, images)
    if case.name in HEADLESS:
        assert heads.startswith(f"no: heads cannot be pruned in this model: {HEADLESS[case.name]}")
        assert plan.heads is None
    else:
        assert heads == YES
        assert plan.heads_per_block[-1] == 3
    assert support.run(model, images).isfinite().all()
    support.check_saving(model, images, case.arguments, support.untouched_model(case))


# Compiling and exporting takes seconds; families that differ in numbers only, or in the weights they come with,
# are left to the command.
GRAPHS = (
    "ViT",
    "ViT, relative positions",
    "DeiT, distilled",
    "SigLIP",
    "DINOv2, registers",
    "DINOv3",
    "EVA-02",
    "BEiT",
    "torchvision ViT",
    "transformers ViT",
    "transformers DINOv2, registers",
    "transformers DINOv3",
    "transformers BEiT",
    "transformers CLIP",
    "transformers SigLIP",
)


@pytest.mark.parametrize("family", GRAPHS)
def test_a_kind_of_graph_compiles_and_exports(family: str) -> None:
    case = next(case for case in representatives() if case.family == family)
    if case.package:
        pytest.importorskip(case.package)
    row = measure(case)
    assert row.failure == ""
    assert (row.compiles, row.exports, row.saves) == (YES, YES, YES)
    assert row.error <= row.tolerance
    assert row.head_pruning == YES
    assert not row.failed


def test_tokens_and_heads_are_those_of_the_full_model() -> None:
    row = measure(case_named("vit_huge_patch14_224"))
    assert (row.blocks, row.tokens, row.heads, row.patches) == (32, 257, 16, 64)


def test_every_part_of_a_small_model_matters() -> None:
    """LayerScale starts at 1e-5 and registers at 1e-6: with those nothing could fail."""
    model: Any = small_model(case_named("vit_small_patch14_reg4_dinov2"))
    assert model.blocks[0].ls1.gamma.abs().min() > 0.01
    assert model.reg_token.abs().mean() > 0.1
    assert model.blocks[0].attn.proj.bias.abs().mean() > 0.1


def test_the_same_seed_gives_the_same_model_and_draws_nothing_from_others() -> None:
    state = torch.random.get_rng_state()
    first, again = (small_model(case_named("vit_b_16"), seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(torch.random.get_rng_state(), state)


class TestFailures:
    """A cell says what went wrong, and the command then fails."""

    CASE = case_named("deit_tiny_patch16_224")

    @pytest.fixture
    def wrong_mlp(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from cpvit.adapters.timm_vit import TimmBlock

        monkeypatch.setattr(TimmBlock, "mlp_residual", lambda self, x: x + self.module.mlp(x))

    def test_a_model_that_is_not_reproduced(self, wrong_mlp: None) -> None:
        row = measure(self.CASE)
        assert row.failed
        assert "with everything kept the output differs from the host's" in row.failure

    def test_a_model_that_does_not_prune(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "cpvit.core.CPViT.reduce", lambda self, x, state, inputs, step, num_prefix: (x, state)
        )
        row = measure(self.CASE)
        assert row.failed
        assert row.failure.startswith("(64, 64, 64, 64) of 64 patches left the blocks, planned (44")

    def test_outputs_that_differ(self, monkeypatch: pytest.MonkeyPatch) -> None:
        host = open_host(small_model(self.CASE))
        images = random_images(host, 3)
        monkeypatch.setattr(support, "run", lambda host, images: torch.ones(3, 10))
        prune_(host.model)
        assert support._outcome(support.check_compile, host, images).startswith("no: the output differs by")
        assert support._outcome(support.check_export, host, images).startswith("no: the output differs by")
        got = support._outcome(support.check_saving, host, images, {})
        assert got == "no: the loaded model's output differs"

    def test_the_command_fails_and_names_the_model(
        self, wrong_mlp: None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["support", "--pattern", "deit_tiny_patch16_224"]) == 1
        printed = capsys.readouterr()
        assert "| DeiT | deit_tiny_patch16_224 | deit_tiny_patch16_224: with everything kept" in printed.out
        error = "cpvit: error: 1 of 1 supported models fail: deit_tiny_patch16_224; see their rows\n"
        assert printed.err.endswith(error)

    @pytest.mark.parametrize("cell", ["compiles", "exports", "saves"])
    def test_one_cell_is_enough(self, cell: str) -> None:
        row = SupportRow("a", "b", **{cell: "no: why"})
        assert row.failed

    def test_heads_that_cannot_be_cut_are_no_failure(self) -> None:
        assert not SupportRow("a", "b", head_pruning="no: why", compiles=YES).failed


def test_without_transformers_its_models_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpvit.measure.support.importlib.util.find_spec", lambda name: None)
    row = measure(case_named("ViTModel, base"))
    assert row.failure == NOT_INSTALLED.format("transformers") == "skipped: transformers not installed"
    assert not row.failed


def test_the_command_writes_the_table_and_the_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "check_export", lambda model, images: None)
    files = ["--markdown", str(tmp_path / "support.md"), "--json", str(tmp_path / "support.json")]
    assert main(["support", "--pattern", "beitv2_base*", *files]) == 0
    table = capsys.readouterr().out
    row = "| BEiT v2 | beitv2_base_patch16_224 | 12 | 197 | 12 | "
    assert row in table
    assert table.strip().endswith("of 64 | yes | yes | yes | yes |")
    text = (tmp_path / "support.md").read_text()
    assert text.endswith(table)
    assert "Written by `cpvit support --pattern 'beitv2_base*' --markdown" in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    record = json.loads((tmp_path / "support.json").read_text())
    assert record["rows"][0]["survivors"][-1] < record["rows"][0]["patches"] == 64
    assert record["environment"]["versions"]["torch"] in torch.__version__


def test_a_pattern_that_matches_nothing_lists_the_families(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["support", "--pattern", "resnet"]) == 1
    assert "no model or family matches 'resnet'; there are ViT; ViT, AugReg" in capsys.readouterr().err


def test_a_family_is_a_pattern_too() -> None:
    assert {case.family for case in command._matching("DeiT-III")} == {"DeiT-III"}


@pytest.mark.parametrize("case", representatives(), ids=case_id)
def test_what_leaves_the_last_block_is_free_only_where_nothing_reads_it(case: Case) -> None:
    """A model that says so must answer alike however many patches leave its last block."""
    if case.package:
        pytest.importorskip(case.package)
    host = open_host(small_model(case))
    images = random_images(host, 2)
    outputs = []
    for last in (1, host.num_patches // 2):
        counts = (host.num_patches, *[host.num_patches // 2] * (host.depth - 2), last)
        prune_(host.model, PruneConfig(method="cpvit-merge", keep_per_block=counts), verify=False)
        outputs.append(support.run(host, images))
    alike = outputs[0].shape == outputs[1].shape and torch.allclose(*outputs, rtol=1e-4, atol=1e-5)
    assert alike or not host.discards_patches
    if host.pools_patches:
        assert not host.discards_patches
