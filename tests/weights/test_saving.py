"""A pruned model on disk: the same model back, a file as small as the model, and an honest word if that fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import random_images, randomize_
from conftest import tiny_vit as odd_tiny_vit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionViT

from cpvit import Plan, PruneConfig, load_pruned, plan_of, prune_, save_pruned, unprune_
from cpvit.adapters import open_host
from cpvit.data import Preprocessing
from cpvit.weights.card import CARD
from cpvit.weights.saving import FILES, VERSION
from cpvit.weights.spec import ModelSpec, build, first_difference

PATCHES_ONLY = PruneConfig(keep_per_block=(30, 20, 9))
WITH_HEADS = PruneConfig(keep_per_block=(30, 20, 9), head_keep_rate=0.4)


def tiny_vit(variant: str = "class", **overrides: Any) -> Any:
    """With the MLP that timm gives it: how wide another is cannot be read off."""
    return odd_tiny_vit(variant, **{"mlp_ratio": 4.0, **overrides})


@pytest.fixture
def model() -> Any:
    return tiny_vit()


def torchvision_vit() -> nn.Module:
    return TorchvisionViT(image_size=32, patch_size=8, num_layers=3, num_heads=3, hidden_dim=24, mlp_dim=40)


def transformers_vit(name: str = "ViTForImageClassification") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40, image_size=32
    )
    config.patch_size = 8
    return getattr(transformers, name)(config)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "timm vit": tiny_vit,
    "timm distilled": lambda: tiny_vit("distilled"),
    "timm droppath": lambda: tiny_vit(drop_path_rate=0.1),
    "timm eva": lambda: timm.create_model(
        "eva02_tiny_patch14_224", img_size=(28, 56), depth=3, embed_dim=24, num_heads=3, num_classes=3
    ),
    "timm beit": lambda: timm.create_model(
        "beit_base_patch16_224", img_size=64, depth=3, embed_dim=24, num_heads=3, num_classes=3
    ),
    "torchvision": torchvision_vit,
    "transformers": transformers_vit,
}


def images_for(model: nn.Module) -> Tensor:
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, *open_host(model).image_shape, generator=generator).to(parameter.dtype)


@torch.no_grad()
def output(model: nn.Module, images: Tensor | None = None) -> Tensor:
    return open_host(model).output(model(images_for(model) if images is None else images))


@pytest.fixture(params=BUILDERS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    model = BUILDERS[request.param]()
    randomize_(model, 0)
    return model.eval()


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    """A folder with a model whose patches are pruned."""
    prune_(model, PATCHES_ONLY)
    return save_pruned(model, tmp_path / "saved")


def prune_half(model: nn.Module, *, heads: bool) -> Plan:
    config = PruneConfig(keep_rate=0.5, head_keep_rate=0.4 if heads else 1.0, head_correction=heads)
    return prune_(model, config, calibration=images_for(model))


@pytest.mark.parametrize("heads", [False, True])
def test_what_is_loaded_is_what_was_saved_bit_for_bit(
    network: nn.Module, heads: bool, tmp_path: Path
) -> None:
    plan = prune_half(network, heads=heads)
    expected = output(network)
    again = load_pruned(save_pruned(network, tmp_path / "a" / "folder"))
    assert type(again) is type(network)
    assert not again.training
    assert plan_of(again) == plan
    assert first_difference(again, network) is None
    assert torch.equal(output(again), expected)


def test_the_folder_holds_weights_a_plan_and_a_builder_and_no_path(model: Any, tmp_path: Path) -> None:
    plan = prune_(model, PATCHES_ONLY)
    folder = save_pruned(model, str(tmp_path / "saved"))
    assert folder == tmp_path / "saved"
    assert sorted(path.name for path in folder.iterdir()) == sorted((*FILES, CARD))
    assert Plan.load(folder / "plan.json") == plan
    described = json.loads((folder / "model.json").read_text())
    assert described["version"] == VERSION
    assert described["recipe"]["name"] == "vit_tiny_patch16_224"
    assert described["recipe"]["arguments"]["img_size"] == [40, 56]
    assert str(tmp_path) not in (folder / "model.json").read_text()


@pytest.mark.parametrize("heads", [False, True])
def test_the_weights_file_is_as_small_as_the_parameters(model: Any, heads: bool, tmp_path: Path) -> None:
    dense = sum(parameter.nbytes for parameter in model.parameters())
    prune_half(model, heads=heads)
    file = save_pruned(model, tmp_path) / "model.safetensors"
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert (held < 0.9 * dense) is heads
    assert held <= file.stat().st_size <= held + 8192
    assert load_file(file)["blocks.2.attn.qkv.weight"].shape == ((36, 30) if heads else (90, 30))


def test_another_process_loads_it(model: Any, tmp_path: Path) -> None:
    prune_(model, WITH_HEADS, calibration=random_images())
    folder = save_pruned(model.float(), tmp_path / "saved")
    code = (
        "import sys, cpvit, torch\n"
        f"model = cpvit.load_pruned({str(folder)!r})\n"
        "images = torch.linspace(-1, 1, 3 * 40 * 56).view(1, 3, 40, 56)\n"
        "with torch.no_grad(): print(model(images).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = output(model, torch.linspace(-1, 1, 3 * 40 * 56).view(1, 3, 40, 56))
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected)


def test_a_model_of_which_only_patches_were_pruned_can_be_unpruned(model: Any, tmp_path: Path) -> None:
    expected = output(model)
    prune_(model, PATCHES_ONLY)
    again = load_pruned(save_pruned(model, tmp_path))
    unprune_(again)
    assert plan_of(again) is None
    assert torch.equal(output(again), expected)


class TestLostHeads:
    """Heads that were cut are not in the file: there is no way back, and that is said."""

    @pytest.fixture
    def loaded(self, model: Any, tmp_path: Path) -> nn.Module:
        prune_(model, WITH_HEADS, calibration=random_images())
        return load_pruned(save_pruned(model, tmp_path))

    @pytest.mark.parametrize("undo", [unprune_, prune_])
    def test_unpruning_is_refused_and_the_model_stays_as_it_is(
        self, loaded: nn.Module, undo: Callable[[nn.Module], object]
    ) -> None:
        expected = output(loaded)
        message = (
            "vit_tiny_patch16_224 was saved with heads cut, so their weights are lost and it cannot be un"
        )
        with pytest.raises(ValueError, match=message):
            undo(loaded)
        assert torch.equal(output(loaded), expected)

    def test_it_can_be_saved_again(self, loaded: nn.Module, tmp_path: Path) -> None:
        again = load_pruned(save_pruned(loaded, tmp_path / "again"))
        assert torch.equal(output(again), output(loaded))

    def test_the_live_model_that_was_saved_can_still_be_unpruned(self, model: Any, tmp_path: Path) -> None:
        expected = output(model)
        prune_(model, WITH_HEADS, calibration=random_images())
        save_pruned(model, tmp_path)
        unprune_(model)
        assert torch.equal(output(model), expected)


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Of everything the model holds, in the file or not."""
    return {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also of the rotary table, which is not in the file."""
    model = BUILDERS["timm eva"]().to(dtype).eval()
    prune_half(model, heads=True)
    again = load_pruned(save_pruned(model, tmp_path))
    assert dtypes(again) == dtypes(model)
    assert torch.equal(output(again), output(model))


def test_weights_of_mixed_dtypes_come_back(model: Any, tmp_path: Path) -> None:
    prune_(model.float(), PATCHES_ONLY)
    model.blocks[1].mlp.half()
    again: Any = load_pruned(save_pruned(model, tmp_path))
    assert again.blocks[1].mlp.fc1.weight.dtype == torch.float16
    assert again.blocks[0].mlp.fc1.weight.dtype == torch.float32


def test_dense_features_come_back(model: Any, tmp_path: Path) -> None:
    prune_(model, PATCHES_ONLY, dense_features=True)
    again: Any = load_pruned(save_pruned(model, tmp_path))
    assert torch.equal(again.forward_features(random_images()), model.forward_features(random_images()))


def test_preprocessing_comes_back(tmp_path: Path) -> None:
    model = tiny_vit(name="vit_tiny_patch16_224.augreg_in21k")
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    prune_(model, PATCHES_ONLY)
    again = load_pruned(save_pruned(model, tmp_path))
    assert Preprocessing.from_model(again) == Preprocessing.from_model(model)
    assert Preprocessing.from_model(again).mean == (0.1, 0.2, 0.3)


def test_shared_tensors_are_written_once(tmp_path: Path) -> None:
    model: Any = tiny_vit("distilled")
    model.head_dist.weight = model.head.weight
    prune_(model, PATCHES_ONLY)
    folder = save_pruned(model, tmp_path)
    assert "head_dist.weight" not in load_file(folder / "model.safetensors")
    again: Any = load_pruned(folder)
    assert torch.equal(again.head_dist.weight, model.head.weight)
    assert torch.equal(output(again), output(model))


def test_a_view_does_not_drag_its_memory_into_the_file(model: Any, tmp_path: Path) -> None:
    model.head.bias = nn.Parameter(torch.zeros(10_000, dtype=torch.float64)[:11])
    prune_(model, PATCHES_ONLY)
    folder = save_pruned(model, tmp_path)
    assert load_file(folder / "model.safetensors")["head.bias"].shape == (11,)
    assert torch.equal(output(load_pruned(folder)), output(model))


def test_loading_draws_no_random_numbers(saved: Path) -> None:
    state = torch.random.get_rng_state()
    load_pruned(saved)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_saving_over_a_saved_model_leaves_nothing_of_it(model: Any, saved: Path) -> None:
    prune_(model, WITH_HEADS, calibration=random_images())
    save_pruned(model, saved)
    assert sorted(path.name for path in saved.iterdir()) == sorted((*FILES, CARD))
    assert torch.equal(output(load_pruned(saved)), output(model))


def test_saving_that_fails_leaves_the_old_model(
    model: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("cpvit.weights.saving.save_file", full_disk)
    prune_(model, PruneConfig(keep_rate=0.2))
    with pytest.raises(OSError, match="no space left"):
        save_pruned(model, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


class TestUnknownBuilder:
    """A model that cannot be built again is saved, and asked for when it is loaded."""

    @staticmethod
    def odd() -> nn.Module:
        model: Any = tiny_vit()
        model.head = nn.Sequential(nn.Linear(30, 7), nn.Linear(7, 11)).double()
        return model

    def test_it_is_loaded_into_a_model_that_is_given(self, tmp_path: Path) -> None:
        model = self.odd()
        prune_(model, WITH_HEADS, calibration=random_images())
        folder = save_pruned(model, tmp_path)
        given = self.odd()
        assert load_pruned(folder, given) is given
        assert torch.equal(output(given), output(model))

    def test_without_one_the_reason_is_given(self, tmp_path: Path) -> None:
        model = self.odd()
        prune_(model, PATCHES_ONLY)
        folder = save_pruned(model, tmp_path)
        message = (
            r"does not say how to build its model \(vit_tiny_patch16_224 built anew is another model: head "
            r"\(class\) is torch.nn.modules.container.Sequential, not torch.nn.modules.linear.Linear\); build it, "
            r"untouched, and give it: load_pruned\(folder, model=...\)"
        )
        with pytest.raises(ValueError, match=message):
            load_pruned(folder)

    def test_a_setting_that_no_tensor_shows_is_noticed(self, tmp_path: Path) -> None:
        model: Any = tiny_vit()
        model.blocks[1].norm2.eps = 0.1
        prune_(model, PATCHES_ONLY)
        folder = save_pruned(model, tmp_path)
        with pytest.raises(ValueError, match=r"blocks.1.norm2.eps is 0.1, not 1e-06"):
            load_pruned(folder)

    def test_arguments_that_cannot_be_read_off_can_be_given(self, tmp_path: Path) -> None:
        model = odd_tiny_vit("qk_norm")
        prune_(model, PATCHES_ONLY)
        with pytest.raises(ValueError, match="does not say how to build its model"):
            load_pruned(save_pruned(model, tmp_path))
        arguments = {"qk_norm": True, "init_values": 0.1, "no_embed_class": True, "mlp_ratio": 2.2}
        again = load_pruned(save_pruned(model, tmp_path, arguments=arguments))
        assert torch.equal(output(again), output(model))

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"qk_nrom": True}, "vit_tiny_patch16_224 cannot be built anew: .*qk_nrom"),
            ({"norm_layer": nn.LayerNorm}, "an argument cannot be written down: .*not JSON serializable"),
        ],
    )
    def test_arguments_that_are_wrong_are_named(
        self, model: Any, arguments: dict[str, object], words: str, tmp_path: Path
    ) -> None:
        prune_(model, PATCHES_ONLY)
        folder = save_pruned(model, tmp_path, arguments=arguments)
        with pytest.raises(ValueError, match=words):
            load_pruned(folder)

    def test_a_class_of_nobodys_is_named(self, tmp_path: Path) -> None:
        class Mine(type(tiny_vit())):  # type: ignore[misc]
            pass

        model: Any = tiny_vit()
        model.__class__ = Mine
        prune_(model, PATCHES_ONLY)
        folder = save_pruned(model, tmp_path)
        with pytest.raises(ValueError, match=r"Mine of test_saving comes from none of the libraries"):
            load_pruned(folder)

    def test_a_timm_model_without_a_name_is_named(self, tmp_path: Path) -> None:
        model = type(tiny_vit())(img_size=(40, 56), patch_size=8, embed_dim=30, depth=3, num_heads=5)
        prune_(model, PATCHES_ONLY)
        folder = save_pruned(model, tmp_path)
        with pytest.raises(ValueError, match=r"was not created by timm.create_model and has no name"):
            load_pruned(folder)


# What save_pruned of version 0.1 wrote for a three-block ViT, with "recipe" for the model spec.
OLD_MODEL = {
    "recipe": {
        "library": "timm",
        "name": "vit_tiny_patch16_224",
        "arguments": {
            "img_size": [40, 56],
            "patch_size": 8,
            "in_chans": 3,
            "num_classes": 11,
            "global_pool": "token",
            "embed_dim": 30,
            "depth": 3,
            "num_heads": 5,
        },
        "preprocessing": {"input_size": [3, 224, 224], "interpolation": "bicubic", "mean": [0.1, 0.2, 0.3]},
    },
    "no_recipe": "",
    "dtype": "float32",
    "dense_features": False,
    "shared": {"blocks.1.norm1.bias": "blocks.0.norm1.bias"},
    "version": 1,
}
OLD_PLAN = {
    "model": "vit_tiny_patch16_224",
    "method": "cpvit",
    "num_patches": 35,
    "num_prefix": 1,
    "patches_per_block": [30, 20, 9],
    "num_heads": [5, 5, 5],
    "heads": None,
    "head_correction": False,
    "mask_heads": None,
    "schedule": "explicit",
    "dial": "keep_per_block",
    "macs_ratio": 0.703673,
    "calibration_images": 0,
    "align": 1,
    "version": 1,
}
OLD_DIGEST = "cd990d16839eda55782c3da83f87be4b5f81ef5344162f601bd05392dded2cc9"


class TestFoldersOfVersion01:
    @pytest.fixture
    def dense(self) -> Any:
        model: Any = tiny_vit().float()
        model.blocks[1].norm1.bias = model.blocks[0].norm1.bias
        return model

    @pytest.fixture
    def folder(self, dense: Any, tmp_path: Path) -> Path:
        state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
        del state["blocks.1.norm1.bias"]
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt", "plan": OLD_DIGEST})
        (tmp_path / "model.json").write_text(json.dumps(OLD_MODEL, indent=2) + "\n")
        (tmp_path / "plan.json").write_text(json.dumps(OLD_PLAN, indent=2) + "\n")
        return tmp_path

    def test_they_load(self, dense: Any, folder: Path) -> None:
        prune_(dense, PATCHES_ONLY)
        again = load_pruned(folder)
        images = random_images(dtype=torch.float32)
        assert torch.equal(output(again, images), output(dense, images))
        assert plan_of(again) == plan_of(dense)
        assert Preprocessing.from_model(again).mean == (0.1, 0.2, 0.3)

    def test_the_keys_are_the_same_today(self, dense: Any, tmp_path: Path) -> None:
        prune_(dense, PATCHES_ONLY)
        written = json.loads((save_pruned(dense, tmp_path) / "model.json").read_text())
        assert list(written) == list(OLD_MODEL)
        assert list(written["recipe"]) == list(OLD_MODEL["recipe"])  # type: ignore[call-overload]
        assert written["recipe"]["arguments"] == OLD_MODEL["recipe"]["arguments"]  # type: ignore[index]
        assert json.loads((tmp_path / "plan.json").read_text()) == OLD_PLAN

    def test_the_reason_for_a_missing_model_spec_is_read(self, dense: Any, folder: Path) -> None:
        described = {**OLD_MODEL, "recipe": None, "no_recipe": "its head is not timm's"}
        (folder / "model.json").write_text(json.dumps(described))
        with pytest.raises(ValueError, match=r"build its model \(its head is not timm's\); build it"):
            load_pruned(folder)
        given = tiny_vit().float()
        assert load_pruned(folder, given) is given


class TestMisfit:
    def test_weights_that_do_not_fit_the_given_model(self, saved: Path) -> None:
        other = tiny_vit(num_classes=7)
        state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        message = (
            r"do not fit this VisionTransformer: head.weight is \(11, 30\) in the file and \(7, 30\) in the model "
            r"\(2 differ\); give a model created as the saved one was"
        )
        with pytest.raises(ValueError, match=message):
            load_pruned(saved, other)
        assert plan_of(other) is None
        assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())

    def test_tensors_that_are_missing(self, saved: Path) -> None:
        with pytest.raises(ValueError, match=r"blocks.0.attn.qkv.bias is \(90,\) in the file and missing in"):
            load_pruned(saved, tiny_vit(qkv_bias=False))

    def test_a_plan_that_does_not_fit_the_given_model(self, saved: Path) -> None:
        with pytest.raises(ValueError, match=r"has 3 blocks and vit_tiny_patch16_224 has 4; make a new plan"):
            load_pruned(saved, tiny_vit(depth=4))

    def test_a_damaged_patch_size_is_refused_before_anything_runs(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Found by mutation: the check of the pruned model ran for 40 s, on 25,600 tokens."""
        described = json.loads((saved / "model.json").read_text())
        described["recipe"]["arguments"]["patch_size"] = 1
        (saved / "model.json").write_text(json.dumps(described))
        monkeypatch.setattr(nn.Module, "__call__", lambda *_: pytest.fail("the model ran"))
        with pytest.raises(
            ValueError, match=r"the plan \(for .*\) has \d+ patches and .* has \d+; make a new plan"
        ):
            load_pruned(saved)

    def test_a_plan_that_was_not_saved_with_the_weights(self, saved: Path) -> None:
        plan = json.loads((saved / "plan.json").read_text())
        plan["patches_per_block"][-1] = 8
        (saved / "plan.json").write_text(json.dumps(plan))
        message = (
            r"model.safetensors was not saved with the plan.json beside it \(edited, or of another save\)"
        )
        with pytest.raises(ValueError, match=message):
            load_pruned(saved)

    def test_another_layout_of_the_same_plan_is_the_same_plan(self, saved: Path) -> None:
        plan = json.loads((saved / "plan.json").read_text())
        (saved / "plan.json").write_text(json.dumps(plan, indent=7).replace("\n", "\r\n"))
        load_pruned(saved)


class TestDamage:
    def test_an_untouched_model_is_not_saved(self, model: Any, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"vit_tiny_patch16_224 is not pruned; call prune_\(model\) first"
        ):
            save_pruned(model, tmp_path / "saved")
        assert not (tmp_path / "saved").exists()

    def test_a_file_is_not_a_folder(self, model: Any, tmp_path: Path) -> None:
        prune_(model, PATCHES_ONLY)
        (tmp_path / "x.safetensors").touch()
        with pytest.raises(ValueError, match=r"x.safetensors is a file; give the name of a folder"):
            save_pruned(model, tmp_path / "x.safetensors")

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"nowhere is not a folder; give the one that save_pruned"
        ):
            load_pruned(tmp_path / "nowhere")

    def test_missing_files(self, saved: Path) -> None:
        (saved / "plan.json").unlink()
        (saved / "model.json").unlink()
        with pytest.raises(
            FileNotFoundError, match=r"has no plan.json and no model.json; give a folder that"
        ):
            load_pruned(saved)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("{", r"model.json is not JSON \("),
            ("[]", r"model.json does not say how it was saved \(no version\)"),
            ("{}", r"model.json does not say how it was saved \(no version\)"),
            (
                '{"version": 1}',
                r"model.json is not what save_pruned wrote \('recipe'\); save the model again",
            ),
            ('{"version": 1, "recipe": null, "x": 1}', r"is not what save_pruned wrote \(.*'x'"),
            ('{"version": 2}', r"has version 2, newer than this cpvit reads \(1\); upgrade cpvit"),
        ],
    )
    def test_a_damaged_description(self, saved: Path, text: str, words: str) -> None:
        (saved / "model.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            load_pruned(saved)

    @pytest.mark.parametrize("dtype", ["float33", "int8", "nn", 3])
    def test_a_dtype_that_is_none(self, saved: Path, dtype: object) -> None:
        values = json.loads((saved / "model.json").read_text())
        (saved / "model.json").write_text(json.dumps({**values, "dtype": dtype}))
        with pytest.raises(
            ValueError, match=r"model.json is not what save_pruned wrote \(its dtype is .*save the"
        ):
            load_pruned(saved)

    @pytest.mark.parametrize(
        ("name", "value"), [("global_pool", "tokin"), ("depth", "x"), ("nonsense", 1), ("num_heads", 0)]
    )
    def test_arguments_that_build_nothing(self, saved: Path, name: str, value: object) -> None:
        values = json.loads((saved / "model.json").read_text())
        values["recipe"]["arguments"][name] = value
        (saved / "model.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=r"model.json describes a model that cannot be built \("):
            load_pruned(saved)

    def test_a_damaged_plan(self, saved: Path) -> None:
        (saved / "plan.json").write_text("{}")
        with pytest.raises(ValueError, match=r"cannot read the plan .*plan.json: not a plan"):
            load_pruned(saved)

    def test_damaged_weights(self, saved: Path) -> None:
        file = saved / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file \("):
            load_pruned(saved)

    def test_foreign_weights(self, saved: Path) -> None:
        save_file({"a": torch.zeros(1)}, saved / "model.safetensors")
        with pytest.raises(ValueError, match=r"was not saved with the plan.json beside it"):
            load_pruned(saved)


class TestModelSpecs:
    def test_an_unknown_library(self) -> None:
        with pytest.raises(
            ValueError, match=r"library must be one of timm, torchvision, transformers, open_clip, got 'x'"
        ):
            build(ModelSpec("x", "y", {}, {}))

    def test_only_known_classes_of_transformers_are_built(self) -> None:
        pytest.importorskip("transformers")
        with pytest.raises(ValueError, match=r"BertModel is not a class of transformers that cpvit knows"):
            build(ModelSpec("transformers", "BertModel", {}, {}))

    @pytest.mark.parametrize("name", ["hf-hub:somebody/model", "local-dir:/tmp", "nothing"])
    def test_names_of_the_hub_are_not_fetched(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"is not an architecture of timm"):
            build(ModelSpec("timm", name, {}, {}))

    @pytest.mark.parametrize("name", ["checkpoint_path", "pretrained_cfg", "pretrained"])
    def test_a_description_cannot_have_other_files_opened(self, name: str) -> None:
        with pytest.raises(ValueError, match=rf"{name} is no argument of the architecture test_vit"):
            build(ModelSpec("timm", "test_vit", {name: "somewhere.pth"}, {}))

    def test_a_description_cannot_have_kernels_fetched(self) -> None:
        pytest.importorskip("transformers")
        arguments = {"vision_config": {"attn_implementation": "somebody/kernel"}}
        with pytest.raises(
            ValueError, match=r"asks for code of the hub \(attn_implementation='somebody/kernel'\)"
        ):
            build(ModelSpec("transformers", "ViTModel", arguments, {}))

    def test_without_transformers_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        message = r"a ViTModel is built by transformers, which is not installed: pip install 'cpvit\[hf\]'"
        with pytest.raises(ImportError, match=message):
            build(ModelSpec("transformers", "ViTModel", {}, {}))

    def test_the_path_a_model_was_loaded_from_is_not_saved(self, tmp_path: Path) -> None:
        transformers_vit().save_pretrained(tmp_path / "private")
        kind = type(transformers_vit())
        model = kind.from_pretrained(tmp_path / "private").eval()
        prune_half(model, heads=True)
        folder = save_pruned(model, tmp_path / "saved")
        assert "private" not in (folder / "model.json").read_text()
        assert torch.equal(output(load_pruned(folder)), output(model))
