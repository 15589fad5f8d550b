"""What a schedule costs: the closed formula that budgets are solved with.

The tests hold it against :func:`cpvit.plans.macs.count_macs`, which asks torch's FLOP counter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cpvit.adapters import BlockCosts, Host, HostBlock
from cpvit.core import BlockStep, CPViT, Method
from cpvit.plans.macs import host_macs
from cpvit.plans.steps import make_steps


class Costs(Protocol):
    """What a schedule costs, in any unit: what budgets are solved and plans are searched with.

    :class:`CostModel` counts multiply-accumulates, :class:`cpvit.machine.time_model.TimeModel` seconds.
    """

    @property
    def num_prefix(self) -> int:
        """Tokens that never leave."""
        ...

    @property
    def num_patches(self) -> int:
        """Patches that enter the first block."""
        ...

    @property
    def method(self) -> Method:
        """What removes or merges; says whether at most half may leave one block."""
        ...

    @property
    def tolerance(self) -> float:
        """A budget counts as met within this share of it."""
        ...

    @property
    def dense(self) -> float:
        """Cost of the untouched model."""
        ...

    def total(self, patches: Sequence[int]) -> float:
        """Cost when ``patches[l]`` patches leave block l."""
        ...


@dataclass(frozen=True)
class CostModel:
    """MACs of one image as a function of how many patches leave each block."""

    blocks: tuple[BlockCosts, ...]
    outside: int
    """Patch embedding, pooling and classifier: what pruning does not touch."""
    num_prefix: int
    num_patches: int
    embed_dim: int
    head_dim: int
    method: Method
    pool_token: int = 0
    """What the head saves for each patch that does not reach it (attention pooling)."""
    tolerance: float = 0.005
    """A MACs budget is hit within this share of it."""

    def total(self, patches: Sequence[int]) -> int:
        """MACs when ``patches[l]`` patches leave block l, scoring and matching included."""
        steps = make_steps(self.method, patches, self.num_patches)
        before = (self.num_patches, *patches[:-1])
        gone = self.num_patches - patches[-1]
        return (
            self.outside
            - self.pool_token * gone
            + sum(self._block(*each) for each in zip(self.blocks, before, steps, strict=True))
        )

    def _block(self, block: BlockCosts, entering: int, step: BlockStep) -> int:
        tokens = self.num_prefix + entering
        total = block.macs(tokens, self.num_prefix + step.keep)
        if step.score and self.method.evidence == "class" and self.num_prefix:
            total += block.pair // 2 * tokens  # one query row
        if step.keep < entering:
            total += self.method.matching_macs(entering, step.keep, self.embed_dim, self.head_dim)
        return total

    @property
    def dense(self) -> int:
        """MACs with every patch kept."""
        return self.total([self.num_patches] * len(self.blocks))


def cost_model(host: Host, heads: Sequence[int] | None = None, *, method: Method | None = None) -> CostModel:
    """The formula for an untouched model, optionally with fewer heads per block.

    A method that merges spreads its tokens out again for a head that reads patches, which then saves nothing.
    What lies outside the blocks is the counted total less the formula's blocks.
    """
    method = CPViT() if method is None else method
    dense = [block.costs() for block in host.blocks]
    inside = sum(cost.macs(host.num_tokens, host.num_tokens) for cost in dense)
    outside = host_macs(host) - inside
    if outside < 0:
        raise RuntimeError(f"the cost formula of {host.name} exceeds torch's count by {-outside} MACs")
    scaled = dense if heads is None else [_with_heads(*pair) for pair in zip(host.blocks, heads, strict=True)]
    return CostModel(
        blocks=tuple(scaled),
        outside=outside,
        num_prefix=host.num_prefix,
        num_patches=host.num_patches,
        embed_dim=host.embed_dim,
        head_dim=dense[0].pair // 2 // host.blocks[0].num_heads,
        method=method,
        pool_token=0 if method.merges else host.pool_token_macs,
    )


def _with_heads(block: HostBlock, heads: int) -> BlockCosts:
    cost = block.costs()
    return cost._replace(
        attention_token=cost.attention_token * heads // block.num_heads,
        pair=cost.pair * heads // block.num_heads,
    )
