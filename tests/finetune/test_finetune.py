"""The training loop: it learns, it is pruned while it does, and a run that was stopped is the run that was not."""

from __future__ import annotations

import dataclasses
import errno
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning import CLASSES, PREPARED, PRUNING, SGD, eval_batches, student, train
from safetensors.torch import load_file
from torch import Tensor, nn

from cpvit import Plan, PruneConfig, load_pruned, plan_of, prune_
from cpvit.adapters import open_host
from cpvit.data.training import Mixing
from cpvit.finetune import (
    Callback,
    DistillationConfig,
    DivergedError,
    FinetuneConfig,
    FreezeConfig,
    OptimizerConfig,
    RunOptions,
    StepLog,
    TighteningConfig,
    start_processes,
)
from cpvit.finetune import folder as run_folder
from cpvit.measure.evaluate import predict

SHORT = FinetuneConfig(num_steps=4, batch_size=6, optimization=SGD, checkpoint_every=2)


class Listener(Callback):
    """Keeps what it is called with; may stop the run by an error, as a full disk or a person would."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.messages: list[str] = []
        self.logs: list[StepLog] = []
        self.tokens: list[int] = []
        self.model: Any = None

    def on_steps(self, logs: Any) -> None:
        self.logs += logs
        if self.model is not None:
            plan = plan_of(self.model)
            self.tokens += [] if plan is None else [plan.patches_per_block[-1]]
        if self.stop_after is not None and logs[-1].step > self.stop_after:
            raise KeyboardInterrupt

    def on_message(self, text: str) -> None:
        self.messages.append(text)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class TestLearning:
    @pytest.mark.parametrize("pruning", [None, PRUNING])
    def test_the_loss_falls_and_the_accuracy_rises(self, pruning: Any, tmp_path: Path) -> None:
        config = dataclasses.replace(
            SHORT,
            num_steps=24,
            batch_size=8,
            eval_every=12,
            checkpoint_every=24,
            optimization=OptimizerConfig(learning_rate=3e-3),
        )
        result = train(tmp_path / "run", config, pruning=pruning)
        loss = result.history["loss"]
        assert sum(loss[-5:]) < 0.6 * sum(loss[:5])
        assert result.best is not None
        assert result.best.top1 > 80
        assert [evaluation.step for evaluation in result.evaluations] == [12, 24]
        assert result.evaluations[0].images == 18

    def test_the_model_is_left_with_the_plan_and_the_last_weights(self, tmp_path: Path) -> None:
        model = student()
        result = train(tmp_path, SHORT, model=model)
        assert plan_of(model) == result.plan
        assert result.plan is not None
        assert result.plan.patches_per_block == (25, 16, 8)
        assert same(weights(tmp_path / "last"), model.state_dict())
        assert not model.training, "it came in eval mode"

    def test_a_training_step_works_on_fewer_tokens_forward_and_backward(self, tmp_path: Path) -> None:
        sizes: list[int] = []
        model = student()

        def see(module: nn.Module, inputs: Any, output: Tensor) -> None:
            sizes.append(output.shape[1])
            if output.requires_grad:
                output.register_hook(lambda gradient: sizes.append(-gradient.shape[1]))

        model.blocks[2].mlp.fc2.register_forward_hook(see)
        train(tmp_path, dataclasses.replace(SHORT, num_steps=1), model=model)
        # Before it, the whole is compared with the untouched model, and one pass looks for unused weights.
        assert [size for size in sizes if size < 0] == [-9, -9]

    def test_drop_path_is_the_hosts(self, tmp_path: Path) -> None:
        results = [
            train(tmp_path / str(number), SHORT, model=student(drop_path_rate=rate))
            for number, rate in enumerate((0.0, 0.5, 0.5))
        ]
        without, dropped, again = (result.history["loss"] for result in results)
        assert without != dropped
        assert dropped == again

    def test_the_random_numbers_of_the_caller_go_on(self, tmp_path: Path) -> None:
        train(tmp_path, SHORT, model=student(drop_path_rate=0.5))
        found = torch.rand(3)
        torch.manual_seed(0)  # as ``train`` does
        assert torch.equal(found, torch.rand(3))

    def test_accumulated_passes_make_the_same_step(self, tmp_path: Path) -> None:
        whole = train(tmp_path / "whole", SHORT)
        parts = train(tmp_path / "parts", dataclasses.replace(SHORT, accumulation=3))
        torch.testing.assert_close(parts.history["loss"], whole.history["loss"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            parts.history["grad_norm"], whole.history["grad_norm"], rtol=1e-4, atol=1e-5
        )

    def test_checkpointing_inside_the_cascade_changes_nothing(self, tmp_path: Path) -> None:
        for name, pruning in (("pruned", PRUNING), ("dense", None)):
            plain = train(tmp_path / name, SHORT, pruning=pruning)
            config = dataclasses.replace(SHORT, checkpointing=True)
            again = train(tmp_path / f"{name}-checkpointing", config, pruning=pruning)
            torch.testing.assert_close(again.history["loss"], plain.history["loss"], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_keeps_float32_weights(self, dtype: Any, tmp_path: Path) -> None:
        full = train(tmp_path / "full", SHORT)
        half = train(tmp_path / "half", dataclasses.replace(SHORT, dtype=dtype))
        torch.testing.assert_close(half.history["loss"], full.history["loss"], rtol=0.1, atol=0.1)
        assert half.history["loss"] != full.history["loss"]
        assert half.environment.dtype == dtype
        assert {tensor.dtype for tensor in weights(tmp_path / "half/last").values()} == {torch.float32}

    def test_a_step_that_float16_leaves_out_is_written_as_such(self, tmp_path: Path) -> None:
        model = student()
        calls = []

        def overflow(gradient: Tensor) -> Tensor:
            calls.append(1)
            return gradient * (
                float("inf") if len(calls) == 3 else 1.0
            )  # the first is the look for unused parts

        model.head.weight.register_hook(overflow)
        result = train(tmp_path, dataclasses.replace(SHORT, dtype="float16"), model=model)
        norms = result.history["grad_norm"]
        assert [norm is None for norm in norms] == [False, True, False, False]
        assert "Infinity" not in (tmp_path / "record.json").read_text()
        assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "last").values())

    def test_the_average_of_the_weights_is_what_is_evaluated_and_saved(self, tmp_path: Path) -> None:
        model = student()
        train(tmp_path, dataclasses.replace(SHORT, ema_decay=0.9), model=model)
        saved, own = weights(tmp_path / "last"), model.state_dict()
        assert not same(saved, own)
        start = student().state_dict()
        name = "head.weight"
        assert (saved[name] - own[name]).norm() < (start[name] - own[name]).norm()

    def test_other_libraries_hosts_are_trained_and_their_unused_parts_named(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.Dinov2Config(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=40,
            patch_size=8,
            num_labels=3,
        )
        listener = Listener()
        model = transformers.Dinov2ForImageClassification(config)
        result = train_square(tmp_path, model, PruneConfig(method="tome", macs=0.8), listener)
        assert result.best is not None
        assert any("mask_token" in text for text in listener.messages)
        reloaded = load_pruned(tmp_path / "best")
        assert plan_of(reloaded) == result.plan


def train_square(folder: Path, model: nn.Module, pruning: PruneConfig, listener: Listener) -> Any:
    """As ``train``, on square images."""
    from finetuning import LABELS, pictures

    from cpvit.data import make_loader
    from cpvit.data.training import TrainLoaderOptions, make_train_batches
    from cpvit.finetune import finetune

    square = dataclasses.replace(PREPARED, image_size=(40, 40))
    return finetune(
        model,
        make_train_batches(
            pictures(), square, TrainLoaderOptions(batch_size=6), labels=LABELS, num_classes=3
        ),
        make_loader(pictures(2, split="test"), square, labels=LABELS, batch_size=6),
        dataclasses.replace(SHORT, distillation=DistillationConfig(distill=0.5, distill_features=0.1)),
        folder,
        pruning=pruning,
        options=RunOptions(callback=listener),
        processes=start_processes("cpu"),
    )


class TestTeacher:
    def test_a_student_that_is_the_teacher_has_nothing_to_learn(self, tmp_path: Path) -> None:
        config = dataclasses.replace(
            SHORT, num_steps=1, distillation=DistillationConfig(distill=1.0, distill_features=1.0)
        )
        result = train(tmp_path, config, pruning=PruneConfig(keep_per_block=(35, 35, 35)))
        assert result.history["loss"] == pytest.approx([0.0], abs=1e-6)

    def test_the_teacher_stays_dense_and_as_it_was(self, tmp_path: Path) -> None:
        teacher = student(seed=3)
        before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
        config = dataclasses.replace(SHORT, distillation=DistillationConfig(distill=0.5, temperature=2.0))
        taught = train(tmp_path / "taught", config, teacher=teacher)
        untaught = train(tmp_path / "untaught", SHORT)
        assert same(teacher.state_dict(), before)
        assert plan_of(teacher) is None
        assert taught.history["loss"] != untaught.history["loss"]

    def test_a_student_follows_its_teacher(self, tmp_path: Path) -> None:
        config = dataclasses.replace(
            SHORT,
            num_steps=30,
            optimization=OptimizerConfig(learning_rate=1e-3),
            distillation=DistillationConfig(distill=1.0, distill_features=0.5),
        )
        loss = train(tmp_path, config, teacher=student(seed=3)).history["loss"]
        assert sum(loss[-5:]) < 0.5 * sum(loss[:5])

    def test_a_pruned_model_is_no_dense_teacher(self, tmp_path: Path) -> None:
        model = student()
        prune_(model, PRUNING)
        config = dataclasses.replace(SHORT, distillation=DistillationConfig(distill=0.5))
        with pytest.raises(ValueError, match="the model is pruned already; give it untouched"):
            train(tmp_path, config, model=model)


class TestTightening:
    def test_the_plan_tightens_in_stages_and_evaluation_uses_all_of_it(self, tmp_path: Path) -> None:
        model, listener = student(), Listener()
        listener.model = model
        config = dataclasses.replace(
            SHORT, num_steps=8, eval_every=2, tightening=TighteningConfig(tighten_steps=6, tighten_stages=3)
        )
        result = train(tmp_path, config, model=model, callback=listener)
        assert listener.tokens == [35, 35, 26, 26, 17, 17, 8, 8]
        assert result.plan is not None
        saved = load_pruned(tmp_path / "best", student())
        assert plan_of(saved) == result.plan
        predictions = predict(open_host(saved), eval_batches(processes=start_processes("cpu")))
        assert result.best is not None
        assert predictions.top(1) == pytest.approx(result.best.top1)

    def test_heads_that_were_cut_stay_cut(self, tmp_path: Path) -> None:
        model = student()
        images = torch.randn(4, 3, 40, 56)
        plan = prune_(model, PruneConfig(keep_per_block=(25, 16, 8), head_keep_rate=0.6), calibration=images)
        assert min(plan.heads_per_block) < 5
        config = dataclasses.replace(SHORT, tightening=TighteningConfig(tighten_steps=3))
        result = train(tmp_path, config, pruning=plan)
        assert result.plan == plan
        saved = weights(tmp_path / "last")
        assert saved["blocks.2.attn.proj.weight"].shape[1] == 6 * plan.heads_per_block[2]
        assert plan_of(load_pruned(tmp_path / "last", student())) == plan


RESUMED = {
    "sgd": SHORT,
    "adamw": dataclasses.replace(SHORT, optimization=OptimizerConfig(layer_decay=0.7)),
    "everything": FinetuneConfig(
        num_steps=6,
        batch_size=8,
        accumulation=2,
        checkpoint_every=2,
        eval_every=3,
        ema_decay=0.9,
        seed=5,
        checkpointing=True,
        optimization=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        tightening=TighteningConfig(tighten_steps=5),
        distillation=DistillationConfig(distill=0.3, distill_features=0.2),
    ),
    "float16": dataclasses.replace(SHORT, dtype="float16"),
}


class TestGoingOn:
    @pytest.mark.parametrize(
        ("name", "stop"),
        [("sgd", 0), ("sgd", 2), ("adamw", 3), ("everything", 2), ("everything", 5), ("float16", 3)],
    )
    def test_a_stopped_run_goes_on_bit_for_bit(self, name: str, stop: int, tmp_path: Path) -> None:
        config = RESUMED[name]
        options: dict[str, Any] = {"mixing": Mixing(mixup=0.8, cutmix=1.0)}

        def start() -> nn.Module:
            return student(drop_path_rate=0.3, proj_drop_rate=0.2)

        whole = train(tmp_path / "whole", config, model=start(), **options)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", config, model=start(), callback=Listener(stop), **options)
        listener = Listener()
        parts = train(tmp_path / "parts", config, model=start(), resume=True, callback=listener, **options)
        for column in ("loss", "accuracy", "grad_norm", "learning_rate"):
            assert parts.history[column] == whole.history[column], column
        assert parts.evaluations == whole.evaluations
        assert stop - 2 < parts.resumed_at <= stop or stop == parts.resumed_at == 0
        for folder in ("best", "last"):
            assert same(weights(tmp_path / "parts" / folder), weights(tmp_path / "whole" / folder))
        expected = f"going on after step {parts.resumed_at} of" if stop else "no checkpoint in"
        assert any(expected in text for text in listener.messages)

    @pytest.mark.parametrize(
        ("stop", "words"),
        [
            (0, "interrupted after step 1, before the first checkpoint"),
            (2, "after step 3; --resume goes on after step 2"),
        ],
    )
    def test_an_interruption_says_how_to_go_on(self, stop: int, words: str, tmp_path: Path) -> None:
        listener = Listener(stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, SHORT, callback=listener)
        assert words in listener.messages[-1]

    def test_a_finished_run_has_nothing_left_to_do(self, tmp_path: Path) -> None:
        first = train(tmp_path, SHORT)
        again = train(tmp_path, SHORT, resume=True)
        assert again.resumed_at == again.steps_done == 4
        assert (again.history, again.evaluations) == (first.history, first.evaluations)

    def test_a_folder_with_a_run_is_not_overwritten(self, tmp_path: Path) -> None:
        train(tmp_path, SHORT)
        before = (tmp_path / "checkpoint.safetensors").read_bytes()
        with pytest.raises(ValueError, match=r"holds a run already \(checkpoint.safetensors\).*--resume"):
            train(tmp_path, SHORT)
        assert (tmp_path / "checkpoint.safetensors").read_bytes() == before

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"seed": 1}, "seed was 0 and is 1"),
            (
                {"optimization": dataclasses.replace(SGD, learning_rate=0.1)},
                "learning_rate was 0.05 and is 0.1",
            ),
            ({"num_steps": 5, "ema_decay": 0.9}, "num_steps was 4 and is 5; ema_decay was None and is 0.9"),
        ],
    )
    def test_another_configuration_is_refused_and_named(
        self, changes: Any, words: str, tmp_path: Path
    ) -> None:
        train(tmp_path, SHORT)
        with pytest.raises(ValueError, match=f"was started differently and cannot go on like this: {words}"):
            train(tmp_path, dataclasses.replace(SHORT, **changes), resume=True)

    def test_another_plan_or_other_data_are_refused(self, tmp_path: Path) -> None:
        train(tmp_path, SHORT, fingerprint={"train_images": 24})
        with pytest.raises(ValueError, match="method was 'cpvit-merge' and is 'tome'"):
            train(tmp_path, SHORT, pruning=dataclasses.replace(PRUNING, method="tome"), resume=True)
        with pytest.raises(ValueError, match="train_images was 24 and is 25"):
            train(tmp_path, SHORT, fingerprint={"train_images": 25}, resume=True)
        with pytest.raises(ValueError, match="pruning was None and is 'dense'"):
            train(tmp_path, SHORT, fingerprint={"train_images": 24}, pruning=None, resume=True)

    def test_more_frequent_checkpoints_are_no_difference(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, SHORT, callback=Listener(2))
        assert train(tmp_path, dataclasses.replace(SHORT, checkpoint_every=1), resume=True).resumed_at == 2

    def test_what_a_killed_process_left_is_removed(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, SHORT, callback=Listener(2))
        (tmp_path / ".checkpoint.safetensors.abc").write_bytes(b"half")
        (tmp_path / "last/.saving-xyz").mkdir()
        (tmp_path / "last/.saving-xyz/model.safetensors").write_bytes(b"half")
        train(tmp_path, SHORT, resume=True)
        assert not list(tmp_path.rglob(".*"))

    def test_a_damaged_checkpoint_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoint.safetensors").write_bytes(b"nonsense")
        with pytest.raises(ValueError, match=r"checkpoint.safetensors is not a whole checkpoint"):
            train(tmp_path, SHORT, resume=True)

    def test_a_file_is_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("")
        with pytest.raises(ValueError, match="is a file; give the name of a folder"):
            train(tmp_path / "run", SHORT)


class TestTrouble:
    @pytest.mark.parametrize("after", [0, 2])
    def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
        self, after: int, tmp_path: Path
    ) -> None:
        model = student()

        class Poison(Listener):
            def on_steps(self, logs: Any) -> None:
                super().on_steps(logs)
                if logs[-1].step == after + 1:
                    with torch.no_grad():
                        model.head.weight[0] = float("nan")

        if after == 0:
            config = dataclasses.replace(SHORT, checkpoint_every=4)
            words = r"the loss is nan at step 2 .*there is no checkpoint yet.*lower learning rate"
        else:
            config, words = (
                SHORT,
                r"the loss is nan at step 4 .*the checkpoint of step 2 is good: .*checkpoint",
            )
        with pytest.raises(DivergedError, match=words):
            train(tmp_path, config, model=model, callback=Poison())
        if after:
            assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "last").values())
            assert train(tmp_path, SHORT, resume=True).resumed_at == 2

    def test_a_gradient_that_is_not_finite_stops_before_it_is_saved(self, tmp_path: Path) -> None:
        model = student()
        calls = []

        def poison(gradient: Tensor) -> Tensor:
            calls.append(1)
            return gradient * (
                float("inf") if len(calls) == 5 else 1.0
            )  # the first is the look for unused parts

        model.head.weight.register_hook(poison)
        with pytest.raises(DivergedError, match=r"the gradient's norm is (inf|nan) at step 4"):
            train(tmp_path, SHORT, model=model)
        assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "last").values())

    @pytest.mark.parametrize("writer", ["save_state", "save_pruned", "write_atomically"])
    def test_a_full_disk_is_an_error_and_the_old_checkpoint_stays(
        self, writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, SHORT, callback=Listener(2))
        before = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}

        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(run_folder, writer, full)
            with pytest.raises(
                OSError, match=r"cannot write .*No space left on device; the checkpoint before it"
            ):
                train(tmp_path, SHORT, resume=True)
        assert {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")} == before
        assert not list(tmp_path.rglob(".*"))
        assert train(tmp_path, SHORT, resume=True).steps_done == 4

    def test_a_disk_that_is_full_at_first_says_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("cpvit.finetune.checkpoint.save_file", full)
        config = dataclasses.replace(SHORT, num_steps=1)
        with pytest.raises(OSError, match="No space left on device; there is no checkpoint yet: make room"):
            train(tmp_path, config)
        assert not list(tmp_path.rglob(".*"))

    def test_weights_in_half_precision_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"the weights of \S+ are bfloat16; give them in float32"):
            train(tmp_path, SHORT, model=student().bfloat16())


class TestRecord:
    def test_it_holds_what_was_asked_done_and_measured(self, tmp_path: Path) -> None:
        result = train(tmp_path, dataclasses.replace(SHORT, eval_every=2), fingerprint={"data": "toy"})
        record = json.loads((tmp_path / "record.json").read_text())
        assert record["config"]["optimization"]["learning_rate"] == 0.05
        assert record["facts"]["data"] == "toy"
        assert record["plan"]["patches_per_block"] == [25, 16, 8]
        assert record["history"]["loss"] == result.history["loss"]
        assert len(record["history"]["images_per_s"]) == 4
        assert min(record["history"]["images_per_s"]) > 0
        assert [evaluation["step"] for evaluation in record["evaluations"]] == [2, 4]
        assert record["environment"]["versions"]["torch"] == version("torch")
        assert record["final"]["top1"] == result.evaluations[-1].top1
        assert Plan.load(tmp_path / "plan.json") == result.plan

    def test_best_is_the_best_and_not_the_last(self, tmp_path: Path) -> None:
        config = dataclasses.replace(
            SHORT,
            num_steps=8,
            eval_every=1,
            optimization=dataclasses.replace(SGD, learning_rate=5.0, decay="constant", warmup_steps=0),
        )
        result = train(tmp_path, config)
        assert result.best is not None
        assert result.final is not None
        assert result.best.top1 == max(evaluation.top1 for evaluation in result.evaluations)
        saved = load_pruned(tmp_path / "best", student())
        predictions = predict(open_host(saved), eval_batches(processes=start_processes("cpu")))
        assert predictions.top(1) == pytest.approx(result.best.top1)

    def test_a_dense_run_saves_plain_weights(self, tmp_path: Path) -> None:
        model = student()
        result = train(tmp_path, SHORT, model=model, pruning=None)
        assert result.plan is None
        assert not (tmp_path / "plan.json").exists()
        fresh = student(seed=1)
        fresh.load_state_dict(weights(tmp_path / "last"))
        assert same(dict(fresh.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize(
    ("freezing", "trained"),
    [
        (FreezeConfig(freeze="all-but-head"), {"head.weight", "head.bias"}),
        (FreezeConfig(freeze="embed"), None),
        (FreezeConfig(freeze_blocks=2), None),
        (FreezeConfig(freeze="all-but-norm-and-head"), None),
    ],
)
def test_what_is_frozen_keeps_its_values(
    freezing: FreezeConfig, trained: set[str] | None, tmp_path: Path
) -> None:
    before, model = student().state_dict(), student()
    train(tmp_path, dataclasses.replace(SHORT, freezing=freezing), model=model)
    assert all(parameter.requires_grad for parameter in model.parameters()), "only while it trains"
    after = weights(tmp_path / "last")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    if trained is None:
        trained = {
            name
            for name in before
            if (freezing.freeze == "all-but-norm-and-head" and ("norm" in name or "head" in name))
            or (freezing.freeze != "all-but-norm-and-head" and not is_frozen(name, freezing))
        }
    assert moved == trained


def is_frozen(name: str, freezing: FreezeConfig) -> bool:
    embedding = name.startswith(("patch_embed", "cls_token", "pos_embed"))
    return embedding or any(name.startswith(f"blocks.{number}.") for number in range(freezing.freeze_blocks))


def test_there_are_as_many_classes_as_the_pictures_have() -> None:
    assert student().num_classes == len(CLASSES)
