"""What happens to one image in a model with a cascade, block by block.

Legend: N patches of the whole grid, K tokens that leave a block, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpvit.adapters import Host
from cpvit.core import TokenState
from cpvit.pruning.cascade import BlockHook, BlockOutput, registered_hook
from cpvit.pruning.install import installed


@dataclass(frozen=True, eq=False)
class BlockView:
    """One block."""

    positions: Tensor
    """[K] original positions of the tokens that leave it, prefix tokens not counted."""
    carrier: Tensor | None
    """[N] for methods that merge, the index of the token that each patch was merged into."""
    attention: Tensor
    """[N] what each patch that enters the block gets of the class token's attention, mean over heads (without a class
    token: of all tokens' attention, mean over them as well); NaN for patches that have left."""


@torch.inference_mode()
def watch(host: Host, image: Tensor) -> tuple[BlockView, ...]:
    """Run an image [1 3 H W] through a pruned model and look into every block.

    Raises:
        ValueError: The model is not pruned.
    """
    container = installed(host)
    if container is None:
        raise ValueError(f"{host.name} is not pruned, so there is no cascade to watch; prune it first")
    views: list[BlockView] = []
    states: list[TokenState] = []

    def see(output: BlockOutput) -> None:
        assert output.probs is not None, "asked for below"
        before = states[-1] if states else None
        states.append(output.state)
        views.append(
            BlockView(
                positions=output.state.positions[0].cpu(),
                carrier=None if output.state.carrier is None else output.state.carrier[0].cpu(),
                attention=_on_grid(_received(output.probs[0], host.num_prefix), before, host.num_patches),
            )
        )

    with registered_hook(container.cascade, BlockHook(see, attention=True)):
        host.model(image)
    return tuple(views)


def _received(probs: Tensor, num_prefix: int) -> Tensor:
    """[H P+n P+n] -> [n]: the class token's attention to each patch; without a class token that of all tokens."""
    rows = probs[:, :1] if num_prefix else probs
    return rows.float().mean(dim=(0, 1))[num_prefix:].cpu()


def _on_grid(received: Tensor, before: TokenState | None, patches: int) -> Tensor:
    """What tokens [n] that entered a block received, on the patches [N] they stand for."""
    if before is None:
        return received
    if before.carrier is not None:
        return received[before.carrier[0].cpu()]
    grid = torch.full((patches,), float("nan"))
    return grid.scatter(0, before.positions[0].cpu(), received)
