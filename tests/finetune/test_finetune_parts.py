"""What the training loop is made of: configuration, losses, optimiser, schedule, tightening, files."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning import student
from safetensors.torch import save_file
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionViT

from cpvit import Plan, PruneConfig, plan_of, prune_
from cpvit.adapters import open_host
from cpvit.files import remove_leftovers, replacing, write_atomically
from cpvit.finetune import (
    Callback,
    CallbackList,
    DistillationConfig,
    FinetuneConfig,
    FreezeConfig,
    OptimizerConfig,
    StepLog,
    TighteningConfig,
    start_processes,
)
from cpvit.finetune.checkpoint import Evaluation, TrainingState, load_state, save_state
from cpvit.finetune.features import classifier_of
from cpvit.finetune.fingerprint import differences
from cpvit.finetune.freeze import drop_unused_, freeze_
from cpvit.finetune.gradual import active, interpolated, plan_at, set_patches_
from cpvit.finetune.losses import classification_loss, distillation_loss, feature_loss
from cpvit.finetune.optimizer import make_optimizer, make_schedule
from cpvit.finetune.progress import ProgressBar
from cpvit.finetune.tensorboard import TensorBoard
from cpvit.weights.create import create_model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FinetuneConfig(num_steps=0), "num_steps must be at least 1, got 0"),
        (lambda: FinetuneConfig(batch_size=True), "batch_size must be a whole number, got True"),
        (
            lambda: FinetuneConfig(batch_size=10, accumulation=4),
            "batch_size 10 cannot be split into 4 equal parts",
        ),
        (
            lambda: FinetuneConfig(dtype="float64"),
            "dtype must be one of float32, bfloat16, float16, got 'float64'",
        ),  # type: ignore[arg-type]
        (lambda: FinetuneConfig(ema_decay=1.0), "ema_decay must be above 0 and below 1, got 1.0"),
        (lambda: FinetuneConfig(eval_every=0), "eval_every must be at least 1, got 0"),
        (lambda: FinetuneConfig(seed=-1), "seed must be at least 0, got -1"),
        (
            lambda: FinetuneConfig(num_steps=5, optimization=OptimizerConfig(warmup_steps=6)),
            "warmup_steps is 6, more than the 5 steps of the run",
        ),
        (
            lambda: FinetuneConfig(num_steps=5, tightening=TighteningConfig(tighten_steps=6)),
            "tighten_steps is 6, more than the 5 steps of the run",
        ),
        (lambda: OptimizerConfig(learning_rate=0), "learning_rate must be above 0, got 0"),
        (lambda: OptimizerConfig(learning_rate=math.nan), "learning_rate must be above 0, got nan"),
        (lambda: OptimizerConfig(learning_rate="1"), "learning_rate must be a number, got '1'"),  # type: ignore[arg-type]
        (lambda: OptimizerConfig(layer_decay=1.5), "layer_decay must be above 0 and at most 1, got 1.5"),
        (lambda: OptimizerConfig(optimizer="lion"), "optimizer must be one of adamw, sgd, got 'lion'"),  # type: ignore[arg-type]
        (lambda: OptimizerConfig(momentum=1.0), "momentum must be at least 0 and below 1, got 1.0"),
        (lambda: DistillationConfig(distill=1.5), "distill must be at least 0 and at most 1, got 1.5"),
        (lambda: DistillationConfig(temperature=0), "temperature must be above 0, got 0"),
        (lambda: TighteningConfig(tighten_stages=0), "tighten_stages must be at least 1, got 0"),
        (lambda: FreezeConfig(freeze="most"), "freeze must be one of none, embed, all-but-head"),  # type: ignore[arg-type]
    ],
)
def test_what_makes_no_sense_is_refused_in_words(make: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        make()
    assert str(caught.value).startswith(words)


class TestLosses:
    def test_soft_targets_that_are_one_hot_are_labels(self) -> None:
        logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
        hard = classification_loss(logits, labels, None)
        soft = classification_loss(logits, labels.flip(0), nn.functional.one_hot(labels, 3).float())
        torch.testing.assert_close(hard, soft)

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_distillation_is_the_divergence_of_softened_distributions(self, temperature: float) -> None:
        student_logits, teacher_logits = torch.randn(4, 7).double(), torch.randn(4, 7).double()
        wanted = (teacher_logits / temperature).softmax(-1)
        got = (student_logits / temperature).softmax(-1)
        slow = temperature**2 * (wanted * (wanted / got).log()).sum(-1).mean()
        found = distillation_loss(student_logits, teacher_logits, temperature)
        torch.testing.assert_close(found.double(), slow, rtol=1e-5, atol=1e-6)
        assert distillation_loss(teacher_logits, teacher_logits, temperature).item() == pytest.approx(
            0, abs=1e-6
        )

    def test_the_size_of_the_gradient_hardly_depends_on_the_temperature(self) -> None:
        teacher_logits = torch.randn(4, 7) * 0.1
        norms = []
        for temperature in (1.0, 10.0):
            logits = torch.zeros(4, 7, requires_grad=True)
            distillation_loss(logits, teacher_logits, temperature).backward()
            assert logits.grad is not None
            norms.append(logits.grad.norm().item())
        assert norms[1] == pytest.approx(norms[0], rel=0.1)

    def test_features_are_compared_in_units_of_the_teachers(self) -> None:
        one, other = torch.randn(4, 6), torch.randn(4, 6)
        torch.testing.assert_close(feature_loss(one, other), feature_loss(10 * one, 10 * other))
        assert feature_loss(other, other) == 0
        assert feature_loss(torch.zeros_like(other), other) == pytest.approx(1.0)


def rates(config: FinetuneConfig) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.optimization.learning_rate)
    schedule = make_schedule(optimizer, config)
    found = []
    for step in range(config.num_steps):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


class TestSchedule:
    @pytest.mark.parametrize(("steps", "warmup"), [(20, 5), (20, 0), (7, 6), (1, 0), (6, 6)])
    @pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
    def test_it_is_the_original_finetuning_codes(self, decay: Any, steps: int, warmup: int) -> None:
        optimization = OptimizerConfig(learning_rate=0.03, warmup_steps=warmup, decay=decay)

        def expected(step: int) -> float:
            if step < warmup:
                return step / max(1, warmup)
            share = (step - warmup) / max(1, steps - warmup)
            return {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "constant": 1.0}[
                decay
            ]

        found = rates(FinetuneConfig(num_steps=steps, optimization=optimization))
        assert found == pytest.approx([0.03 * expected(step) for step in range(steps)])

    def test_a_twentieth_warms_up_by_default(self) -> None:
        found = rates(FinetuneConfig(num_steps=100, optimization=OptimizerConfig(learning_rate=1.0)))
        assert found[:6] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])

    def test_no_logger_complains_about_a_short_run(self, caplog: pytest.LogCaptureFixture) -> None:
        rates(FinetuneConfig(num_steps=1))
        assert not caplog.records


class TestOptimizer:
    def test_biases_norms_and_embeddings_do_not_decay(self) -> None:
        model = student()
        optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.1))
        decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        parameters = dict(model.named_parameters())
        assert decays[id(parameters["blocks.0.mlp.fc1.weight"])] == 0.1
        for name in ("blocks.0.mlp.fc1.bias", "norm.weight", "pos_embed", "cls_token"):
            assert decays[id(parameters[name])] == 0

    def test_layers_far_from_the_head_learn_slower(self) -> None:
        model = student()
        config = FinetuneConfig(num_steps=10, optimization=OptimizerConfig(layer_decay=0.5, warmup_steps=0))
        optimizer = make_optimizer(model, config.optimization)
        make_schedule(optimizer, config).step_update(0)
        rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        parameters = dict(model.named_parameters())
        chosen = [rate[id(parameters[f"blocks.{number}.mlp.fc1.weight"])] for number in range(3)]
        assert chosen[1] == pytest.approx(2 * chosen[0])
        assert chosen[2] == pytest.approx(2 * chosen[1])
        assert rate[id(parameters["head.weight"])] == pytest.approx(1e-4)

    def test_layer_decay_is_refused_where_the_layers_are_not_known(self) -> None:
        with pytest.raises(
            ValueError, match=r"layer_decay needs .* VisionTransformer of torchvision does not"
        ):
            make_optimizer(torchvision_vit(), OptimizerConfig(layer_decay=0.5))

    def test_sgd_is_the_originals(self) -> None:
        (group,) = make_optimizer(student(), OptimizerConfig(optimizer="sgd")).param_groups
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, False, 0.05)


def torchvision_vit() -> nn.Module:
    return TorchvisionViT(
        image_size=32, patch_size=8, num_layers=3, num_heads=3, hidden_dim=24, mlp_dim=40, num_classes=3
    ).eval()


def transformers_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=32,
        num_labels=3,
    )
    config.patch_size = 8
    model: nn.Module = transformers.ViTForImageClassification(config).eval()
    return model


@pytest.mark.parametrize("make", [student, torchvision_vit, transformers_vit])
class TestFreezing:
    def test_the_embedding(self, make: Any) -> None:
        model = make()
        freeze_(open_host(model), FreezeConfig(freeze="embed"))
        host = open_host(model)
        inside = {id(p) for block in host.blocks for p in block.module.parameters()}
        frozen = {id(p) for p in model.parameters() if not p.requires_grad}
        assert len(frozen) == 4, "kernel, its bias, class token and positions"
        assert not frozen & inside

    def test_the_first_blocks(self, make: Any) -> None:
        model = make()
        freeze_(open_host(model), FreezeConfig(freeze_blocks=2))
        trained = [any(p.requires_grad for p in b.module.parameters()) for b in open_host(model).blocks]
        assert trained == [False, False, True]

    def test_all_but_the_head(self, make: Any) -> None:
        model = make()
        classifier = classifier_of(open_host(model))
        assert freeze_(open_host(model), FreezeConfig(freeze="all-but-head")) == sum(
            p.numel() for p in classifier.parameters()
        )
        assert all(p.requires_grad for p in classifier.parameters())

    def test_all_but_the_norms_and_the_head(self, make: Any) -> None:
        model = make()
        freeze_(open_host(model), FreezeConfig(freeze="all-but-norm-and-head"))
        norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        classifier = classifier_of(open_host(model))
        assert trained == {id(p) for m in (*norms, classifier) for p in m.parameters()}

    def test_more_blocks_than_there_are(self, make: Any) -> None:
        with pytest.raises(ValueError, match=r"freeze_blocks is 4 but \S+ has 3 blocks"):
            freeze_(open_host(make()), FreezeConfig(freeze_blocks=4))


def test_stochastic_depth_is_timms_only() -> None:
    model = create_model("test_vit", drop_path=0.2)
    assert max(getattr(module, "drop_prob", None) or 0 for module in model.modules()) == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"torchvision/vit_b_16 has no stochastic depth, got drop_path=0\.2"):
        create_model("torchvision/vit_b_16", drop_path=0.2)


def test_a_model_without_a_classifier_is_refused() -> None:
    headless = student()
    headless.reset_classifier(0)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"has no linear classifier under the names head\.fc, head"):
        classifier_of(open_host(headless))
    with pytest.raises(ValueError, match="has no head to train"):
        freeze_(open_host(headless), FreezeConfig(freeze="all-but-head"))


def test_what_the_answer_does_not_depend_on_is_found_without_a_trace() -> None:
    model = student(proj_drop_rate=0.5)
    model.register_parameter("idle", nn.Parameter(torch.zeros(2)))
    model.train()
    before = torch.get_rng_state()
    assert drop_unused_(open_host(model)) == ("idle",)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


PLAN = Plan("m", "cpvit-merge", 40, 1, (30, 20, 10, 10), (3,) * 4)


class TestTightening:
    def test_it_goes_from_nothing_to_the_plan_and_never_back(self) -> None:
        config = TighteningConfig(tighten_steps=10, tighten_stages=5)
        plans = [plan_at(PLAN, config, step) for step in range(12)]
        assert plans[0].patches_per_block == (40,) * 4
        assert plans[10] is plans[11] is PLAN
        counts = [sum(plan.patches_per_block) for plan in plans]
        assert counts == sorted(counts, reverse=True)
        assert len(set(counts)) == 6

    def test_nothing_to_tighten_is_the_plan(self) -> None:
        assert plan_at(PLAN, TighteningConfig(), 0) is PLAN

    @pytest.mark.parametrize("method", ["cpvit", "cpvit-merge", "tome"])
    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
    def test_every_stage_is_a_plan_that_can_be_applied(self, method: str, share: float) -> None:
        model = student()
        plan = prune_(model, PruneConfig(method=method, keep_per_block=(18, 9, 5)))
        set_patches_(open_host(model), interpolated(plan, share))
        model.train()(torch.randn(2, 3, 40, 56)).sum().backward()
        assert plan_of(model) == interpolated(plan, share)

    def test_a_plan_that_is_active_for_a_while(self) -> None:
        model = student()
        images = torch.randn(2, 3, 40, 56)
        plan = prune_(model, PruneConfig(keep_per_block=(18, 9, 5)))
        strict = model(images)
        set_patches_(open_host(model), interpolated(plan, 0.0))
        loose = model(images)
        with active(open_host(model), plan):
            assert torch.equal(model(images), strict)
        assert torch.equal(model(images), loose)
        assert not torch.equal(strict, loose)

    def test_a_dense_model_has_no_plan_to_change(self) -> None:
        with pytest.raises(ValueError, match="is not pruned; call prune_"):
            set_patches_(open_host(student()), PLAN)


def state_of(step: int = 3, **changes: Any) -> TrainingState:
    tensor = torch.randn(4, 3)
    state = TrainingState(
        step=step,
        fingerprint={"seed": 1, "nested": {"rate": 0.1}},
        plan=PLAN.to_json(),
        model={"a": tensor, "shared": tensor, "half": torch.randn(2).bfloat16(), "view": tensor.t()},
        optimizer={0: {"step": torch.tensor(3.0), "momentum_buffer": None}, 7: {"exp.avg": torch.randn(2)}},
        history=torch.randn(3, 5).double(),
        ema={"a": torch.randn(4, 3)},
        scaler={"scale": 65536.0},
        evaluations=(Evaluation(2, 50.0, 100.0, 0.7, 18),),
        seconds=1.5,
    )
    return dataclasses.replace(state, **changes)


class TestState:
    def test_it_comes_back_as_it_was(self, tmp_path: Path) -> None:
        state = state_of()
        save_state(tmp_path / "state", state)
        found = load_state(tmp_path / "state")
        for name in ("step", "fingerprint", "plan", "scaler", "evaluations", "seconds"):
            assert getattr(found, name) == getattr(state, name)
        for name in ("model", "ema"):
            one, other = getattr(found, name), getattr(state, name)
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in other)
        assert torch.equal(found.history, state.history)
        assert found.optimizer[0]["momentum_buffer"] is None
        assert torch.equal(found.optimizer[7]["exp.avg"], state.optimizer[7]["exp.avg"])

    @pytest.mark.parametrize("damage", ["truncated", "another", "later"])
    def test_a_file_that_is_no_state_is_refused(self, damage: str, tmp_path: Path) -> None:
        path = tmp_path / "state"
        save_state(path, state_of())
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-9])
        if damage == "another":
            from safetensors.torch import save_file

            save_file({"a": torch.zeros(1)}, path)
        if damage == "later":
            path.write_bytes(path.read_bytes().replace(rb"\"version\": 1", rb"\"version\": 9"))
        words = "version 9, newer than this cpvit reads" if damage == "later" else "is not a whole checkpoint"
        with pytest.raises(ValueError, match=words):
            load_state(path)

    def test_a_disk_that_is_really_full_leaves_the_old_file(self, tmp_path: Path) -> None:
        """In a process of its own, which the system allows files of 20 kB only."""
        path = tmp_path / "state"
        save_state(path, state_of(step=1))
        before = path.read_bytes()
        child = os.fork()
        if not child:
            os._exit(_save_with_little_room(path))
        _, status = os.waitpid(child, 0)
        assert os.WEXITSTATUS(status) == 7, "expected an OSError"
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_differences_are_named_by_the_innermost_name(self) -> None:
        assert differences({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4, "d": 3}}) == [
            "c was 2 and is 4"
        ]


def _save_with_little_room(path: Path) -> int:
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        save_state(path, state_of(step=2, model={"large": torch.zeros(100_000)}))
    except OSError:
        return 7
    return 0


class TestFiles:
    def test_the_old_content_stays_until_the_new_is_complete(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        write_atomically(path, "old")
        seen = []

        def write() -> None:
            with replacing(path) as temporary:
                temporary.write_text("half")
                seen.append(path.read_text())
                raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(OSError, match="No space"):
            write()
        assert seen == ["old"]
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_others_may_read_it_as_any_file_of_this_user(self, tmp_path: Path) -> None:
        plain, written = tmp_path / "plain", tmp_path / "written"
        plain.write_text("")
        write_atomically(written, "")
        assert written.stat().st_mode == plain.stat().st_mode
        with replacing(written) as temporary:
            save_file({"a": torch.zeros(1)}, temporary)
        assert written.stat().st_mode == plain.stat().st_mode

    def test_leftovers_of_this_file_only_are_removed(self, tmp_path: Path) -> None:
        for name in ("file", ".file.x1", ".other.x1"):
            (tmp_path / name).write_text("")
        remove_leftovers(tmp_path / "file")
        assert {path.name for path in tmp_path.iterdir()} == {"file", ".other.x1"}

    def test_what_safetensors_leaves_is_removed_too(self, tmp_path: Path) -> None:
        """A real write that is killed when it meets a limit, whose draft's name is that of the library."""
        path = tmp_path / "checkpoint.safetensors"
        save_file({"a": torch.zeros(1)}, path)
        whole = path.read_bytes()
        script = (
            "import resource, signal, sys, torch; from pathlib import Path; from cpvit.files import replacing\n"
            "from safetensors.torch import save_file\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_DFL); resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "with replacing(Path(sys.argv[1])) as file: save_file({'a': torch.zeros(9999)}, file)\n"
        )
        killed = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
        assert killed.returncode == -signal.SIGXFSZ
        assert len(list(tmp_path.iterdir())) > 1
        remove_leftovers(path)
        assert list(tmp_path.iterdir()) == [path]
        assert path.read_bytes() == whole


