"""Models as a bulk run sees them: pixels in, columns out, and a description that goes into every file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpvit.adapters import Host
from cpvit.bulk.columns import Columns
from cpvit.bulk.features import FeatureReader, Kind, Tokens
from cpvit.data import Preprocessing
from cpvit.data.pixels import Normalizer
from cpvit.export.runtimes import ExportedModel
from cpvit.plans.escalation import Escalation
from cpvit.plans.plan import Plan
from cpvit.pruning.escalation import EscalatingModel, escalate_host
from cpvit.pruning.opening import open_as_it_is

Forward = Callable[[Tensor], Any]


@dataclass(frozen=True)
class ModelDescription:
    """What ran. Goes into the metadata of every part, and into the fingerprint of the run."""

    model: str
    weights_sha256: str
    """Of the state_dict before pruning; of a file of ``cpvit export`` that of the model it was made from."""
    plan: dict[str, Any] | None
    """The plan, or the two of an escalation; None for the dense model."""
    preprocessing: dict[str, Any]
    dtype: str
    """Of the arithmetic."""
    runtime: str = "torch"
    features: str | None = None
    """What embeddings are made from; None for predictions."""


@dataclass(frozen=True)
class BulkModel:
    """A model, ready to run on the pixels of a batch."""

    forward: Forward
    """uint8 pixels [b 3 H W] -> what ``columns`` takes."""
    columns: Columns
    width: int
    """Classes or channels of the output."""
    preprocessing: Preprocessing
    description: ModelDescription
    device: torch.device


def torch_model(
    host: Host,
    preprocessing: Preprocessing,
    columns: Columns,
    *,
    features: Kind | None,
    weights_sha256: str,
    escalation: Escalation | None = None,
) -> BulkModel:
    """A model of torch, dense or pruned as it is, or escalating.

    Args:
        host: The model; with ``escalation`` the untouched one.
        preprocessing: Of its images.
        columns: What to make of its output.
        features: What to embed by; None takes the logits.
        weights_sha256: Of the untouched weights.
        escalation: Two plans.

    Raises:
        ValueError: The model has no classifier, or not the features that were asked for.
    """
    if features is None and not host.num_classes:
        raise ValueError(f"{host.name} has no classifier, so it predicts no classes; use cpvit embed")
    normalize = Normalizer(preprocessing, host.device, host.dtype)
    network = _Escalating(host, escalation, features) if escalation else _Single(host, features)

    @torch.inference_mode()
    def forward(pixels: Tensor) -> Any:
        return network(normalize(pixels))

    shape = (1, 3, *preprocessing.image_size)
    probe = forward(torch.zeros(shape, dtype=torch.uint8))
    description = ModelDescription(
        model=host.name,
        weights_sha256=weights_sha256,
        plan=_plan_values(host, escalation),
        preprocessing=preprocessing.to_dict(),
        dtype=str(host.dtype).removeprefix("torch."),
        features=features,
    )
    width = probe[0].values.shape[-1] if isinstance(probe, list) else probe.shape[-1]
    return BulkModel(forward, columns, width, preprocessing, description, host.device)


def exported_model(exported: ExportedModel, columns: Columns, *, features: Kind | None) -> BulkModel:
    """A file of ``cpvit export``; its outputs are its features if those are asked for.

    Raises:
        ValueError: The file does not say how images are prepared, or gives other features than those asked for.
    """
    described = exported.description
    if described.preprocessing is None:
        raise ValueError(
            f"{exported.path} does not say how images are prepared; export it anew with --mean and --std"
        )
    if features not in (None, "pooled"):
        raise ValueError(f"an exported file gives its output alone; use --features pooled, got {features}")
    if features is not None and described.classes is not None:
        raise ValueError(
            f"{exported.path} classifies ({len(described.classes)} named classes) and gives no features; export the "
            "model without its head (--num-classes 0)"
        )
    normalize = Normalizer(described.preprocessing, torch.device("cpu"), torch.float32)

    def forward(pixels: Tensor) -> Tensor:
        if described.normalized_inside:
            return _in_pieces(pixels.permute(0, 2, 3, 1).contiguous(), exported)
        return _in_pieces(normalize(pixels), exported)

    description = ModelDescription(
        model=described.model,
        weights_sha256=described.weights_sha256,
        plan=None if described.plan is None else json.loads(described.plan.to_json()),
        preprocessing=described.preprocessing.to_dict(),
        dtype=described.precision,
        runtime=described.format,
        features=features,
    )
    return BulkModel(
        forward, columns, described.num_outputs, described.preprocessing, description, torch.device("cpu")
    )


def _in_pieces(inputs: Tensor, exported: ExportedModel) -> Tensor:
    """A file for a fixed number of images gets as many, the last ones filled up."""
    size = exported.description.batch_size or len(inputs)
    outputs = []
    for piece in inputs.split(size):
        filled = piece if len(piece) == size else piece.repeat(-(-size // len(piece)), 1, 1, 1)[:size]
        outputs.append(torch.from_numpy(exported.run(filled.numpy()))[: len(piece)])
    return torch.cat(outputs)


class _Single:
    """One forward a batch."""

    def __init__(self, host: Host, features: Kind | None) -> None:
        self._host = host
        self._reader = None if features is None else FeatureReader(host, features)

    def __call__(self, images: Tensor) -> Tensor | list[Tokens]:
        output = self._host.output(self._host.model(images))
        if self._reader is None:
            return output
        found = self._reader.take()
        return [found] if isinstance(found, Tokens) else found


class _RecordingModel(EscalatingModel):
    """Keeps which images of the latest batch ran again."""

    unsure: Tensor

    def _unsure(self, logits: Tensor) -> Tensor:
        self.unsure = super()._unsure(logits)
        return self.unsure


class _Escalating:
    """Two stages: an image has the features of the stage that answered for it."""

    def __init__(self, host: Host, escalation: Escalation, features: Kind | None) -> None:
        model = escalate_host(host, escalation, kind=_RecordingModel)
        assert isinstance(model, _RecordingModel)
        self._model = model
        light, second = open_as_it_is(model.light_model)[0], open_as_it_is(model.second_model)[0]
        self._readers = (
            None if features is None else (FeatureReader(light, features), FeatureReader(second, features))
        )

    def __call__(self, images: Tensor) -> Tensor | list[Tokens]:
        logits = self._model(images)
        if self._readers is None:
            return logits
        first = self._readers[0].take()
        unsure = self._model.unsure
        again = self._readers[1].take() if len(unsure) else None
        if isinstance(first, Tensor):
            assert again is None or isinstance(again, Tensor)
            return first if again is None else first.index_copy(0, unsure, again.to(first.dtype))
        assert again is None or isinstance(again, Tokens)
        return _in_order(first, again, unsure)


def _in_order(first: Tokens, again: Tokens | None, unsure: Tensor) -> list[Tokens]:
    """The tokens of each image, those of the second stage where there was one."""
    found = [_one(first, number) for number in range(len(first.values))]
    for place, number in enumerate(unsure.tolist()):
        assert again is not None
        found[number] = _one(again, place)
    return found


def _one(tokens: Tokens, number: int) -> Tokens:
    of = slice(number, number + 1)
    return Tokens(tokens.values[of], tokens.positions[of], tokens.sizes[of])


def _plan_values(host: Host, escalation: Escalation | None) -> dict[str, Any] | None:
    if escalation is not None:
        return dict(json.loads(escalation.to_json()))
    container = open_as_it_is(host.model)[1]
    plan: Plan | None = None if container is None else container.plan
    return None if plan is None else dict(json.loads(plan.to_json()))
