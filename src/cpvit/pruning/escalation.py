"""A model in two stages: pruned hard for all images, gently or not at all for those it is unsure about.

Whether an image is unsure is a matter of its own output, so an image alone gets what it gets in a batch. The unsure
images are gathered into a batch of their own. Blocks before the first that lets a patch go are the same in both stages
and run once.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from cpvit.adapters import Host
from cpvit.plans.costs import cost_model
from cpvit.plans.escalation import Escalation
from cpvit.pruning.cascade import SharedBlocks, keep_everything, sharing
from cpvit.pruning.install import install
from cpvit.pruning.opening import open_restored
from cpvit.pruning.prune import prune_host


class EscalatingModel(nn.Module):
    """Behaves as the model does: images [B 3 H W] -> logits [B K]. See :func:`escalate`."""

    def __init__(self, light: Host, second: Host, escalation: Escalation) -> None:
        super().__init__()
        self.light_model = light.model
        self.second_model = second.model
        self._hosts = (light, second)
        self.escalation = escalation

    @property
    def host(self) -> Host:
        """This model where the library expects an opened one; its blocks are those of the light stage."""
        return dataclasses.replace(self._hosts[0], model=self, output=_logits)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B K]: of the light stage, and of the second where the margin was small."""
        light, second = self._hosts
        shared = SharedBlocks(self.escalation.shared_blocks)
        with sharing(shared):
            logits = light.output(self.light_model(images))
        unsure = self._unsure(logits)
        if not len(unsure):
            return logits
        with sharing(shared.of(unsure)):
            again = second.output(self.second_model(images[unsure]))
        return logits.index_copy(0, unsure, again.to(logits.dtype))

    def _unsure(self, logits: Tensor) -> Tensor:
        """Which images run again: [B K] -> [b]."""
        return (prediction_margin(logits) < self.escalation.margin).nonzero().flatten()


class ForcedShare(EscalatingModel):
    """The same, but a fixed share of every batch runs again: to be timed on noise, of which a model is never sure."""

    def _unsure(self, logits: Tensor) -> Tensor:
        count = round(self.escalation.share * len(logits))
        return prediction_margin(logits).argsort()[:count].sort().values


def _logits(output: Tensor) -> Tensor:
    return output


def prediction_margin(logits: Tensor) -> Tensor:
    """Difference of the two largest class probabilities: [B K] -> [B], float32."""
    best = logits.float().softmax(dim=-1).topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


def escalate(model: nn.Module, escalation: Escalation, *, verify: bool = True) -> EscalatingModel:
    """A model that runs every image under a light plan and unsure images again under a second one, or dense.

    Both stages share the model's weights; the model itself is left untouched. For inference: train the stages apart.

    Args:
        model: A model with a classification head of at least two classes.
        escalation: Plans and margin, e.g. from :func:`cpvit.tuning.escalate.tune_escalation`.
        verify: First check that, with everything kept, the output equals the untouched model's.

    Raises:
        UnsupportedModelError: The model cannot be pruned.
        ValueError: A plan does not fit the model, or corrects projections, which needs calibration images.

    Example:
        >>> fast = escalate(model, load_plan("escalate.json"))  # doctest: +SKIP
        >>> logits = fast(images)  # doctest: +SKIP
    """
    return escalate_host(open_restored(model), escalation, verify=verify)


def escalate_host(
    host: Host, escalation: Escalation, *, verify: bool = True, kind: type[EscalatingModel] = EscalatingModel
) -> EscalatingModel:
    """:func:`escalate` for a model that is opened already."""
    light, second = host.copy_sharing_weights(), host.copy_sharing_weights()
    prune_host(light, escalation.light, verify=verify)
    if (
        escalation.second is None
    ):  # the dense model, run by a cascade so that it can start behind the shared blocks
        install(second, keep_everything(second))
    else:
        prune_host(second, escalation.second, verify=False)
    return kind(light, second, escalation).train(host.model.training)


def mean_macs(host: Host, escalation: Escalation, share: float) -> float:
    """MACs of an image over the dense model's, if this share of the images runs again.

    ``host`` is the untouched model. What the shared blocks cost is spent once; the patch embedding runs again.
    """
    tokens = host.num_tokens
    shared = host.blocks[: escalation.shared_blocks]
    saved = sum(block.costs().macs(tokens, tokens) for block in shared) / cost_model(host).dense
    second = 1.0 if escalation.second is None else escalation.second.macs_ratio
    return escalation.light.macs_ratio + share * (second - saved)
