"""What a step computes, against numbers and formulas written out here."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finetuning import student, train
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from cpvit.data import TrainBatch
from cpvit.finetune import (
    Callback,
    DistillationConfig,
    Evaluation,
    FinetuneConfig,
    OptimizerConfig,
    Processes,
    start_processes,
)
from cpvit.finetune.checkpoint import load_state
from cpvit.finetune.evaluation import evaluate_at
from cpvit.finetune.objective import Objective

PLAIN = OptimizerConfig(
    optimizer="sgd",
    learning_rate=0.5,
    momentum=0.0,
    weight_decay=0.0,
    max_grad_norm=None,
    warmup_steps=0,
    decay="constant",
)
"""A step is the learning rate times the gradient."""
CONFIG = FinetuneConfig(num_steps=4, batch_size=4, checkpoint_every=2, optimization=PLAIN)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return math.sqrt(sum((one[name] - other[name]).double().square().sum().item() for name in one))


class TestObjective:
    LOGITS = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0], [1.0, 2.0, 0.0], [0.5, 0.0, 0.0]])
    TEACHER = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0], [1.0, 2.0, 1.0], [0.0, 0.0, 1.0]])
    FEATURES = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 2.0], [1.0, 1.0]])
    TEACHER_FEATURES = torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
    """Squared distances 1, 16, 1, 1 and squared lengths 2, 9, 1, 5: relative 0.5, 1.7777778, 1 and 0.2."""
    LABELS = torch.tensor([0, 1, 1, 0])

    def found(
        self, distillation: DistillationConfig, *, targets: Tensor | None = None
    ) -> tuple[float, float]:
        objective = Objective(
            student=lambda images: (self.LOGITS, self.FEATURES),  # type: ignore[arg-type]
            teacher=lambda images: (self.TEACHER, self.TEACHER_FEATURES),  # type: ignore[arg-type]
            distillation=distillation,
            autocast=nullcontext,
            device=torch.device("cpu"),
        )
        loss, accuracy = objective(TrainBatch(0, torch.zeros(4, 3, 2, 2), self.LABELS, targets))
        return loss.item(), accuracy.item()

    def labels(self) -> float:
        """-log p of the label, mean over the images."""
        rows = zip(self.LOGITS.tolist(), self.LABELS.tolist(), strict=True)
        return sum(math.log(sum(map(math.exp, row))) - row[label] for row, label in rows) / 4

    def divergence(self, temperature: float) -> float:
        """KL(teacher || student) of the softened distributions, mean over the images."""

        def softened(row: list[float]) -> list[float]:
            powers = [math.exp(value / temperature) for value in row]
            return [power / sum(powers) for power in powers]

        rows = zip(self.TEACHER.tolist(), self.LOGITS.tolist(), strict=True)
        pairs = [(softened(teacher), softened(student)) for teacher, student in rows]
        return sum(t * math.log(t / s) for one, other in pairs for t, s in zip(one, other, strict=True)) / 4

    def test_every_part_has_its_weight(self) -> None:
        loss, _ = self.found(DistillationConfig(distill=0.3, temperature=2.0, distill_features=0.2))
        features = (0.5 + 1.7777778 + 1.0 + 0.2) / 4
        assert loss == pytest.approx(0.7 * self.labels() + 0.3 * 4 * self.divergence(2.0) + 0.2 * features)

    def test_features_alone_leave_the_labels_their_whole_weight(self) -> None:
        loss, _ = self.found(DistillationConfig(distill_features=0.5))
        assert loss == pytest.approx(self.labels() + 0.5 * (0.5 + 1.7777778 + 1.0 + 0.2) / 4)

    def test_soft_targets_replace_the_labels(self) -> None:
        targets = torch.full((4, 3), 1 / 3)
        loss, _ = self.found(DistillationConfig(), targets=targets)
        rows = self.LOGITS.tolist()
        assert loss == pytest.approx(
            sum(math.log(sum(map(math.exp, row))) - sum(row) / 3 for row in rows) / 4
        )

    def test_accuracy_is_the_share_of_labels_predicted(self) -> None:
        assert self.found(DistillationConfig())[1] == 0.75, "the second image is taken for the third class"


class TestUpdate:
    def moved(self, config: FinetuneConfig, folder: Path) -> tuple[float, float]:
        """Length of the first step, and the gradient norm reported for it."""
        before, model = student().state_dict(), student()
        result = train(folder, replace(config, num_steps=1), model=model)
        norm = result.history["grad_norm"][0]
        assert norm is not None
        return distance(dict(model.state_dict()), before), norm

    def test_a_step_is_the_rate_times_the_gradient(self, tmp_path: Path) -> None:
        length, norm = self.moved(CONFIG, tmp_path)
        assert norm > 0.1
        assert length == pytest.approx(0.5 * norm, rel=1e-4)

    def test_the_gradient_is_clipped(self, tmp_path: Path) -> None:
        length, norm = self.moved(replace(CONFIG, optimization=replace(PLAIN, max_grad_norm=0.1)), tmp_path)
        assert norm > 0.1, "reported before clipping"
        assert length == pytest.approx(0.05, rel=1e-4)

    def test_accumulated_gradients_are_averaged(self, tmp_path: Path) -> None:
        one, _ = self.moved(CONFIG, tmp_path / "one")
        four, _ = self.moved(replace(CONFIG, accumulation=4), tmp_path / "four")
        assert four == pytest.approx(one, rel=1e-3)

    def test_gradients_are_synchronised_before_every_step(self, tmp_path: Path) -> None:
        """Also with an Accelerator whose count of passes an interrupted run has left odd."""
        processes = start_processes("cpu")
        processes.accelerator.step = 1
        seen: list[bool] = []
        hook = register_optimizer_step_pre_hook(lambda *_: seen.append(processes.accelerator.sync_gradients))
        try:
            train(tmp_path, replace(CONFIG, accumulation=2), trained_by=processes)
        finally:
            hook.remove()
        assert seen == [True] * 4

    def test_the_moving_average(self, tmp_path: Path) -> None:
        """timm's warm-up lets update k keep 1 - k^(-2/3) of the average, at most the decay: 0, 0.370, 0.5, 0.5."""
        model, heads = student(), []

        class Look(Callback):
            def on_steps(self, logs: Any) -> None:
                heads.append(model.head.weight.detach().clone())

        train(tmp_path, replace(CONFIG, ema_decay=0.5), model=model, callback=Look())
        average = heads[0]
        for kept, head in zip((0.3700395, 0.5, 0.5), heads[1:], strict=True):
            average = kept * average + (1 - kept) * head
        saved = load_file(tmp_path / "last/model.safetensors")["head.weight"]
        torch.testing.assert_close(saved, average, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(saved, heads[-1], rtol=1e-3)

    def test_the_loss_scale_is_restored(self, tmp_path: Path) -> None:
        """A gradient that overflows halves the scale of 65536, for the rest of the run."""
        model, calls = student(), []

        def overflow(gradient: Tensor) -> Tensor:
            calls.append(1)  # the first call is the search for unused parameters
            return gradient * (math.inf if len(calls) == 3 else 1.0)

        class Stop(Callback):
            def on_steps(self, logs: Any) -> None:
                if logs[-1].step == 3:
                    raise KeyboardInterrupt

        model.head.weight.register_hook(overflow)
        config = replace(CONFIG, dtype="float16")
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, config, model=model, callback=Stop())
        train(tmp_path, config, resume=True)
        state = load_state(tmp_path / "checkpoint.safetensors")
        assert (state.step, state.scaler["scale"]) == (4, 32768.0)


