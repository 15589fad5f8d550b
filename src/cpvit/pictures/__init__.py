"""Pictures of what a pruned model does to an image."""

from cpvit.pictures.attention import paint_attention
from cpvit.pictures.patches import MODES, Mode, paint_block
from cpvit.pictures.survivors import draw_survivors, stages

__all__ = ["MODES", "Mode", "draw_survivors", "paint_attention", "paint_block", "stages"]
