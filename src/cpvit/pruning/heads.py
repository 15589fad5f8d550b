"""Attention heads: which ones go (cumulative score, cascade), cutting them out of the weights, and making up for it.

A pruned head leaves Q, K, V and the projection physically: the matrices get smaller, so does the file. What the
lost heads gave can in part be predicted from what the others give, since heads are correlated. The best linear
prediction is known in closed form from the mean and covariance of the heads' outputs on calibration images, and it
costs nothing at run time: it is added to the columns of the projection that stay, and to its bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cpvit.adapters import HeadParameter, HostBlock
from cpvit.plans.heads import HeadOutputs

RIDGE = 1e-3
"""Added to the diagonal of the covariance, as a fraction of its mean: directions that hardly vary stay out."""


def projection_of(block: HostBlock) -> nn.Linear:
    """The linear layer that mixes the joined heads.

    Raises:
        UnsupportedModelError: Heads of this block cannot be cut.
    """
    owners = [
        target.owner for target in block.head_parameters() if target.dim == 1 and target.name == "weight"
    ]
    (projection,) = [owner for owner in owners if isinstance(owner, nn.Linear)]
    return projection


def corrected_projection(
    weight: Tensor, outputs: HeadOutputs, kept: Tensor, *, centred: bool
) -> tuple[Tensor, Tensor]:
    """Least-squares replacement of a projection that loses some of its inputs.

    With o the joined outputs, K what stays and R what goes, it minimises E |W o - W' o_K - b'|^2. The best linear
    prediction of o_R is mean_R + T (o_K - mean_K) with T = cov_RK (cov_KK + ridge)^-1, hence
    W' = W_K + W_R T and b' = W_R (mean_R - T mean_K).

    Args:
        weight: [C H*D] of the whole projection.
        outputs: Statistics of its inputs.
        kept: [k] indices of the inputs that stay.
        centred: Whether b' can be added somewhere. If not, the prediction goes through the origin and b' is 0.

    Returns:
        W' [C k] and b' [C], in float64.
    """
    weight = weight.detach().double().cpu()
    gone = torch.ones(weight.shape[1], dtype=torch.bool).index_fill(0, kept, False).nonzero().flatten()
    moment = outputs.covariance if centred else outputs.covariance + outputs.mean.outer(outputs.mean)
    among = moment[kept][:, kept]
    among = among + RIDGE * among.diagonal().mean() * torch.eye(len(kept), dtype=among.dtype)
    prediction = torch.linalg.solve(among, moment[kept][:, gone]).T
    better = weight[:, kept] + weight[:, gone] @ prediction
    shift = weight[:, gone] @ (outputs.mean[gone] - prediction @ outputs.mean[kept])
    return better, shift if centred else torch.zeros_like(shift)


class SlicedHeads:
    """Undo record of one block: the parameters as they were before the cut.

    Args:
        block: Whose heads are cut.
        keep: Heads that stay.
        outputs: Statistics to correct the projection with; None cuts and nothing more.
    """

    def __init__(self, block: HostBlock, keep: Sequence[int], outputs: HeadOutputs | None = None) -> None:
        self.block = block
        self.num_heads = block.num_heads
        self.heads_left = len(keep)
        self.replaced: list[tuple[HeadParameter, Tensor]] = []
        self.originals: list[tuple[HeadParameter, Tensor]] = []
        targets = block.head_parameters()
        if outputs is not None:
            self._correct(projection_of(block), keep, outputs)
        for target in targets:
            original = getattr(target.owner, target.name)
            self._keep_original(target, original)
            _replace(target, _cut(original, target, keep, self.num_heads))
        block.set_num_heads(len(keep))

    def _correct(self, projection: nn.Linear, keep: Sequence[int], outputs: HeadOutputs) -> None:
        """Put the corrected columns and bias in place, before the others are cut away."""
        weight, bias = projection.weight, projection.bias
        kept = head_index(keep, self.num_heads, 1, weight.shape[1] // self.num_heads)
        better, shift = corrected_projection(weight, outputs, kept, centred=bias is not None)
        changed = weight.detach().clone()
        changed[:, kept.to(changed.device)] = better.to(changed.device, changed.dtype)
        width = weight.shape[1] // self.num_heads
        self._swap(HeadParameter(projection, "weight", 1, 1, width), weight, changed)
        if bias is not None:
            moved = bias.detach() + shift.to(bias.device, bias.dtype)
            self._swap(HeadParameter(projection, "bias", 0, 1, width), bias, moved)

    def _swap(self, target: HeadParameter, original: Tensor, tensor: Tensor) -> None:
        self._keep_original(target, original)
        _replace(target, nn.Parameter(tensor, original.requires_grad))

    def _keep_original(self, target: HeadParameter, original: Tensor) -> None:
        """The first value of a parameter is the original; a correction and a cut may both change it."""
        known = any(past.owner is target.owner and past.name == target.name for past, _ in self.originals)
        if not known:
            self.originals.append((target, original))

    def restore(self) -> None:
        """Put the original parameters back, on the device and in the dtype the model has now."""
        self.replaced = [(target, getattr(target.owner, target.name)) for target, _ in self.originals]
        for (target, original), (_, now) in zip(self.originals, self.replaced, strict=True):
            if original.device != now.device or original.dtype != now.dtype:
                original.data = original.data.to(now.device, now.dtype)
            _replace(target, original)
        self.block.set_num_heads(self.num_heads)

    def redo(self) -> None:
        """Cut again as before :meth:`restore`, with the very parameters the block had then."""
        for target, tensor in self.replaced:
            _replace(target, tensor)
        self.block.set_num_heads(self.heads_left)


def _cut(tensor: Tensor, target: HeadParameter, keep: Sequence[int], heads: int) -> Tensor:
    index = head_index(keep, heads, target.groups, target.width).to(tensor.device)
    smaller = tensor.detach().index_select(target.dim, index)
    return nn.Parameter(smaller, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else smaller


def head_index(keep: Sequence[int], heads: int, groups: int, width: int) -> Tensor:
    """Rows that belong to the kept heads, in a dimension laid out as [groups, heads, width]."""
    return torch.arange(groups * heads * width).view(groups, heads, width)[:, list(keep)].flatten()


def _replace(target: HeadParameter, tensor: Tensor) -> None:
    setattr(target.owner, target.name, tensor)
    if isinstance(target.owner, nn.Linear) and target.name == "weight":
        target.owner.out_features, target.owner.in_features = tensor.shape