class SecondRank(Processes):
    """A process that takes itself for the second one."""

    @property
    def rank(self) -> int:
        """Not the first."""
        return 1


@pytest.mark.parametrize(
    ("kind", "seeds"),
    [(Processes, [0, 4099, 8198, 12297, 16396, 20495]), (SecondRank, [1, 4100, 8199, 12298, 16397, 20496])],
)
def test_every_pass_of_every_process_draws_its_own_random_numbers(
    kind: type[Processes], seeds: list[int], tmp_path: Path
) -> None:
    model, found = student(), []

    def see(module: nn.Module, inputs: Any) -> None:
        if module.training:
            found.append(torch.initial_seed())

    model.register_forward_pre_hook(see)
    alone = start_processes("cpu")
    config = replace(CONFIG, num_steps=3, accumulation=2, checkpoint_every=3)
    train(tmp_path, config, model=model, trained_by=kind(alone.accelerator, alone.device))
    assert found == seeds


def test_an_evaluation_counts_images_not_batches() -> None:
    """Logits are logarithms of probabilities; the images' labels come first, last and fifth."""
    even, falling = [0.5, 0.1, 0.1, 0.1, 0.1, 0.1], [0.4, 0.2, 0.15, 0.1, 0.09, 0.06]
    batches = [
        SimpleNamespace(images=torch.tensor([even, falling]).log(), labels=torch.tensor([0, 5])),
        SimpleNamespace(images=torch.tensor([falling]).log(), labels=torch.tensor([4])),
    ]
    host = SimpleNamespace(
        model=lambda images: images,
        output=lambda logits: logits,
        device=torch.device("cpu"),
        in_eval_mode=nullcontext,
    )
    found = evaluate_at(7, host, batches, nullcontext, start_processes("cpu"))  # type: ignore[arg-type]
    assert (found.step, found.images) == (7, 3)
    assert found.top1 == pytest.approx(33.333333)
    assert found.top5 == pytest.approx(66.666667)
    assert found.loss == pytest.approx((0.6931472 + 2.8134107 + 2.4079456) / 3)


