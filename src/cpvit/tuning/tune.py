"""From a budget, or an accuracy to hold, to the plan that stays closest to the dense model on calibration images.

The objective of the search is the distance between the logits of the pruned and of the dense model. KL divergence is
what is reported, but it is a poor guide on a hundred images: most of it comes from a few of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from cpvit.machine.processes import Processes, gathered
from cpvit.measure.metrics import agreement, kl_divergence, logit_distance
from cpvit.plans.budget import BudgetError
from cpvit.plans.costs import Costs, cost_model
from cpvit.plans.plan import Plan
from cpvit.plans.schedules import curve_of
from cpvit.pruning.opening import open_restored
from cpvit.tuning.checkpoint import SearchCheckpoint
from cpvit.tuning.evaluator import PlanEvaluator
from cpvit.tuning.search import Budget, Counts, OnTrial, SearchResult, search
from cpvit.tuning.target import HeadChoice, Target, Tuned


@dataclass(frozen=True)
class TuneOptions:
    """How to search."""

    method: str = "cpvit-merge"
    """What the plan is for."""
    head_keep_rate: float = 1.0
    """Fraction of the heads left."""
    head_choice: HeadChoice = "damage"
    """"damage" cuts the heads whose loss costs least, each evaluated alone, and corrects the projections (see
    :mod:`cpvit.pruning.heads`); "cascade" is the paper's cumulative score, with this fraction left at the end."""
    trials: int = 40
    """Schedules to evaluate at each MACs budget."""
    seed: int = 0
    """Of the search."""
    multiple: int = 1
    """Tokens in every block, prefix included, that the plan shall have multiples of."""


def tune(
    model: nn.Module,
    images: Tensor,
    target: Target,
    options: TuneOptions | None = None,
    *,
    labels: Tensor | None = None,
    checkpoint: Path | None = None,
    on_trial: OnTrial = lambda evaluations, best: None,
    processes: Processes | None = None,
) -> Tuned:
    """Find the plan that is closest to the dense model. The model is left untouched.

    Args:
        model: A model with a classification head.
        images: [B 3 H W] calibration images; 64 to 256 serve well.
        target: MACs to spend, or accuracy to hold.
        options: How to search.
        labels: [B], needed for ``max_drop``.
        checkpoint: File to keep evaluated schedules in; an interrupted search goes on from it.
        on_trial: Called with the number of schedules evaluated and the least logit distance so far.
        processes: Those that share the images; all make the same search and find the same plan.

    Raises:
        ValueError: No labels for ``max_drop``, no head to compare, or the target cannot be reached.
    """
    if target.speedup is not None:
        raise ValueError("a speed-up has to be measured: call cpvit.tuning.speedup.tune_speedup")
    if target.max_drop is not None and labels is None:
        raise ValueError("max_drop needs labels: give labelled calibration images, or min_agreement instead")
    options = TuneOptions() if options is None else options
    evaluator = PlanEvaluator(
        open_restored(model), images, labels, options.method, options.head_keep_rate, processes
    )
    return tune_on(evaluator, target, options, checkpoint=checkpoint, on_trial=on_trial)


def tune_on(
    evaluator: PlanEvaluator,
    target: Target,
    options: TuneOptions,
    *,
    checkpoint: Path | None = None,
    on_trial: OnTrial = lambda evaluations, best: None,
    costs: Costs | None = None,
) -> Tuned:
    """:func:`tune` for a model that is opened already.

    Args:
        costs: What ``target.macs`` is a fraction of, instead of the dense MACs; seconds, say.
    """
    store = _checkpoint(checkpoint, _key(evaluator, target, options), evaluator.processes)
    cascade = options.head_choice == "cascade"
    plan = evaluator.base_plan() if cascade else evaluator.plan_by_head_loss(store)
    run = _Run(evaluator, plan, options, store, on_trial, costs)
    tuned = run.at(target.macs) if target.macs is not None else _cheapest(run, target)
    store.delete()
    return tuned


def _checkpoint(path: Path | None, key: str, processes: Processes | None) -> SearchCheckpoint:
    """Of several processes the first keeps the file; all start with what is in it."""
    store = SearchCheckpoint(path if processes is None or processes.is_main else None, key)
    store.known = gathered([store.known], processes)[0]
    return store


