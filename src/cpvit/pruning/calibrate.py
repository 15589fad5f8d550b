"""What a few unlabelled images tell about a model: how far each block looks, and which heads matter.

Both come from the attention of the untouched model. Legend: B images, H heads, N tokens, P prefix tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from cpvit.adapters import Host, UnsupportedModelError
from cpvit.core import head_score
from cpvit.plans.calibration import Calibration
from cpvit.plans.heads import HeadOutputs
from cpvit.pruning.cascade import BlockHook, BlockOutput, keep_everything, registered_hook
from cpvit.pruning.heads import projection_of
from cpvit.pruning.install import install, uninstall
from cpvit.pruning.opening import open_untouched


def calibrate(
    model: nn.Module, images: Tensor | Iterable[Tensor], *, head_outputs: bool = True
) -> Calibration:
    """Measure attention range and head scores on unlabelled images.

    Args:
        model: An untouched model (not a pruned one).
        images: [B 3 H W], or an iterable of such batches, preprocessed as for the model.
        head_outputs: Also take the mean and covariance of what the heads give, where heads can be cut: correcting
            the projection needs them. They are H*D x H*D float64 numbers per block; leave them out if no head goes.

    Raises:
        UnsupportedModelError: The model cannot be pruned.
        ValueError: No images, or the model is pruned already.
    """
    return calibrate_host(open_untouched(model, "calibrate"), images, head_outputs=head_outputs)


def calibrate_host(
    host: Host, images: Tensor | Iterable[Tensor], *, head_outputs: bool = True
) -> Calibration:
    """:func:`calibrate` for a model that is opened already."""
    statistics = _Statistics(host)
    moments = _watch_projections(host) if head_outputs else []
    cascade = keep_everything(host)
    install(host, cascade)
    try:
        with registered_hook(cascade, BlockHook(statistics.see, attention=True)):
            _run_all(host, images)
    finally:
        uninstall(host)
        for moment in moments:
            moment.hook.remove()
    found = statistics.result()
    return replace(found, head_outputs=tuple(moment.result() for moment in moments)) if moments else found


def _watch_projections(host: Host) -> list[_Moments]:
    """One for each block; none if its heads cannot be cut, which then needs no correction either."""
    try:
        projections = [projection_of(block) for block in host.blocks]
    except UnsupportedModelError:
        return []
    return [_Moments(projection) for projection in projections]


class _Moments:
    """Sums over the tokens that enter one projection."""

    def __init__(self, projection: nn.Linear) -> None:
        width = projection.in_features
        self.tokens = 0
        self.total = torch.zeros(width, dtype=torch.float64)
        self.square = torch.zeros(width, width, dtype=torch.float64)
        self.hook = projection.register_forward_pre_hook(self._see)

    def _see(self, module: nn.Module, args: tuple[Tensor]) -> None:
        tokens = args[0].flatten(0, -2).double()
        self.tokens += len(tokens)
        self.total += tokens.sum(dim=0).cpu()
        self.square += (tokens.T @ tokens).cpu()

    def result(self) -> HeadOutputs:
        mean = self.total / self.tokens
        return HeadOutputs(mean, self.square / self.tokens - mean.outer(mean))


@torch.no_grad()  # not in inference mode: a host may keep what it computes now (BEiT's indices) for training
def _run_all(host: Host, images: Tensor | Iterable[Tensor]) -> None:
    with host.in_eval_mode():
        for batch in images.split(32) if isinstance(images, Tensor) else images:
            host.model(batch.to(host.device, host.dtype))


class _Statistics:
    """Sums over images; one entry per block."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.distance = patch_distances(*host.grid)
        self.images = 0
        self.range_sum = torch.zeros(host.depth, dtype=torch.float64)
        self.head_sum = [torch.zeros(block.num_heads, dtype=torch.float64) for block in host.blocks]

    def see(self, output: BlockOutput) -> None:
        probs = output.probs
        assert probs is not None
        self.images += probs.shape[0] if output.block == 0 else 0
        range_ = attention_range(probs, self.host.num_prefix, self.distance.to(probs.device))
        self.range_sum[output.block] += range_.sum().double().cpu()
        self.head_sum[output.block] += head_score(probs.amax(dim=-2)).sum(0).double().cpu()

    def result(self) -> Calibration:
        if self.images == 0:
            raise ValueError("no calibration images were given; give at least one, 32 or more to be stable")
        return Calibration(
            images=self.images,
            attention_range=tuple((self.range_sum / self.images).tolist()),
            head_scores=tuple(tuple((total / self.images).tolist()) for total in self.head_sum),
        )


def patch_distances(rows: int, columns: int) -> Tensor:
    """Euclidean distance between every two patches of the grid, in patches: [n n]."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], dim=1).double()
    return torch.cdist(places, places).float()


def attention_range(probs: Tensor, num_prefix: int, distance: Tensor) -> Tensor:
    """Mean distance from each patch to the patch it attends to most, over heads and patches: [B H N N] -> [B].

    The released code asks whether that key lies within 10 places in the flattened sequence, on 150 random
    queries of one head; the distance on the grid, over all of them, says the same without the row wrap.
    """
    strongest = probs[:, :, num_prefix:, num_prefix:].argmax(dim=-1)
    return distance.gather(1, strongest.flatten(0, 1).T).T.reshape(strongest.shape).mean(dim=(1, 2))