def test_of_equal_evaluations_the_first_is_the_best(tmp_path: Path) -> None:
    flags: list[bool] = []

    class Look(Callback):
        def on_evaluation(self, evaluation: Evaluation, *, best: bool) -> None:
            flags.append(best)

    config = replace(CONFIG, eval_every=1, optimization=replace(PLAIN, learning_rate=1e-9))
    result = train(tmp_path, config, callback=Look())
    assert len({evaluation.top1 for evaluation in result.evaluations}) == 1
    assert flags == [True, False, False, False]
    assert result.best is not None
    assert result.best.step == 1


def test_the_names_in_the_files_of_a_run_do_not_change(tmp_path: Path) -> None:
    """A run begun with an earlier version must be resumable."""
    import json

    from safetensors import safe_open

    train(tmp_path, replace(CONFIG, ema_decay=0.9))
    with safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as opened:
        header = json.loads(opened.metadata()["state"])
        prefixes = {name.split(".")[0] for name in opened.keys()}  # noqa: SIM118 -- not a dict
    assert set(header) == {
        *("version", "step", "facts", "plan", "optimizer", "ema", "scaler", "evaluations", "seconds")
    }
    assert prefixes == {"model", "ema", "history"}, "SGD without momentum has no tensors"
    assert set(header["facts"]) == {
        *("model", "processes", "pruning", "num_steps", "batch_size", "accumulation", "dtype", "ema_decay"),
        *("checkpointing", "eval_every", "seed", "optimization", "distillation", "tightening", "freezing"),
    }
    record = json.loads((tmp_path / "record.json").read_text())
    assert set(record) == {
        *("model", "plan", "config", "facts", "final", "best", "evaluations", "history", "images_per_s"),
        *("seconds", "steps_done", "resumed_at", "trained_values", "environment"),
    }
    assert set(record["history"]) == {"loss", "accuracy", "grad_norm", "learning_rate", "images_per_s"}
