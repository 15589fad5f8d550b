"""From a budget, or an accuracy to hold, to the plan that does the least damage on calibration images.

Damage, while searching, is the distance between the logits of the pruned and of the dense model. KL divergence is
what is reported, but it is a poor guide on a hundred images: most of it comes from a few of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from cpvit.adapters import Host, open_host
from cpvit.calibrate import Calibration, calibrate
from cpvit.cascade import Cascade, install, make_steps, uninstall
from cpvit.files import write_atomically
from cpvit.heads import least_missed
from cpvit.macs import Costs, cost_model
from cpvit.methods import method_named
from cpvit.metrics import Predictions, agreement, kl_divergence, logit_distance
from cpvit.plan import Plan, PruneConfig
from cpvit.planning import make_plan
from cpvit.prune import prune_, unprune_
from cpvit.schedule import BudgetError, layer_aware
from cpvit.search import Budget, Counts, SearchResult, search, starting_shapes

BATCH = 32
HEAD_IMAGES = 32
"""Images that each head is judged on alone; a head is one judgement, and there are many."""

HeadChoice: TypeAlias = Literal["damage", "cascade"]


@dataclass(frozen=True)
class Target:
    """What the plan must reach. Give exactly one."""

    macs: float | None = None
    """Fraction of the dense MACs to spend."""
    max_drop: float | None = None
    """Largest top-1 loss allowed on the (labelled) calibration images, in points; MACs are minimised."""
    min_agreement: float | None = None
    """Smallest share of calibration images with the dense model's prediction; MACs are minimised."""
    speedup: float | None = None
    """Speed-up over the dense model, measured on this machine (:func:`cpvit.speedup.tune_speedup`)."""

    def __post_init__(self) -> None:
        given = [name for name, value in dataclasses.asdict(self).items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"give one of macs, max_drop, min_agreement and speedup, got {' and '.join(given) or 'none'}"
            )
        if self.macs is not None and not 0 < self.macs <= 1:
            raise ValueError(f"macs must be a fraction above 0 and at most 1, got {self.macs}")
        if self.max_drop is not None and self.max_drop < 0:
            raise ValueError(f"max_drop is a loss in points and must be at least 0, got {self.max_drop}")
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise ValueError(f"min_agreement must be a fraction from 0 to 1, got {self.min_agreement}")
        if self.speedup is not None and self.speedup <= 1:
            raise ValueError(f"speedup must be above 1, got {self.speedup}")


@dataclass(frozen=True)
class Tuned:
    """A plan and how good it is on the calibration images it was made from."""

    plan: Plan
    kl: float
    """Nats, on the calibration images."""
    agreement: float
    distance: float
    """What the search lowers, see :func:`cpvit.metrics.logit_distance`."""
    start_kl: float
    """Of the best schedule before the search ..."""
    start_distance: float
    """... and its distance."""
    judged: int
    drop: float | None = None
    """Top-1 lost on the calibration images in points, if they have labels."""


