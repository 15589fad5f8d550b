"""``cpvit embed``: features of every image of a collection, into Parquet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cpvit.bulk.columns import DtypeOut
from cpvit.bulk.features import Kind
from cpvit.commands.bulk import run_bulk
from cpvit.commands.bulk_options import BulkImages, BulkInstead, BulkModelOptions, BulkOutput, BulkRequest
from cpvit.commands.options import CalibrationOptions, PreprocessingOptions
from cpvit.plans.config import PruneConfig

BY_DEFAULT = BulkInstead()


@dataclass(frozen=True)
class EmbedOutput(BulkOutput):
    """What to write, where to, and who does it."""

    features: Kind = "pooled"
    """pooled: what the classifier reads, or the output of a model without one. class: the class token. mean: of the
    patch tokens, weighted by the patches each stands for. tokens: all that are left, with positions and sizes."""
    dtype_out: DtypeOut = "float32"
    """Of the values; int8 comes with a scale for each vector."""


def run(
    model: BulkModelOptions,
    images: BulkImages,
    pruning: PruneConfig,
    calibration: CalibrationOptions,
    preprocessing: PreprocessingOptions,
    output: EmbedOutput,
    instead: BulkInstead = BY_DEFAULT,
    json: Path | None = None,
) -> None:
    """Embed every image of a collection once, into Parquet files.

    Killed at any moment, the same command line with --resume goes on, and the files are those of a run that nothing
    disturbed. Started by torchrun, each process makes a share of the files; --engine ray does it on a cluster.

    Args:
        json: Write the record behind what is printed to this file.
    """
    request = BulkRequest(
        model,
        images,
        pruning,
        instead,
        calibration,
        preprocessing,
        output,
        features=output.features,
        dtype_out=output.dtype_out,
    )
    run_bulk(request, json)
