"""A pruned model in a folder: its weights, its plan, and how to build it. No pickle.

model.safetensors   the weights as they are now, without those of cut heads
plan.json           the active plan, as ``Plan.load`` reads it
model.json          the model spec, where one can be inferred, and the settings of the pruning
README.md           the model card
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cpvit.adapters import Host, open_host
from cpvit.files import os_errors, replacing
from cpvit.plans.check import check_plan
from cpvit.plans.json_text import parse_json
from cpvit.plans.plan import Plan
from cpvit.pruning.install import installed
from cpvit.pruning.opening import open_pruned, unprune_host
from cpvit.pruning.prune import prune_host
from cpvit.weights.card import CARD, MARK, model_card
from cpvit.weights.hub import download, is_on_hub, upload
from cpvit.weights.spec import ModelSpec, ModelSpecError, build, infer_model_spec

WEIGHTS, PLAN, MODEL = "model.safetensors", "plan.json", "model.json"
FILES = (WEIGHTS, PLAN, MODEL)
"""What a folder needs; the card is for people."""
VERSION = 1
"""Of the folder's layout."""
KEYS = {"spec": "recipe", "no_spec": "no_recipe"}
"""Fields of :class:`SavedModel` whose key in ``model.json`` is another one; version 1 of the layout keeps them."""


@dataclass(frozen=True)
class SavedModel:
    """What ``model.json`` says."""

    spec: ModelSpec | None
    """How to build the model; None if it could not be inferred."""
    no_spec: str = ""
    """Why not."""
    dtype: str = "float32"
    """Of the model's first parameter, and of buffers that are not saved (rotary tables)."""
    dense_features: bool = False
    shared: dict[str, str] = field(default_factory=dict)
    """Tensors that share memory are written once: the name left out -> the name in the file."""
    version: int = VERSION


def save_pruned(
    model: nn.Module,
    folder: str | Path,
    *,
    arguments: Mapping[str, object] | None = None,
    results: Mapping[str, float] | None = None,
    push_to_hub: str | None = None,
) -> Path:
    """Save a pruned model so that :func:`load_pruned` gives it back, bit for bit, with a model card.

    A folder that holds a saved model already is overwritten, once everything is written; a README.md that cpvit did
    not write stays.

    Args:
        model: A pruned model.
        folder: Where to; made if it is not there.
        arguments: Keyword arguments the model was created with, for the few that cannot be inferred from it
            (``qk_norm=True`` ...). Without them :func:`load_pruned` needs a model to load into. Of a model of
            open_clip that was not created by cpvit: ``architecture="ViT-B-32"``.
        results: Measured figures for the card, by their names: ``{"top-1 %": 81.5}``.
        push_to_hub: Also upload the folder to this repository ("user/name") of the Hugging Face hub, which is made
            if it is not there. Log in first (``hf auth login``).

    Returns:
        The folder.

    Raises:
        ValueError: The model is not pruned, or the path is a file, or push_to_hub is no repository's name.
        OSError: It cannot be written (disk full ...); a model that was saved there before stays.

    Example:
        >>> save_pruned(model, "deit_small_60")  # doctest: +SKIP
    """
    host, container = open_pruned(model)
    assert container.plan is not None, "prune_ leaves a plan with the cascade"
    target = Path(folder).expanduser()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; give the name of a folder to save the model in")
    tensors, shared = _without_copies(model.state_dict())
    saved = _describe(host, container.plan, arguments, container.cascade.dense_features, shared)
    card = model_card(host, container.plan, results, push_to_hub or "")
    target.mkdir(parents=True, exist_ok=True)
    files = (*FILES, CARD) if _is_ours(target / CARD) else FILES
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as name:
        _write(Path(name), tensors, container.plan, saved)
        (Path(name) / CARD).write_text(card, encoding="utf-8")
        for file in files:
            (Path(name) / file).replace(target / file)
    if push_to_hub is not None:
        upload(target, push_to_hub, (*FILES, CARD), f"{container.plan.model}: {container.plan.dial}")
    return target


def _is_ours(card: Path) -> bool:
    """Whether a card may be written: there is none, or cpvit wrote it."""
    return not card.exists() or MARK in card.read_text(encoding="utf-8", errors="replace")


