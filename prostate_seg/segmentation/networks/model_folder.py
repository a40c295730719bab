"""Ensemble of trained networks in a folder, fold0, fold1, ..., as stage=train writes it; all that a prediction needs.

stage=register adds segmentation.json, the inference settings of the evaluation. The folder contains no code.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import md5_of, md5_of_text, read_json
from prostate_seg.common.settings import parse_group, plain
from prostate_seg.imaging.regions import Regions, predicted_labels
from prostate_seg.segmentation.inference.expected_dice import ExpectedDice
from prostate_seg.segmentation.inference.inference import Predictor
from prostate_seg.segmentation.inference.out_of_distribution import merged_ranges
from prostate_seg.segmentation.inference.settings import Usage
from prostate_seg.segmentation.networks.onnx_network import OnnxNetwork
from prostate_seg.segmentation.networks.settings import Backend
from prostate_seg.segmentation.networks.storage import RECIPE, WEIGHTS, load_network, load_recipe

USAGE = "segmentation.json"
TRUST = "trust.json"
"""Calibration of expected Dice, or the reason why there is none, and temperatures; from stage=register."""
ONNX = "network.onnx"
"""In the folder of a fold, if it was registered with register.onnx=true."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """An ensemble that is ready for inference."""

    name: str
    """Folder, or name and version of a registered model."""
    predictor: Predictor
    notes: tuple[str, ...]
    """Warnings that apply to every prediction of the model."""
    expected_dice: ExpectedDice | None = None
    """Calibration of expected Dice and its lower bound, which stage=register stores."""
    no_expected_dice: str | None = None
    """Why there is none, and the next step."""
    md5: str
    """Hash of weights, recipes, usage and backend: equal models give equal masks."""

    @property
    def regions(self) -> Regions:
        """Labels of each region in predicted label maps, the whole gland first."""
        return predicted_labels(self.predictor.recipe.preprocess.regions)


def read_usage(folder: Path) -> Usage | None:
    """Read segmentation.json; None if the folder has none."""
    return parse_group(Usage, read_json(folder / USAGE), key="evaluate") if (folder / USAGE).is_file() else None


def _read_expected_dice(folder: Path, *, num_networks: int) -> tuple[ExpectedDice | None, str | None]:
    """Read the calibration in trust.json, or return the reason why there is none for these networks."""
    stored = read_json(folder / TRUST) if (folder / TRUST).is_file() else {}
    values = stored.get("expected_dice")
    if values is None:
        reason = "register the networks with an evaluation of this version: stage=evaluate, then stage=register"
        return None, stored.get("no_expected_dice") or reason
    found = ExpectedDice(**values)
    if "inter_model" in found.features and num_networks == 1:
        return None, "it is calibrated on the ensemble, and fold.index chooses one network"
    return found, None


def network_folders(folder: Path, *, fold_index: int | None) -> list[Path]:
    """Return the folders of the networks, sorted by fold; only that of `fold_index` unless it is None.

    Raises:
        InputError: If there is none.
    """
    found = {int(path.name[4:]): path for path in folder.glob("fold*") if path.name[4:].isdigit() and path.is_dir()}
    if not found:
        raise InputError(
            f"{folder} holds no trained networks (fold0, fold1, ...): name the folder model/ that stage=train wrote, "
            "or a registered model such as models:/prostate_seg@champion"
        )
    if fold_index is None:
        return [found[index] for index in sorted(found)]
    if fold_index not in found:
        raise InputError(f"fold.index: {folder} has the folds {', '.join(map(str, sorted(found)))}, not {fold_index}")
    return [found[fold_index]]


def load_model(
    folder: Path,
    *,
    fold_index: int | None,
    usage: Usage,
    device: torch.device,
    backend: Backend = "torch",
    name: str | None = None,
) -> Model:
    """Load the networks of a folder as one ensemble, or only that of `fold_index`; the model is named by the folder or `name`.

    Raises:
        InputError: If there are no networks, their settings differ, or files that the backend needs are absent.
    """
    folders = network_folders(folder, fold_index=fold_index)
    recipes = [load_recipe(path) for path in folders]
    first = recipes[0]
    for path, recipe in zip(folders, recipes, strict=True):
        if (recipe.model, recipe.preprocess, recipe.zscore) != (first.model, first.preprocess, first.zscore):
            raise InputError(
                f"{path} and {folders[0]} were trained with other networks or preprocessing, and are no ensemble: "
                "train all folds with the same settings, or take one with fold.index"
            )
    note = "trained on windows that the reference had placed (preprocess.crop=mask)"
    expected_dice, no_expected_dice = _read_expected_dice(folder, num_networks=len(folders))
    files = [path / file for path in folders for file in (RECIPE, WEIGHTS)]
    usage_text = str(plain(usage)).replace("'tta'", "'flips'")  # former name: masks of earlier versions stay valid
    networks = [
        OnnxNetwork(path / ONNX) if backend == "onnx" else load_network(path, recipe=recipe, device=device)
        for path, recipe in zip(folders, recipes, strict=True)
    ]
    centred = replace(first.preprocess, crop="center")  # no reference can place the window
    recipe = replace(first, preprocess=centred, ranges=merged_ranges([recipe.ranges for recipe in recipes]))
    return Model(
        name=name or str(folder),
        predictor=Predictor(networks=networks, recipe=recipe, usage=usage, device=device),
        expected_dice=expected_dice,
        no_expected_dice=no_expected_dice,
        notes=(note,) if first.preprocess.crop == "mask" else (),
        md5=md5_of_text(" ".join([usage_text, backend, *map(md5_of, files)])),
    )
