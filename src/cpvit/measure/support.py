"""What works with which model: every cell of the support table is measured on a small model with random weights.

A case names a model of a library. The small model has few and narrow blocks, an 8 x 8 grid (or a stated one) and
ten classes; everything else (kind of attention, positions, prefix tokens, LayerScale, norms, pooling) is as in the
full model. Tokens, heads and blocks in the table are those of the full model, built on the meta device.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cpvit.adapters import Host, UnsupportedModelError, open_host
from cpvit.measure.support_cases import Case
from cpvit.plans.config import PruneConfig
from cpvit.plans.plan import Plan
from cpvit.pruning.prune import prune_host
from cpvit.pruning.record import record
from cpvit.pruning.verify import check, relative_error, tolerance, verify_host
from cpvit.weights.saving import load_pruned, save_pruned

MACS, HEAD_KEEP_RATE = 0.6, 0.5
YES = "yes"
NOT_INSTALLED = "skipped: {} not installed"


@dataclass(frozen=True)
class SupportRow:
    """What was measured for one case. Outcomes are "yes", or "no: " and the reason."""

    family: str
    model: str
    blocks: int = 0
    tokens: int = 0
    heads: int = 0
    error: float = float("nan")
    """Keep-everything error: see ``verify``."""
    tolerance: float = float("nan")
    patches: int = 0
    """Of the small model, which the rest is about."""
    survivors: tuple[int, ...] = ()
    """Patches that left each block, recorded while it ran at 0.6 of the MACs."""
    head_pruning: str = ""
    heads_left: tuple[int, ...] = ()
    compiles: str = ""
    exports: str = ""
    saves: str = ""
    failure: str = ""
    """Why the model failed as a whole; empty if it did not."""

    @property
    def failed(self) -> bool:
        """Whether the model, or a cell that every supported model must pass, failed; head pruning may be refused."""
        outcomes = (self.compiles, self.exports, self.saves)
        return (bool(self.failure) and not self.failure.startswith("skipped: ")) or any(
            no != YES for no in outcomes if no
        )


def measure(case: Case, *, seed: int = 0) -> SupportRow:
    """One row of the table."""
    if case.package and not _installed(case.package):
        return SupportRow(case.family, case.name, failure=NOT_INSTALLED.format(case.package))
    try:
        return measure_row(case, seed)
    except Exception as error:  # every failure is a cell of the table
        return SupportRow(case.family, case.name, failure=_reason(error))


def _installed(module: str) -> bool:
    """Whether there is such a module; of one inside a package, another package of that name does not do."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def measure_row(case: Case, seed: int) -> SupportRow:
    """:func:`measure`, but what goes wrong is raised."""
    with torch.device("meta"):
        full_model = case.full()
    full, host = (open_host(model) for model in (full_model, small_model(case, seed)))
    checked = verify_host(host, seed=seed)
    check(host)
    images = random_images(host, 3, seed)
    survivors = measure_survivors(host, images)
    head_pruning, plan = prune_heads(host, images)
    return SupportRow(
        family=case.family,
        model=case.name,
        blocks=full.depth,
        tokens=full.num_tokens,
        heads=full.blocks[0].num_heads,
        error=checked.error,
        tolerance=checked.tolerance,
        patches=plan.num_patches,
        survivors=survivors,
        head_pruning=head_pruning,
        heads_left=plan.heads_per_block,
        compiles=_outcome(check_compile, host, images),
        exports=_outcome(check_export, host, images),
        saves=_outcome(check_saving, host, images, case.arguments, untouched_model(case)),
    )


