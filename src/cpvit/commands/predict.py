"""``cpvit predict``: the likeliest classes of every image of a collection, into Parquet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cpvit.commands.bulk import run_bulk
from cpvit.commands.bulk_options import BulkImages, BulkInstead, BulkModelOptions, BulkOutput, BulkRequest
from cpvit.commands.options import CalibrationOptions, PreprocessingOptions
from cpvit.plans.config import PruneConfig

BY_DEFAULT = BulkInstead()


@dataclass(frozen=True)
class PredictOutput(BulkOutput):
    """What to write, where to, and who does it."""

    top_k: int = 5
    """Classes for each image, likeliest first."""


def run(
    model: BulkModelOptions,
    images: BulkImages,
    pruning: PruneConfig,
    calibration: CalibrationOptions,
    preprocessing: PreprocessingOptions,
    output: PredictOutput,
    instead: BulkInstead = BY_DEFAULT,
    json: Path | None = None,
) -> None:
    """Classify every image of a collection once, into Parquet files.

    Killed at any moment, the same command line with --resume goes on, and the files are those of a run that nothing
    disturbed. Started by torchrun, each process makes a share of the files; --engine ray does it on a cluster.

    Args:
        json: Write the record behind what is printed to this file.
    """
    request = BulkRequest(
        model, images, pruning, instead, calibration, preprocessing, output, top_k=output.top_k
    )
    run_bulk(request, json)