class TestCallbacks:
    LOGS = (StepLog(1, 2.0, 10.0, 1.0, 0.1, 50.0), StepLog(2, 1.0, 20.0, 1.0, 0.1, 60.0))
    EVALUATION = Evaluation(2, 71.25, 99.5, 0.8125, 400)

    def call(self, callback: Any) -> None:
        callback.on_start(0, 2)
        callback.on_steps(self.LOGS)
        callback.on_evaluation(self.EVALUATION, best=True)
        callback.on_message("a [remark]")
        callback.on_stop()

    def test_the_bar_speaks_on_stderr(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.call(ProgressBar())
        captured = capsys.readouterr()
        assert captured.out.strip() == ""
        assert "step 2: top-1 71.25%, top-5 99.50%, loss 0.8125 on 400 images" in captured.err
        assert "(best so far)" in captured.err
        assert "a [remark]" in captured.err

    def test_the_curves_are_written_and_a_run_that_goes_on_replaces_them(self, tmp_path: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        processes = start_processes("cpu", logging_dir=tmp_path)
        self.call(CallbackList(Callback(), TensorBoard(processes)))
        again = TensorBoard(processes)
        again.on_start(1, 2)
        again.on_steps([dataclasses.replace(self.LOGS[1], loss=0.5)])
        again.on_stop()
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.0), (2, 0.5)]
        assert {"eval/top1", "eval/top5", "eval/loss", "train/images_per_s"} <= set(events.Tags()["scalars"])

    def test_curves_need_a_folder(self) -> None:
        with pytest.raises(ValueError, match=r"nowhere to write.*start_processes\(logging_dir=\.\.\.\)"):
            TensorBoard(start_processes("cpu"))
