"""Other projects' own code beside ours: the same weights and images, in one process.

    git clone https://github.com/facebookresearch/ToMe
    git clone https://github.com/hchautran/PiToMe
    git clone https://github.com/OpenGVLab/DiffRate
    python studies/rivals.py --checkpoint deit_tiny_patch16_224.safetensors --data imagenet-val-650.tar \\
        --tome ToMe --pitome PiToMe --diffrate DiffRate

ToMe and DiffRate are run by their own patches of timm, PiToMe and ToFu by those of PiToMe's repository, all with the
settings that they publish. Nothing of theirs is copied or changed; what their code expects of an older timm is put back
from outside (:class:`OldTimm`, :func:`module_of`). Each is followed by this library's version with the same number of
tokens after each block, and by ``cpvit-merge`` at the same MACs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import importlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from cpvit import PruneConfig, prune_
from cpvit.data import Preprocessing, find_samples, label_map, make_loader
from cpvit.files import write_atomically
from cpvit.machine.environment import describe_environment
from cpvit.measure.metrics import Predictions, agreement, kl_divergence
from cpvit.measure.outcomes import outcomes, right
from cpvit.weights.create import create_model
from cpvit.weights.loading import load_checkpoint


@dataclass(frozen=True)
class Rival:
    """One project's code for one method."""

    title: str
    option: str
    """Which folder it lies in: the option of the command line."""
    module: str
    """Has ``apply_patch``."""
    dial: str
    """Attribute of the patched model that says how much is merged; GFLOPs for the rates that DiffRate ships."""
    settings: tuple[float, ...]
    """Published by the project."""
    counts_as: str
    """This library's method by which its MACs are counted."""
    off: float
    """Setting that changes nothing; what the model then says must be what the dense model says."""
    ours: bool = True
    """Whether that is the same method."""


RIVALS = (
    Rival("ToMe", "tome", "tome.patch.timm", "r", (8, 13, 16), "tome", 0),
    Rival("PiToMe", "pitome", "algo.pitome.patch.deit", "ratio", (0.95, 0.925, 0.9), "pitome", 1),
    Rival(
        "ToFu (PiToMe's)",
        "pitome",
        "algo.tofu.patch.deit",
        "ratio",
        (0.95, 0.925, 0.9),
        "tome",
        1,
        ours=False,
    ),
    Rival(
        "DiffRate", "diffrate", "DiffRate.patch.deit", "GFLOPs", (0.9, 0.8, 0.7, 0.6), "topk", 0, ours=False
    ),
)
RATES = "compression_rate.json"
MODELS_OF_RATES = {"deit_tiny_patch16_224": "ViT-T-DeiT", "deit_small_patch16_224": "ViT-S-DeiT"}
BATCH = 50


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tome", type=Path, help="a checkout of facebookresearch/ToMe")
    parser.add_argument("--pitome", type=Path, help="a checkout of hchautran/PiToMe")
    parser.add_argument("--diffrate", type=Path, help="a checkout of OpenGVLab/DiffRate")
    parser.add_argument("--exact", type=int, default=1000, help="images that are compared in float64 too")
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    asked = [rival for rival in RIVALS if getattr(arguments, rival.option) is not None]
    if not asked:
        raise SystemExit("name a folder of another project's code: --tome FOLDER, --pitome FOLDER")
    patches = [(rival, patch_of(rival, getattr(arguments, rival.option))) for rival in asked]
    comparison = Comparison(arguments)
    for rival, patch in patches:
        comparison.check_off(rival, patch)
    rows = [
        row
        for rival, patch in patches
        for setting in rival.settings
        for row in comparison.rows(rival, patch, setting)
    ]
    if arguments.json is not None:
        found = comparison.record(rows, code_of(arguments, asked))
        write_atomically(arguments.json, json.dumps(found, indent=1) + "\n")