def load_pruned(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The pruned model that :func:`save_pruned` wrote, on the CPU, in eval mode.

    Of heads that were cut the weights are not in the file: such a model cannot be unpruned.

    Args:
        folder: What :func:`save_pruned` was given; ``hf-hub:user/name`` for a repository of the Hugging Face hub
            (``hf-hub:user/name@revision``).
        model: An untouched model of the same architecture, changed in place; needed only where no model spec
            could be inferred when it was saved.

    Raises:
        FileNotFoundError: The folder, or a file in it, is missing.
        ValueError: The files are damaged, of a later version, not of one save, or do not fit the model.

    Example:
        >>> model = load_pruned("deit_small_60")  # doctest: +SKIP
    """
    source = download(str(folder), FILES) if is_on_hub(folder) else Path(folder).expanduser()
    _check_there(source)
    saved = _read_saved(source / MODEL)
    plan = Plan.load(source / PLAN)
    tensors = _read_weights(source / WEIGHTS, source / PLAN)
    tensors |= {name: tensors[kept] for name, kept in saved.shared.items()}
    network = _build(saved, source) if model is None else model
    # The corrected projections are in the file: here heads are cut only to make room for them.
    host = open_host(network)
    # Before anything is run: a damaged patch size would make that a run on a hundred times the tokens.
    check_plan(plan, host)
    try:
        prune_host(host, plan.uncorrected, dense_features=saved.dense_features)
    except (AssertionError, LookupError, AttributeError) as error:
        # Sizes that do not fit, as the library that builds the model meets them.
        raise ValueError(
            f"{source / MODEL} describes a model that does not run ({error}); save the model again"
        ) from error
    try:
        _check_fit(network, tensors, source)
    except ValueError:
        unprune_host(host)
        raise
    _fill(host, tensors, saved, plan)
    return network


def _without_copies(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write, each once; and name -> name written for those that share their memory."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in state.items():
        memory = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        kept = first.setdefault(memory, name) if tensor.numel() else name
        if kept != name:
            shared[name] = kept
        else:
            # safetensors refuses tensors that overlap in part; a view would keep the whole storage.
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, shared


def _describe(
    host: Host,
    plan: Plan,
    arguments: Mapping[str, object] | None,
    dense_features: bool,
    shared: dict[str, str],
) -> SavedModel:
    dtype = str(host.dtype).removeprefix("torch.")
    try:
        spec, reason = infer_model_spec(host, plan, arguments), ""
    except ModelSpecError as error:
        spec, reason = None, str(error)
    return SavedModel(spec, reason, dtype, dense_features, shared)


def _write(folder: Path, tensors: dict[str, Tensor], plan: Plan, saved: SavedModel) -> None:
    plan.save(folder / PLAN)
    with replacing(folder / WEIGHTS) as temporary, os_errors():
        save_file(tensors, temporary, metadata={"format": "pt", "plan": _digest(folder / PLAN)})
    values = {KEYS.get(name, name): value for name, value in dataclasses.asdict(saved).items()}
    (folder / MODEL).write_text(json.dumps(values, indent=2) + "\n")


def _digest(file: Path) -> str:
    """Identifies the plan that the weights were saved with; line ends and indentation do not count."""
    return hashlib.sha256(json.dumps(json.loads(file.read_text())).encode()).hexdigest()


def _check_there(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the one that save_pruned wrote")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {' and no '.join(missing)}; give a folder that save_pruned wrote"
        )


def _read_saved(file: Path) -> SavedModel:
    try:
        values = parse_json(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); save the model again") from None
    if not isinstance(values, dict) or not isinstance(values.get("version"), int):
        raise ValueError(f"{file} does not say how it was saved (no version); save the model again")
    if values["version"] > VERSION:
        raise ValueError(
            f"{file} has version {values['version']}, newer than this cpvit reads ({VERSION}); upgrade cpvit"
        )
    names = {key: name for name, key in KEYS.items()}
    try:
        spec = None if values["recipe"] is None else ModelSpec(**values["recipe"])
        fields: dict[str, Any] = {names.get(str(key), str(key)): value for key, value in values.items()}
        found = SavedModel(**{**fields, "spec": spec})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is not what save_pruned wrote ({error}); save the model again") from None
    dtype = getattr(torch, str(found.dtype), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"{file} is not what save_pruned wrote (its dtype is {found.dtype!r}, expected float32, bfloat16 ...); "
            "save the model again"
        )
    return found


def _read_weights(file: Path, plan: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 -- not a dict
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}); save the model again") from None
    if metadata.get("plan") != _digest(plan):
        raise ValueError(
            f"{file} was not saved with the {PLAN} beside it (edited, or of another save); save the model "
            "again, or load it and call prune_ for another plan"
        )
    return tensors


def _build(saved: SavedModel, folder: Path) -> nn.Module:
    if saved.spec is None:
        raise ValueError(
            f"{folder} does not say how to build its model ({saved.no_spec}); build it, untouched, and give "
            "it: load_pruned(folder, model=...)"
        )
    try:
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten
            return build(saved.spec)
    except ImportError:
        raise
    except Exception as error:  # each library has errors of its own for arguments that are not its
        raise ValueError(
            f"{folder / MODEL} describes a model that cannot be built ({error}); save the model again, or build it, "
            "untouched, and give it: load_pruned(folder, model=...)"
        ) from error


def _check_fit(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raise ValueError unless names and shapes of all tensors agree."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [name for name in (*own, *given) if own.get(name) != given.get(name)]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"the weights in {folder} do not fit this {type(model).__name__}: {name} is "
            f"{given.get(name, 'missing')} in the file and {own.get(name, 'missing')} in the model "
            f"({len(set(wrong))} differ); give a model created as the saved one was"
        )


def _fill(host: Host, tensors: Mapping[str, Tensor], saved: SavedModel, plan: Plan) -> None:
    """Write the weights, in their own dtypes, into a pruned model."""
    model = host.model
    model.to(getattr(torch, saved.dtype))
    state: Any = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        state[name].data = state[name].data.to(tensor.dtype)
    model.load_state_dict(dict(tensors), strict=True)
    container = installed(host)
    assert container is not None, "prune_host has just installed it"
    container.plan = plan
    if container.cut_heads:
        # The heads cut here were those of the new model; those of the saved one are lost.
        container.cut_heads, container.heads_lost = (), True
