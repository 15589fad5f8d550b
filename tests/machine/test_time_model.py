"""The time model: interpolation between timed counts, and which of the timed pieces a block is made of."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from conftest import tiny_vit

from cpvit.adapters import open_host
from cpvit.machine.block_profiler import BlockProfiler, Piece
from cpvit.machine.time_model import BlockTimes, TimeModel, _rising, time_model
from cpvit.methods import method_named

STEP = ((1, 0.0),)
"""A piece that takes no time."""


@pytest.mark.parametrize(
    ("patches", "seconds"), [(5, 1.0), (10, 1.0), (12, 1.4), (18, 2.6), (20, 3.0), (50, 3.0)]
)
def test_between_two_timed_counts_lies_a_straight_line_and_outside_it_is_level(
    patches: int, seconds: float
) -> None:
    points = ((10, 1.0), (20, 3.0))
    assert BlockTimes({"plain": points}, STEP).seconds("plain", patches, 1) == pytest.approx(seconds)
    assert BlockTimes({"plain": STEP}, points).seconds("plain", 1, patches) == pytest.approx(seconds)


def test_a_block_is_timed_as_plain_scored_or_removing_by_what_it_does() -> None:
    block = BlockTimes({"plain": ((1, 1.0),), "score": ((1, 10.0),), "remove": ((1, 100.0),)}, STEP)
    model = TimeModel((block,) * 3, 1000.0, 1, 10, method_named("cpvit"))
    assert model.total((10, 5, 5)) == 1000 + 10 + 100 + 1
    assert model.total((10, 10, 5)) == 1000 + 10 + 10 + 100
    assert model.dense == 1003


def test_more_patches_never_take_less_time_and_no_time_is_negative() -> None:
    assert _rising([(3, 5.0), (1, 3.0), (2, 2.0)]) == ((1, 3.0), (2, 3.0), (3, 5.0))
    assert _rising([(1, -1.0), (2, 0.5)]) == ((1, 0.0), (2, 0.5))


class Linear(BlockProfiler):
    """2 ms per entering patch, 1 ms per patch that reaches the MLP, 10 ms for a removal, 500 ms outside the blocks."""

    outside = 0.5

    def seconds(self, wanted: Sequence[Piece]) -> dict[Piece, float]:
        return {piece: self._one(piece) for piece in wanted}

    def _one(self, piece: Piece) -> float:
        if piece.kind == "model":
            return self.host.depth * 0.003 * self.host.num_patches + self.outside
        leaving = piece.patches if piece.keep is None else piece.keep
        if piece.kind == "mlp":
            return 0.001 * leaving
        return 0.002 * piece.patches + 0.001 * leaving + 0.01 * (piece.kind == "remove")


def test_a_model_is_the_sum_of_its_blocks_and_what_is_outside_of_them() -> None:
    model = time_model(Linear(open_host(tiny_vit()), method_named("cpvit"), 2))
    assert model.outside == pytest.approx(0.5)
    assert model.blocks[1].seconds("remove", 30, 20) == pytest.approx(0.06 + 0.02 + 0.01)
    assert model.total((30, 20, 9)) == pytest.approx(
        0.5 + (0.070 + 0.030 + 0.01) + (0.060 + 0.020 + 0.01) + (0.040 + 0.009 + 0.01)
    )


def test_a_model_timed_faster_than_its_blocks_has_nothing_outside_of_them() -> None:
    bench = Linear(open_host(tiny_vit()), method_named("cpvit"), 2)
    bench.outside = -0.1
    assert time_model(bench).outside == 0
