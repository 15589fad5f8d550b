"""``cpvit verify``: does cpvit know this model exactly?"""

from __future__ import annotations

from cpvit.commands.common import build_model, set_seed
from cpvit.commands.options import ModelOptions
from cpvit.verify import VerificationError, verify


def run(model: ModelOptions, seed: int = 0) -> None:
    """Check that, with everything kept, the pruned model's output equals the model's own.

    Args:
        seed: Of the random image, and of the weights without a checkpoint.
    """
    set_seed(seed)
    result = verify(build_model(model, weights_needed=False), seed=seed)
    if not result.passed:
        raise VerificationError(result.summary())
    print(result.summary())
