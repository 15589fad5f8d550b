"""cpvit: make a pretrained Vision Transformer faster by pruning its patches and heads while it runs."""

import sys

from cpvit import _moved
from cpvit.adapters import UnsupportedModelError
from cpvit.multimodal.prune import VlmPruning, prune_vlm_, unprune_vlm_
from cpvit.plans.calibration import Calibration
from cpvit.plans.config import PruneConfig
from cpvit.plans.escalation import Escalation, load_plan
from cpvit.plans.plan import Plan
from cpvit.pruning.calibrate import calibrate
from cpvit.pruning.cascade import PruningBypassError
from cpvit.pruning.escalation import escalate
from cpvit.pruning.prune import plan_of, prune_, unprune_
from cpvit.pruning.record import Trace, record
from cpvit.pruning.verify import VerificationError, verify
from cpvit.weights.saving import load_pruned, save_pruned

_moved.install(sys.modules[__name__])

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Escalation",
    "Plan",
    "PruneConfig",
    "PruningBypassError",
    "Trace",
    "UnsupportedModelError",
    "VerificationError",
    "VlmPruning",
    "calibrate",
    "escalate",
    "load_plan",
    "load_pruned",
    "plan_of",
    "prune_",
    "prune_vlm_",
    "record",
    "save_pruned",
    "unprune_",
    "unprune_vlm_",
    "verify",
]
