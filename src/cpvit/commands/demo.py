"""``cpvit demo``: a small model that comes with the package, dense and pruned."""

from __future__ import annotations

from pathlib import Path

from cpvit.commands.common import write_record
from cpvit.demo import describe, run_demo


def run(
    output: Path = Path("cpvit-demo.png"), keep_rate: float = 0.5, seed: int = 0, json: Path | None = None
) -> None:
    """Prune the packaged digit model: accuracy, MACs, measured speed, and a picture of what survives.

    Args:
        output: Where to write the picture (PNG).
        keep_rate: Fraction of the patches left at the end.
        seed: Of the images.
        json: Write the record behind what is printed to this file.
    """
    result = run_demo(output, keep_rate=keep_rate, seed=seed)
    print(describe(result))
    write_record(result, json)
