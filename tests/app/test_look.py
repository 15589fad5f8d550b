"""The page's answers are the library's, its variants share the weights, and the dense model stays what it was."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cpvit import PruneConfig, plan_of, prune_
from cpvit.app import variants as module
from cpvit.app.examples import examples
from cpvit.app.look import Look, Looking
from cpvit.app.subject import EXPORTED, PLAN, Subject, class_labels, demo_subject
from cpvit.app.turns import Turns
from cpvit.app.uploads import Uploads
from cpvit.app.variants import Choice, Variants
from cpvit.data import Preprocessing
from cpvit.demo import load_digits_model
from cpvit.export.exporting import ExportOptions, export
from cpvit.export.runtimes import open_exported
from cpvit.plans.macs import count_macs
from cpvit.pruning.opening import open_restored


@pytest.fixture(scope="module")
def subject() -> Subject:
    return demo_subject()


@pytest.fixture(scope="module")
def looking(subject: Subject) -> Looking:
    return Looking(Variants(subject), Turns())


@pytest.fixture(scope="module")
def image(subject: Subject) -> torch.Tensor:
    return Uploads(subject.preprocessing).prepare(examples(1)[0].picture)


@pytest.mark.parametrize("method", ["cpvit", "cpvit-merge", "tome"])
def test_answers_are_those_of_the_library(looking: Looking, image: torch.Tensor, method: str) -> None:
    (look,) = looking.look(image, [Choice(method, 0.5)])
    model = load_digits_model()
    with torch.inference_mode():
        dense = model(image).softmax(-1)[0]
        dense_macs = count_macs(model)
        plan = prune_(model, PruneConfig(method=method, macs=0.5))
        pruned = model(image).softmax(-1)[0]
    assert look.dense is not None
    for side, expected in ((look.dense, dense), (look.pruned, pruned)):
        best = expected.topk(5)
        assert [answer.label for answer in side.answers] == [str(index) for index in best.indices.tolist()]
        assert [answer.probability for answer in side.answers] == pytest.approx(
            best.values.tolist(), abs=1e-6
        )
    assert look.pruned.plan == plan
    assert look.dense.macs == dense_macs
    assert look.pruned.macs == pytest.approx(count_macs(model), rel=1e-5)
    assert look.kl == pytest.approx(float((dense * (dense.log() - pruned.log())).sum()), abs=1e-6)
    assert look.depth == 8
    assert look.grid == (12, 12)


def test_the_pixels_are_the_image(looking: Looking, image: torch.Tensor) -> None:
    (look,) = looking.look(image, [Choice("cpvit", 0.5)])
    torch.testing.assert_close(look.pixels, (image[0] + 1) / 2)


def test_variants_share_the_weights_and_the_dense_model_is_untouched(image: torch.Tensor) -> None:
    subject = demo_subject()
    assert subject.dense is not None
    before = {name: tensor.clone() for name, tensor in subject.dense.model.state_dict().items()}
    variants = Variants(subject)
    for choice in (Choice("cpvit", 0.5), Choice("tome", 0.4)):
        host = variants.get(choice).host
        assert host is not None
        theirs = {parameter.data_ptr() for parameter in host.model.parameters()}
        assert theirs == {parameter.data_ptr() for parameter in subject.dense.model.parameters()}
    assert plan_of(subject.dense.model) is None
    after = subject.dense.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_variants_are_kept_up_to_a_bound(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_KEPT", 2)
    variants = Variants(subject)
    first = variants.get(Choice("cpvit", 0.5))
    assert variants.get(Choice("cpvit", 0.5)) is first
    variants.get(Choice("tome", 0.5))
    assert variants.get(Choice("cpvit", 0.5)) is first
    variants.get(Choice("evit", 0.5))
    variants.get(Choice("topk", 0.5))
    assert len(variants._kept) == 2
    assert variants.get(Choice("cpvit", 0.5)) is not first


def test_the_dense_model_runs_once_for_an_image(looking: Looking, image: torch.Tensor) -> None:
    (first,) = looking.look(image, [Choice("cpvit", 0.5)])
    (second,) = looking.look(image, [Choice("cpvit", 0.4)], first)
    (third,) = looking.look(image.clone(), [Choice("cpvit", 0.4)], second)
    assert second.dense is first.dense
    assert third.dense is not first.dense


def test_a_budget_out_of_reach_is_an_error_with_the_reach(looking: Looking, image: torch.Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"macs=0\.01 cannot be met by pruning patches: this model can spend"
    ):
        looking.look(image, [Choice("cpvit", 0.01)])
    with pytest.raises(ValueError, match=r"expected one of cpvit-merge, .*, got 'plan'"):
        looking.look(image, [Choice(PLAN)])


def test_times_are_in_turn_and_name_everybody(looking: Looking, image: torch.Tensor) -> None:
    found = looking.time(image, [Choice("cpvit", 0.5), Choice("tome", 0.4)])
    assert found.titles == ("dense", "cpvit at 50%", "tome at 40%")
    assert len(found.latencies) == 3
    assert len(found.speedups) == 2
    assert found.rounds >= 7
    assert all(0 < latency.p10 <= latency.median <= latency.p90 for latency in found.latencies)
    assert all(peak is not None and 1 < peak < 20 for peak in found.peaks_mib)


def test_a_plan_is_a_choice_of_its_own(image: torch.Tensor) -> None:
    plan = prune_(load_digits_model(), PruneConfig(method="tome", macs=0.7))
    looking = Looking(Variants(demo_subject(plan)), Turns())
    assert looking.variants.choices[0] == PLAN
    (look,) = looking.look(image, [Choice(PLAN, 0.3)])
    assert look.pruned.plan == plan
    assert look.macs_ratio == pytest.approx(0.7, abs=0.01)
    assert look.choice.title == "plan"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_digits_model()
    prune_(model, PruneConfig(method="cpvit", macs=0.6))
    path = tmp_path_factory.mktemp("exported") / "digits.pt2"
    preprocessing = Preprocessing((96, 96), (0.5,) * 3, (0.5,) * 3, crop_pct=1.0)
    export(model, path, ExportOptions(to="torch"), preprocessing=preprocessing)
    return path


def test_an_exported_file_answers_for_itself(exported: Path, image: torch.Tensor) -> None:
    opened = open_exported(exported)
    assert opened.description.preprocessing is not None
    subject = Subject(None, opened.description.preprocessing, class_labels(10, None), exported=opened)
    looking = Looking(Variants(subject), Turns())
    (look,) = looking.look(image, [Choice(EXPORTED)])
    assert look.dense is None
    assert look.agrees is None
    assert look.kl is None
    assert look.depth == 0
    expected = opened(image).softmax(-1)[0]
    assert look.pruned.answers[0].label == f"class {int(expected.argmax())}"
    assert look.pruned.answers[0].probability == pytest.approx(float(expected.max()), abs=1e-6)
    assert looking.time(image, [Choice(EXPORTED)]).peaks_mib == (None,)


def test_beside_its_model_one_sees_into_it(exported: Path, image: torch.Tensor) -> None:
    opened, dense = open_exported(exported), open_restored(load_digits_model())
    assert opened.description.preprocessing is not None
    subject = Subject(dense, opened.description.preprocessing, class_labels(10, None), exported=opened)
    (look,) = Looking(Variants(subject), Turns()).look(image, [Choice(EXPORTED)])
    assert look.dense is not None
    assert look.depth == 8
    plan = opened.description.plan
    assert plan is not None
    assert [len(view.positions) for view in look.pruned.blocks] == list(plan.patches_per_block)


def test_what_does_not_fit_is_refused(exported: Path) -> None:
    dense = open_restored(load_digits_model())
    preprocessing = demo_subject().preprocessing
    with pytest.raises(ValueError, match="has 10 classes, got 3 names"):
        Subject(dense, preprocessing, class_labels(3, None))
    with pytest.raises(ValueError, match="nothing to look at"):
        Subject(None, preprocessing, ())


class Slow:
    """A function that takes its time and counts how often it was begun."""

    def __init__(self) -> None:
        self.begun = 0
        self.started = threading.Event()

    def __call__(self, progress: Callable[[float], None]) -> str:
        self.begun += 1
        self.started.set()
        for _ in range(20):
            time.sleep(0.01)
            progress(0.5)
        return "done"


def test_a_timing_gives_way_to_an_answer_and_starts_again() -> None:
    turns, slow = Turns(), Slow()
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(turns.timed(slow)))
    thread.start()
    assert slow.started.wait(5)
    start = time.perf_counter()
    with turns.answering():
        waited = time.perf_counter() - start
        assert not results
    thread.join(10)
    assert results == ["done"]
    assert slow.begun >= 2
    assert waited < 0.15  # not the 0.2 s of the whole timing


def test_nothing_is_timed_while_somebody_is_answered() -> None:
    turns, slow = Turns(), Slow()
    with turns.answering():
        thread = threading.Thread(target=lambda: turns.timed(slow))
        thread.start()
        time.sleep(0.05)
        assert slow.begun == 0
    thread.join(10)
    assert slow.begun == 1


def test_long_work_lets_others_in_between() -> None:
    turns = Turns()
    seen: list[str] = []

    def long_work() -> None:
        for number in turns.shared(range(5)):
            seen.append(str(number))
            time.sleep(0.03)

    thread = threading.Thread(target=long_work)
    thread.start()
    time.sleep(0.01)
    with turns.answering():
        seen.append("answer")
    thread.join(10)
    assert "answer" in seen[:-1]
    assert [entry for entry in seen if entry != "answer"] == list("01234")


def test_two_people_at_once_get_their_own_answers(looking: Looking, subject: Subject) -> None:
    uploads = Uploads(subject.preprocessing)
    pictures = [uploads.prepare(example.picture) for example in examples(2)]
    choices = [Choice("cpvit", 0.5), Choice("tome", 0.4)]
    alone = [looking.look(picture, [choice])[0] for picture, choice in zip(pictures, choices, strict=True)]
    found: dict[int, list[Look]] = {0: [], 1: []}

    def person(number: int) -> None:
        for _ in range(4):
            found[number] += looking.look(pictures[number], [choices[number]])

    threads = [threading.Thread(target=person, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number in (0, 1):
        assert len(found[number]) == 4
        for look in found[number]:
            assert torch.equal(look.pruned.log_probs, alone[number].pruned.log_probs)
            for view, expected in zip(look.pruned.blocks, alone[number].pruned.blocks, strict=True):
                assert torch.equal(view.positions, expected.positions)