class Comparison:
    """The dense model, the images, and what the dense model says about them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.model = create_model(arguments.model).eval()
        load_checkpoint(self.model, arguments.checkpoint)
        source = find_samples(arguments.data)
        labels = label_map(source, self.model.num_classes)
        batches = list(
            make_loader(source, Preprocessing.from_model(self.model), labels=labels, batch_size=BATCH)
        )
        self.images = torch.cat([batch.images for batch in batches])
        self.labels = torch.cat([batch.labels for batch in batches])
        self.dense = self.predictions(logits_of(self.model, self.images))
        print(f"{len(self.images)} images, dense top-1 {self.dense.top(1):.2f}", flush=True)

    def rows(self, rival: Rival, patch: Callable[[nn.Module], nn.Module], setting: float) -> Iterator[Any]:
        """Theirs; ours with as many tokens after each block; ``cpvit-merge`` at the same MACs."""

        def theirs_of(model: nn.Module) -> nn.Module:
            return self.set(rival, setting, patch(model))

        theirs = theirs_of(copy.deepcopy(self.model))
        with counted(theirs) as tokens:
            found = logits_of(theirs, self.images)
        counts = tuple(count - 1 for count in tokens)
        same = PruneConfig(method=rival.counts_as, keep_per_block=counts)
        ours, ratio = self.pruned(same)
        shared = {
            "method": rival.title,
            "setting": f"{rival.dial} = {setting:g}",
            "patches_per_block": counts,
        }
        yield self.row({**shared, "whose": "theirs", "macs_ratio": ratio}, found)
        if rival.ours:
            own = logits_of(ours, self.images)
            between = differences(found, own)
            exact = self.exact(theirs_of, same)
            yield self.row({**shared, "whose": "ours", "macs_ratio": ratio, **between, **exact}, own)
        best, ratio = self.pruned(PruneConfig(method="cpvit-merge", macs=round(ratio, 4)))
        yield self.row({**shared, "whose": "cpvit-merge", "macs_ratio": ratio}, logits_of(best, self.images))

    def check_off(self, rival: Rival, patch: Callable[[nn.Module], nn.Module]) -> None:
        """Their code with nothing to merge against the dense model: what was put back from outside must fit.

        Raises:
            SystemExit: It does not say what the dense model says.
        """
        images = self.images[:8]
        model = self.set(rival, rival.off, patch(copy.deepcopy(self.model)))
        difference = (logits_of(model, images) - logits_of(self.model, images)).abs().max().item()
        print(
            f"{rival.title} with nothing merged: logits within {difference:.1g} of the dense model's",
            flush=True,
        )
        if difference > 1e-3:
            raise SystemExit(
                f"{rival.title} with nothing merged is {difference:.2g} off the dense model's logits"
            )

    def set(self, rival: Rival, setting: float, patched: Any) -> nn.Module:
        """As their own scripts set it."""
        if rival.option == "diffrate":
            patched.set_kept_num(*self.rates(setting, len(patched.blocks)))
        else:
            setattr(patched, rival.dial, int(setting) if rival.dial == "r" else setting)
        return patched

    def rates(self, gflops: float, depth: int) -> tuple[list[int], list[int]]:
        """Tokens that DiffRate prunes and merges down to in each block, as its repository ships them; 0 for all."""
        if not gflops:
            return [10**6] * depth, [10**6] * depth
        shipped = json.loads((self.arguments.diffrate / RATES).read_text())
        found = shipped[MODELS_OF_RATES[self.arguments.model]][str(gflops)]
        return json.loads(found["prune_kept_num"]), json.loads(found["merge_kept_num"])

    def pruned(self, config: PruneConfig) -> tuple[nn.Module, float]:
        model = copy.deepcopy(self.model)
        return model, prune_(model, config).macs_ratio

    def exact(self, theirs_of: Callable[[nn.Module], nn.Module], config: PruneConfig) -> dict[str, float]:
        """Theirs and ours in float64, where hardly a tie is left to rounding."""
        images = self.images[: self.arguments.exact]
        ours = copy.deepcopy(self.model).double()
        prune_(ours, config)
        theirs = theirs_of(copy.deepcopy(self.model).double())
        return {"float64": (logits_of(theirs, images) - logits_of(ours, images)).abs().max().item()}

    def predictions(self, logits: Tensor) -> Predictions:
        return Predictions(logits.log_softmax(dim=-1), self.labels)

    def row(self, values: dict[str, Any], logits: Tensor) -> dict[str, Any]:
        found = self.predictions(logits)
        row = {
            **values,
            "top1": found.top(1),
            "top5": found.top(5),
            "agreement": agreement(self.dense, found),
            "kl": kl_divergence(self.dense, found),
            "outcomes": dataclasses.asdict(outcomes(self.dense, found)),
        }
        print({name: value for name, value in row.items() if name != "outcomes"}, flush=True)
        return row

    def record(self, rows: list[dict[str, Any]], code: dict[str, str]) -> dict[str, Any]:
        here = describe_environment(torch.device("cpu"), torch.float32, seed=0)
        return {
            "model": self.arguments.model,
            "images": len(self.images),
            "exact_images": min(self.arguments.exact, len(self.images)),
            "dense_top1": self.dense.top(1),
            "dense_right": right(self.dense),
            "points": rows,
            "code_sha256": code,
            "environment": dataclasses.asdict(here),
        }


@torch.inference_mode()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """[B classes], in the dtype of the model; some of their models return the FLOPs beside."""
    dtype = next(model.parameters()).dtype
    found = []
    for part in images.split(BATCH):
        output = model(part.to(dtype))
        found.append(output[0] if isinstance(output, tuple) else output)
    return torch.cat(found)


@contextlib.contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Tokens that left each block in the last forward, class token included."""
    tokens: list[int] = []
    blocks = [module for module in model.modules() if isinstance(module, Block)]

    def note(block: nn.Module, _: Any, output: Tensor) -> None:
        if block is blocks[0]:
            tokens.clear()
        tokens.append(output.shape[1])

    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        yield tokens
    finally:
        for handle in handles:
            handle.remove()