class PlanMemory:
    """Judged schedules on disk, so that an interrupted search can go on."""

    def __init__(self, path: Path | None, key: str) -> None:
        self.path = path
        self.key = key
        self.known: dict[str, float] = {}
        if path is not None and path.is_file():
            self.known = self._read(path)

    def _read(self, path: Path) -> dict[str, float]:
        try:
            content = json.loads(path.read_text())
            return dict(content["known"]) if content["key"] == self.key else {}
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{path} is not the memory of a search; delete it to start anew") from None

    def remember(self, judge: Callable[[Counts], float]) -> Callable[[Counts], float]:
        """The same judge, but what is known is not judged again."""
        return lambda counts: self.recall(" ".join(str(count) for count in counts), lambda: judge(counts))

    def recall(self, name: str, judge: Callable[[], float]) -> float:
        """What is known under a name, found out if it is not."""
        if name not in self.known:
            self.known[name] = judge()
            self._write()
        return self.known[name]

    def _write(self) -> None:
        if self.path is not None:
            write_atomically(self.path, json.dumps({"key": self.key, "known": self.known}))

    def forget(self) -> None:
        """The search is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def tune(
    model: nn.Module,
    images: Tensor,
    target: Target,
    *,
    method: str = "cpvit-merge",
    head_keep_rate: float = 1.0,
    head_choice: HeadChoice = "damage",
    labels: Tensor | None = None,
    trials: int = 120,
    seed: int = 0,
    memory: Path | None = None,
    on_judged: Callable[[int, float], None] = lambda judged, best: None,
    multiple: int = 1,
    costs: Costs | None = None,
) -> Tuned:
    """Find the plan of least damage. The model is left untouched.

    Args:
        model: An untouched model with a classification head.
        images: [B 3 H W] calibration images; 64 to 256 serve well.
        target: MACs to spend, or accuracy to hold.
        method: What the plan is for.
        head_keep_rate: Fraction of the heads left.
        head_choice: "damage" cuts the heads that are missed least, each judged alone, and makes up for them (see
            :mod:`cpvit.heads`); "cascade" is the paper's cumulative score, with this fraction left at the end.
        labels: [B], needed for ``max_drop``.
        trials: Schedules to judge for each MACs budget.
        seed: Of the search.
        memory: File to remember judged schedules in; an interrupted search goes on from it.
        on_judged: Told the number of schedules judged and the least damage (logit distance) so far.
        multiple: Tokens in every block, prefix included, that the plan shall have multiples of.
        costs: What ``macs`` is a fraction of, instead of the dense MACs; seconds, say.

    Raises:
        ValueError: No labels for ``max_drop``, no head to compare, or the target cannot be reached.
    """
    unprune_(model)
    if target.speedup is not None:
        raise ValueError("a speed-up has to be measured: call cpvit.speedup.tune_speedup")
    if target.max_drop is not None and labels is None:
        raise ValueError("max_drop needs labels: give labelled calibration images, or min_agreement instead")
    bench = _Bench(model, images, labels, method, head_keep_rate)
    store = PlanMemory(
        memory, _key(bench, target, images, (method, head_keep_rate, head_choice, multiple, seed))
    )
    plan = bench.base_plan() if head_choice == "cascade" else bench.plan_by_damage(store)
    run = _Run(bench, plan, trials, seed, store, on_judged, multiple, costs)
    tuned = run.at(target.macs) if target.macs is not None else _cheapest(run, target)
    store.forget()
    return tuned


def _key(bench: _Bench, target: Target, images: Tensor, settings: tuple[object, ...]) -> str:
    """What a memory is good for: the same model, weights, images and question."""
    digest = hashlib.sha256(images.cpu().numpy().tobytes())
    digest.update(bench.dense.log_probs.numpy().tobytes())
    question = ("logit distance", bench.host.name, *settings, dataclasses.asdict(target))
    return f"{digest.hexdigest()[:16]} {question}"


class _Bench:
    """A model on the bench: judges schedules by running the calibration images."""

    def __init__(
        self, model: nn.Module, images: Tensor, labels: Tensor | None, method: str, head_keep_rate: float
    ) -> None:
        self.model = model
        self.host: Host = open_host(model)
        self.images = images
        self.labels = labels
        self.method = method_named(method)
        self.head_keep_rate = head_keep_rate
        self.calibration: Calibration = calibrate(model, images, head_outputs=head_keep_rate < 1)
        self.dense = self.predict()
        if self.dense.log_probs.shape[1] < 2:
            raise ValueError(
                f"{self.host.name} has no classification head to compare predictions of; give one"
            )

    @torch.inference_mode()
    def predict(self, images: int | None = None) -> Predictions:
        """Run the (first) images through the model as it is."""
        parameter = next(self.model.parameters())
        logits = [
            self.host.output(self.model(batch.to(parameter.device, parameter.dtype))).float().cpu()
            for batch in self.images[:images].split(BATCH)
        ]
        labels = None if self.labels is None else self.labels[:images]
        return Predictions(torch.cat(logits).log_softmax(dim=-1), labels)

    def base_plan(self) -> Plan:
        """A plan to be given other counts."""
        return self._plan(self.head_keep_rate)

    def _plan(self, head_keep_rate: float) -> Plan:
        config = PruneConfig(method=self.method.name, head_keep_rate=head_keep_rate)
        return make_plan(self.host, config, self.calibration)

    def plan_by_damage(self, memory: PlanMemory) -> Plan:
        """The same, without the heads that are missed least."""
        plan = self._plan(1.0)
        if self.head_keep_rate == 1:
            return plan
        heads = [tuple(range(count)) for count in plan.num_heads]
        whole = dataclasses.replace(
            plan,
            patches_per_block=(plan.num_patches,) * self.host.depth,
            heads=tuple(heads),
            head_correction=True,
        )
        few = dataclasses.replace(self.dense, log_probs=self.dense.log_probs[:HEAD_IMAGES])

        def alone(block: int, head: int) -> float:
            left = tuple(other for other in heads[block] if other != head)
            kept = (*heads[:block], left, *heads[block + 1 :])
            without = dataclasses.replace(whole, heads=tuple(kept))
            return logit_distance(few, self.run(without, images=HEAD_IMAGES))

        damage = {
            (block, head): memory.recall(f"without head {head} of block {block}", partial(alone, block, head))
            for block, count in enumerate(plan.num_heads)
            if count > 1
            for head in range(count)
        }
        return dataclasses.replace(
            plan, heads=least_missed(damage, self.head_keep_rate), head_correction=True
        )

    def run(self, plan: Plan, images: int | None = None) -> Predictions:
        """Predictions under a plan, on the first of the images or all."""
        if plan.heads is not None:
            prune_(self.model, plan, calibration=self.calibration, verify=False)
            try:
                return self.predict(images)
            finally:
                unprune_(self.model)
        steps = make_steps(self.method, plan.patches_per_block, plan.num_patches)
        install(self.host, Cascade(self.host, self.method, steps))
        try:
            return self.predict(images)
        finally:
            uninstall(self.host)


class _Run:
    """Searches at one or several budgets."""

    def __init__(
        self,
        bench: _Bench,
        plan: Plan,
        trials: int,
        seed: int,
        memory: PlanMemory,
        on_judged: Callable[[int, float], None],
        multiple: int = 1,
        costs: Costs | None = None,
    ) -> None:
        self.multiple = multiple
        self.costs = costs
        self.bench = bench
        self.plan = plan
        self.trials = trials
        self.seed = seed
        self.memory = memory
        self.on_judged = on_judged

    def at(self, macs: float) -> Tuned:
        """The best plan found for this budget."""
        bench, plan = self.bench, self.plan
        heads = None if plan.heads is None else [len(kept) for kept in plan.heads]
        costs = cost_model(bench.host, heads, method=bench.method)
        dense = cost_model(bench.host).dense

        def damage(counts: Counts) -> float:
            return logit_distance(bench.dense, bench.run(dataclasses.replace(plan, patches_per_block=counts)))

        found = search(
            self._budget(macs, costs, dense),
            self.memory.remember(damage),
            starts=starting_shapes(bench.host.depth, layer_aware(bench.calibration.attention_range)),
            trials=self.trials,
            seed=self.seed,
            on_judged=self.on_judged,
        )
        ratio = round(costs.total(found.patches) / dense, 6)
        best = dataclasses.replace(
            plan, patches_per_block=found.patches, schedule="search", macs_ratio=ratio, dial=f"macs={macs:g}"
        )
        best = dataclasses.replace(best, align=self.multiple)
        return self._tuned(best, found)

    def _budget(self, share: float, macs: Costs, dense: float) -> Budget:
        """A share of the dense MACs, or of what the given costs count."""
        if self.costs is None:
            return Budget(macs, share, dense, multiple=self.multiple)
        return Budget(self.costs, share, self.costs.dense, multiple=self.multiple)

    def _tuned(self, plan: Plan, found: SearchResult) -> Tuned:
        dense, pruned = self.bench.dense, self.bench.run(plan)
        start = self.bench.run(dataclasses.replace(plan, patches_per_block=found.start))
        return Tuned(
            plan=plan,
            kl=kl_divergence(dense, pruned),
            agreement=agreement(dense, pruned),
            distance=logit_distance(dense, pruned),
            start_kl=kl_divergence(dense, start),
            start_distance=logit_distance(dense, start),
            judged=found.judged,
            drop=None if self.bench.labels is None else dense.top(1) - pruned.top(1),
        )


def _cheapest(run: _Run, target: Target, *, steps: int = 5) -> Tuned:
    """Bisect over the MACs for the cheapest plan that holds the target.

    Raises:
        ValueError: Not even the gentlest budget tried (97% of the MACs) holds it.
    """
    low, high = 0.3, 0.97
    best = run.at(high)
    if not _holds(best, target):
        raise ValueError(f"the target cannot be held on these images: {_missed(best, target)} at macs={high}")
    for _ in range(steps):
        middle = round((low + high) / 2, 3)
        tuned = _try(run, middle)
        if tuned is not None and _holds(tuned, target):
            best, high = tuned, middle
        else:
            low = middle
    return best


def _try(run: _Run, macs: float) -> Tuned | None:
    """The best plan for a budget; None if the model cannot spend so little."""
    try:
        return run.at(macs)
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
