"""``cpvit verify``: does cpvit know this model exactly?"""

from __future__ import annotations

from pathlib import Path

from cpvit.commands.common import build_model, set_seed, write_record
from cpvit.commands.options import ModelOptions
from cpvit.verify import VerificationError, verify


def run(model: ModelOptions, seed: int = 0, json: Path | None = None) -> None:
    """Check that, with everything kept, the pruned model's output equals the model's own.

    Args:
        seed: Of the random image, and of the weights without a checkpoint.
        json: Write the record behind what is printed to this file.
    """
    set_seed(seed)
    result = verify(build_model(model, weights_needed=False), seed=seed)
    write_record(result, json)
    if not result.passed:
        raise VerificationError(result.summary())
    print(result.summary())