def small_model(case: Case, seed: int = 0) -> nn.Module:
    """The small model with random weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = case.small()
        randomize_(model)
    return model.eval()


def untouched_model(case: Case) -> nn.Module | None:
    """What a saved model is loaded into, where it cannot be built from its folder alone."""
    return small_model(case) if case.by_hand else None


@torch.no_grad()
def randomize_(model: nn.Module) -> None:
    """Random weights with which every part changes the output: LayerScale, biases and registers far from 0."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn_like(parameter)
            if "Norm" in type(module).__name__ and name == "weight":
                parameter.copy_(1 + 0.2 * noise)
            elif name.startswith(("gamma", "lambda")):
                parameter.copy_(0.6 + 0.2 * noise)
            elif parameter.dim() > 1 and name.endswith("weight"):
                parameter.copy_(1.5 * noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise)


def random_images(host: Host, batch: int, seed: int = 0) -> Tensor:
    """[B 3 H W] of the model's size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *host.image_shape, generator=generator)


def measure_survivors(host: Host, images: Tensor) -> tuple[int, ...]:
    """Prune to 0.6 of the MACs, run, and count the patches that leave each block."""
    plan = prune_host(host, PruneConfig(macs=MACS), verify=False)
    with record(host.model) as trace:
        run(host, images)
    counted = tuple(kept.shape[1] for kept in trace.survivors)
    if counted != plan.patches_per_block or counted[-1] >= plan.num_patches:
        raise RuntimeError(
            f"{counted} of {plan.num_patches} patches left the blocks, planned {plan.patches_per_block}"
        )
    return counted


def prune_heads(host: Host, images: Tensor) -> tuple[str, Plan]:
    """Also cut half of the heads where that is possible: outcome, and the plan then active."""
    try:
        config = PruneConfig(macs=MACS, head_keep_rate=HEAD_KEEP_RATE)
        return YES, prune_host(host, config, calibration=images, verify=False)
    except UnsupportedModelError as error:
        return _no(error), prune_host(host, PruneConfig(macs=MACS), verify=False)


@torch.inference_mode()
def run(host: Host, images: Tensor) -> Tensor:
    """Logits, or features of a model without a classifier."""
    return host.output(host.model(images))


def check_compile(host: Host, images: Tensor) -> None:
    """One graph, and the same output."""
    torch.compiler.reset()
    compiled = torch.compile(host.model, fullgraph=True, backend="eager")
    with torch.no_grad():
        got = host.output(compiled(images))
    _expect_equal(got, run(host, images), host.depth)


def check_export(host: Host, images: Tensor) -> None:
    """Any batch size, and the same output for another one than it was exported with."""
    given = images[1:]
    shapes = torch.export.ShapesCollection()  # by the tensor itself: a forward may call its argument *args
    shapes[given] = {0: torch.export.Dim("batch", min=1, max=64)}
    with torch.no_grad():
        exported = torch.export.export(host.model, (given,), dynamic_shapes=shapes, strict=False).module()
        got = host.output(exported(images))
    _expect_equal(got, run(host, images), host.depth)


def check_saving(
    host: Host, images: Tensor, arguments: Mapping[str, object], untouched: nn.Module | None = None
) -> None:
    """Saved, loaded from the folder alone (or into an untouched model), and the same output bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        save_pruned(host.model, folder, arguments=arguments)
        again = load_pruned(folder, untouched)
    with torch.inference_mode():
        got = host.output(again(images))
    if not torch.equal(got, run(host, images)):
        raise RuntimeError("the loaded model's output differs")


def _expect_equal(got: Tensor, expected: Tensor, depth: int) -> None:
    error, limit = relative_error(got, expected), tolerance(expected.dtype, depth)
    if error > limit:
        raise RuntimeError(f"the output differs by {error:.1e} (tolerance {limit:.1e})")


def _outcome(attempt: Callable[..., None], *args: object) -> str:
    try:
        attempt(*args)
    except Exception as error:  # every failure is a cell of the table
        return _no(error)
    return YES


def _no(error: Exception) -> str:
    return f"no: {_reason(error)}"


def _reason(error: Exception) -> str:
    """First sentence of the message; the table has no room for more."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].partition("; ")[0][:200]