def differences(theirs: Tensor, ours: Tensor) -> dict[str, float]:
    """Of the logits of every image: the largest, the median over the images, and how many are above 1e-3."""
    largest = (theirs - ours).abs().amax(dim=1)
    return {
        "difference": largest.max().item(),
        "difference_median": largest.median().item(),
        "images_apart": int((largest > 1e-3).sum()),
    }


class OldTimm(VisionTransformer):  # type: ignore[misc]
    """Today's model with what the patches of PiToMe's repository use of timm 0.4.12."""

    dist_token = None

    def pre_logits(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


def patch_of(rival: Rival, folder: Path) -> Callable[[nn.Module], nn.Module]:
    """Puts their code into a model of timm, which is changed and returned.

    Raises:
        SystemExit: The folder does not hold the project.
    """
    if not code_file(rival, folder).is_file():
        raise SystemExit(
            f"--{rival.option} {folder}: there is no {code_file(rival, folder)}; clone the project (see --help)"
        )
    module = module_of(folder, rival.module)

    def patch(model: Any) -> nn.Module:
        if rival.option == "pitome":
            model.__class__ = OldTimm
        for block in model.blocks:
            block.drop_path = nn.Identity()  # one for both branches, as it was
        with contextlib.redirect_stdout(io.StringIO()):
            module.apply_patch(model)
        return model

    return patch


def module_of(folder: Path, name: str) -> ModuleType:
    """A module of their folder, without what the packages around it import (BLIP, BERT, old transformers)."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        package = ModuleType(".".join(parts[:depth]))
        package.__path__ = [str(folder.joinpath(*parts[:depth]))]
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(name)


def code_file(rival: Rival, folder: Path) -> Path:
    return folder.joinpath(*rival.module.split(".")).with_suffix(".py")


def code_of(arguments: argparse.Namespace, rivals: Sequence[Rival]) -> dict[str, str]:
    """SHA-256 of the files that were run, so that it can be told which version it was."""
    found = {}
    for rival in rivals:
        folder = getattr(arguments, rival.option)
        package = folder.joinpath(*rival.module.split(".")[:-2])
        files = (package / "merge.py", package / "patch" / "timm.py", code_file(rival, folder))
        for file in dict.fromkeys(file for file in files if file.is_file()):
            name = f"{rival.option}/{file.relative_to(folder)}"
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


if __name__ == "__main__":
    main()