def _key(evaluator: PlanEvaluator, target: Target, options: TuneOptions) -> str:
    """What a checkpoint is good for: the same model, weights, images and question. More trials may be asked for."""
    digest = hashlib.sha256(evaluator.images.cpu().numpy().tobytes())
    digest.update(evaluator.dense.log_probs.numpy().tobytes())
    settings = dataclasses.asdict(dataclasses.replace(options, trials=0))
    question = ("logit distance by image", evaluator.host.name, settings, dataclasses.asdict(target))
    return f"{digest.hexdigest()[:16]} {question}"


@dataclass(frozen=True)
class _Run:
    """Searches at one or several budgets."""

    evaluator: PlanEvaluator
    plan: Plan
    options: TuneOptions
    checkpoint: SearchCheckpoint
    on_trial: OnTrial
    costs: Costs | None = None

    def at(self, macs: float, trials: int | None = None) -> Tuned:
        """The best plan found for this budget; with one trial that is the curve's."""
        evaluator, plan = self.evaluator, self.plan
        heads = None if plan.heads is None else [len(kept) for kept in plan.heads]
        costs = cost_model(evaluator.host, heads, method=evaluator.method)
        dense = cost_model(evaluator.host).dense

        def distances(counts: Counts) -> list[float]:
            return evaluator.distances(dataclasses.replace(plan, patches_per_block=counts))

        found = search(
            self._budget(macs, costs, dense),
            self.checkpoint.cached(distances),
            curve=curve_of(evaluator.method),
            depth=evaluator.host.depth,
            trials=self.options.trials if trials is None else trials,
            seed=self.options.seed,
            on_trial=self.on_trial,
        )
        ratio = round(costs.total(found.patches) / dense, 6)
        best = dataclasses.replace(
            plan, patches_per_block=found.patches, schedule="search", macs_ratio=ratio, dial=f"macs={macs:g}"
        )
        best = dataclasses.replace(best, align=self.options.multiple)
        return self._tuned(best, found)

    def _budget(self, share: float, macs: Costs, dense: float) -> Budget:
        """A share of the dense MACs, or of what the given costs count."""
        empty, multiple = self.evaluator.host.discards_patches, self.options.multiple
        if self.costs is None:
            return Budget(macs, share, dense, multiple=multiple, empty_last=empty)
        return Budget(self.costs, share, self.costs.dense, multiple=multiple, empty_last=empty)

    def _tuned(self, plan: Plan, found: SearchResult) -> Tuned:
        dense, pruned = self.evaluator.dense, self.evaluator.predict_under(plan)
        start = self.evaluator.predict_under(dataclasses.replace(plan, patches_per_block=found.start))
        return Tuned(
            plan=plan,
            kl=kl_divergence(dense, pruned),
            agreement=agreement(dense, pruned),
            distance=logit_distance(dense, pruned),
            start_kl=kl_divergence(dense, start),
            start_distance=logit_distance(dense, start),
            evaluations=found.evaluations,
            drop=None if self.evaluator.labels is None else dense.top(1) - pruned.top(1),
        )


def _cheapest(run: _Run, target: Target, *, steps: int = 7) -> Tuned:
    """Bisect over the MACs for the cheapest curve that holds the target, then search at that budget.

    Raises:
        ValueError: Not even the gentlest budget tried (97% of the MACs) holds it.
    """
    low, high = 0.3, 0.97
    best = run.at(high, trials=1)
    if not _holds(best, target):
        raise ValueError(f"the target cannot be held on these images: {_missed(best, target)} at macs={high}")
    for _ in range(steps):
        middle = round((low + high) / 2, 3)
        tuned = _try(run, middle)
        if tuned is not None and _holds(tuned, target):
            best, high = tuned, middle
        else:
            low = middle
    searched = run.at(high)
    return searched if _holds(searched, target) else best


def _try(run: _Run, macs: float) -> Tuned | None:
    """The curve's plan for a budget; None if the model cannot spend so little."""
    try:
        return run.at(macs, trials=1)
    except BudgetError:
        return None


def _holds(tuned: Tuned, target: Target) -> bool:
    if target.max_drop is not None:
        return tuned.drop is not None and tuned.drop <= target.max_drop
    return target.min_agreement is not None and tuned.agreement >= target.min_agreement


def _missed(tuned: Tuned, target: Target) -> str:
    if target.max_drop is not None:
        return f"{tuned.drop:.2f} points of top-1 are lost (at most {target.max_drop} allowed)"
    return f"agreement is {tuned.agreement:.4f} (at least {target.min_agreement} wanted)"
