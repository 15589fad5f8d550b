"""Load a weights file into a model: strictly, from whatever layout it has, without running code in it.

A file is read (:mod:`~cpvit.checkpoints.reading`: safetensors, torch pickle or npz), its layout is recognised
by the names of its tensors and they are renamed to the model's (:mod:`~cpvit.checkpoints.layouts`), and they
are fitted to the model (:mod:`~cpvit.checkpoints.loading`). Nothing is loaded partially.
"""

from cpvit.checkpoints.loading import CheckpointReport, load_checkpoint
from cpvit.checkpoints.reading import CheckpointError, head_classes

__all__ = ["CheckpointError", "CheckpointReport", "head_classes", "load_checkpoint"]
