"""Options of ``cpvit predict`` and ``cpvit embed``. The help text of every flag is the docstring below its field."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cpvit.bulk.columns import DtypeOut
from cpvit.bulk.features import Kind
from cpvit.bulk.folder import check_folder
from cpvit.bulk.ray_engine import RayOptions
from cpvit.bulk.requirements import required
from cpvit.bulk.running import OnError
from cpvit.commands.options import CalibrationOptions, ModelOptions, PreprocessingOptions
from cpvit.plans.config import PruneConfig


@dataclass(frozen=True)
class BulkModelOptions(ModelOptions):
    """Which model, with which weights, and where it runs."""

    model: str = ""
    """As for every command; not with --exported."""


@dataclass(frozen=True)
class BulkInstead:
    """What to run instead of a model pruned by a method and a budget."""

    plan: Path | None = None
    """A plan written by ``cpvit plan``, or two to escalate between."""
    dense: bool = False
    """The dense model."""
    exported: Path | None = None
    """A file written by ``cpvit export``; it runs in its own runtime."""


@dataclass(frozen=True)
class BulkImages:
    """Which images."""

    data: str
    """A folder, a .tar, shards (a folder of .tar files or a pattern with braces), a .parquet or .csv file of paths, or
    a folder that datasets.save_to_disk wrote."""
    column: str | None = None
    """Column of the paths, by default "path"; of a data set its image column."""
    on_error: OnError = "row"
    """What an unreadable image is: a row with the reason and no values, or the end of the run."""
    batch_size: int = 32
    """Images per forward."""
    workers: int = 0
    """Processes that read and decode images, for each process that runs the model; 0 does it there, by its threads,
    which is faster where the model runs on a CPU."""


@dataclass(frozen=True, kw_only=True)
class BulkOutput(RayOptions):
    """Where to, and who does it."""

    out: Path
    """Folder for part-00000.parquet and so on."""
    rows_per_part: int = 16384
    """Images in each file; what a stop can lose, and the unit that processes and actors share the work by."""
    resume: bool = False
    """Go on with the run in --out, if there is one; it must be the same run."""
    engine: Literal["local", "ray"] = "local"
    """This process (or those of torchrun), or the actors of a Ray cluster."""


@dataclass(frozen=True)
class BulkRequest:
    """A whole command line; an actor on another machine builds its model from it."""

    model: BulkModelOptions
    images: BulkImages
    pruning: PruneConfig
    instead: BulkInstead
    calibration: CalibrationOptions
    preprocessing: PreprocessingOptions
    output: BulkOutput
    features: Kind | None = None
    top_k: int = 5
    dtype_out: DtypeOut = "float32"

    @property
    def command(self) -> str:
        """The verb."""
        return "predict" if self.features is None else "embed"


def check_request(request: BulkRequest) -> None:
    """Raise ValueError if options contradict one another, or the folder cannot be used."""
    instead, pruned = request.instead, request.pruning != PruneConfig()
    given = [name for name in ("plan", "exported") if getattr(instead, name) is not None]
    given += ["dense"] if instead.dense else []
    if len(given) > 1:
        raise ValueError(f"give one of {', '.join(f'--{name}' for name in given)}")
    if given and pruned:
        raise ValueError(f"--{given[0]} says what runs; leave out --method, --macs and the like")
    if request.pruning.align == "auto":
        raise ValueError(
            "--align auto measures anew on every start and machine, which may not find the same plan; make one with "
            "cpvit plan --align auto, and give it as --plan"
        )
    if instead.exported is not None and (
        request.model.model or request.preprocessing != PreprocessingOptions()
    ):
        raise ValueError(
            "--exported holds the model and how images are prepared; leave out --model, --mean and the like"
        )
    if instead.exported is None and not request.model.model:
        raise ValueError("give --model NAME, or --exported FILE")
    if request.output.engine == "ray" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--engine ray starts its own processes; start it without torchrun")
    if request.output.engine == "ray":
        required("ray")
    check_folder(request.output.out, request.images.data, resume=request.output.resume)
