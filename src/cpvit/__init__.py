"""cpvit: make a pretrained Vision Transformer faster by pruning its patches and heads while it runs."""

from cpvit.adapters import UnsupportedModelError
from cpvit.calibrate import Calibration, calibrate
from cpvit.cascade import PruningBypassError
from cpvit.plan import Plan, PruneConfig
from cpvit.prune import Trace, plan_of, prune_, record, unprune_
from cpvit.saving import load_pruned, save_pruned
from cpvit.verify import VerificationError, verify

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Plan",
    "PruneConfig",
    "PruningBypassError",
    "Trace",
    "UnsupportedModelError",
    "VerificationError",
    "calibrate",
    "load_pruned",
    "plan_of",
    "prune_",
    "record",
    "save_pruned",
    "unprune_",
    "verify",
]
