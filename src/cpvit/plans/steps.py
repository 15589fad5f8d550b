"""From the number of patches that leave each block to what each block has to do."""

from __future__ import annotations

from collections.abc import Sequence

from cpvit.core import BlockStep, Method


def make_steps(
    method: Method, patches: Sequence[int], num_patches: int, mask_heads: Sequence[int | None] | None = None
) -> tuple[BlockStep, ...]:
    """What each block does: ``patches`` is how many leave each block.

    A cumulative method scores every block up to the last removal, any other only the blocks that remove.
    """
    before = (num_patches, *patches[:-1])
    removing = [number for number, (old, new) in enumerate(zip(before, patches, strict=True)) if new < old]
    last = removing[-1] if removing else -1
    scored = range(last + 1) if method.cumulative else removing
    masks = mask_heads or (None,) * len(patches)
    return tuple(
        BlockStep(
            keep=keep,
            score=method.evidence != "none" and (number in scored or masks[number] is not None),
            pruned=old < num_patches,
            mask_heads=masks[number],
            depth=number / len(patches),
        )
        for number, (old, keep) in enumerate(zip(before, patches, strict=True))
    )
