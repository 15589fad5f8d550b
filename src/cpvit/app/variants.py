"""The dense model and pruned copies of it that share its weights; made when asked for, and kept for a while."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cpvit.adapters import Host
from cpvit.app.subject import EXPORTED, PLAN, Subject
from cpvit.export.runtimes import ExportedModel
from cpvit.machine.block_profiler import random_images
from cpvit.measure.memory import peak_memory_mib
from cpvit.methods import METHODS
from cpvit.plans.config import PruneConfig
from cpvit.plans.macs import host_macs
from cpvit.plans.plan import Plan
from cpvit.pruning.cascade import keep_everything
from cpvit.pruning.install import install
from cpvit.pruning.prune import prune_host
from cpvit.pruning.verify import check

MOST_KEPT = 32
"""Pruned copies. They share the weights, so that one is small: modules and a schedule."""


@dataclass(frozen=True)
class Choice:
    """What somebody chose on the page; the key of a variant."""

    method: str
    """Of METHODS, or PLAN or EXPORTED."""
    macs: float = 1.0
    """Fraction of the dense MACs; a plan and an exported file have theirs."""

    @property
    def takes_budget(self) -> bool:
        """Whether the budget means anything."""
        return self.method in METHODS

    @property
    def title(self) -> str:
        """For headings."""
        return f"{self.method} at {self.macs:.0%}" if self.takes_budget else self.method


@dataclass(frozen=True, eq=False)
class Variant:
    """A model that answers."""

    title: str
    answer: Callable[[Tensor], Tensor]
    """Normalised images [1 3 H W] -> logits [1 K]."""
    macs: int
    """Multiply-accumulates of one image."""
    host: Host | None
    """The torch model that answers; None for other runtimes."""
    plan: Plan | None = None
    """None for a dense model."""
    traced: Host | None = None
    """Where its blocks can be watched: a model with a cascade; None if nowhere."""

    @cached_property
    def peak_mib(self) -> float | None:
        """Weights plus the most that activations hold in a forward; None for other runtimes. Measured once."""
        if self.host is None:
            return None
        return peak_memory_mib(self.host.model, random_images(self.host, 1))


class Variants:
    """Variants of one model. Not safe for threads: :class:`cpvit.app.turns.Turns` lets in one at a time."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._kept: OrderedDict[Choice, Variant] = OrderedDict()
        if subject.dense is not None:
            check(subject.dense)
        self.dense = None if subject.dense is None else _dense(subject.dense)
        if self.dense is not None:
            self.dense.peak_mib  # noqa: B018  # torch's profiler complains if its first use is in another thread

    @property
    def choices(self) -> tuple[str, ...]:
        """Methods that can be chosen; the first is to be shown first."""
        special = [PLAN] * (self.subject.plan is not None) + [EXPORTED] * (self.subject.exported is not None)
        if self.subject.dense is None:
            return tuple(special)
        names = sorted(METHODS, key=lambda name: name != "cpvit-merge")
        return (*special, *names)

    def get(self, choice: Choice) -> Variant:
        """The variant of a choice.

        Raises:
            ValueError: The budget cannot be met, or there is no such choice.
        """
        if not choice.takes_budget:
            choice = Choice(choice.method)
        if choice not in self._kept:
            self._kept[choice] = self._make(choice)
        self._kept.move_to_end(choice)
        while len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        return self._kept[choice]

    def _make(self, choice: Choice) -> Variant:
        if choice.method not in self.choices:
            raise ValueError(f"expected one of {', '.join(self.choices)}, got {choice.method!r}")
        dense, plan = self.subject.dense, self.subject.plan
        if choice.method == EXPORTED:
            return self._exported()
        assert dense is not None
        config = PruneConfig(method=choice.method, macs=choice.macs) if choice.takes_budget else plan
        assert config is not None
        return self._pruned(dense, config, choice.title)

    def _pruned(self, dense: Host, config: PruneConfig | Plan, title: str) -> Variant:
        assert self.dense is not None
        host = dense.copy_sharing_weights()
        plan = prune_host(host, config, verify=False)
        # A plan of a file may say anything; one made here says what torch would count, and says it at once.
        macs = host_macs(host) if isinstance(config, Plan) else round(plan.macs_ratio * self.dense.macs)
        return Variant(title, _answering(host), macs, host, plan, host)

    def _exported(self) -> Variant:
        exported, dense = self.subject.exported, self.subject.dense
        assert exported is not None
        described = exported.description
        traced = None
        if dense is not None:
            traced = dense.copy_sharing_weights()
            if described.plan is None:
                install(traced, keep_everything(traced))
            else:
                prune_host(traced, described.plan.uncorrected, verify=False)
        title = f"{EXPORTED} ({described.format}, {described.precision})"
        return Variant(title, _running(exported), described.macs, None, described.plan, traced)


def _dense(host: Host) -> Variant:
    traced = host.copy_sharing_weights()
    install(traced, keep_everything(traced))
    return Variant("dense", _answering(host), host_macs(host), host, None, traced)


def _running(exported: ExportedModel) -> Callable[[Tensor], Tensor]:
    return lambda images: exported(images.float().cpu())


def _answering(host: Host) -> Callable[[Tensor], Tensor]:
    @torch.inference_mode()
    def answer(images: Tensor) -> Tensor:
        return host.output(host.model(images))

    return answer
