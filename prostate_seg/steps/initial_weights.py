"""Initial weights of a training (train.init): where they are, whether they fit, and their lineage."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prostate_seg.common.address import REGISTRY, RUN_ID
from prostate_seg.common.errors import InputError
from prostate_seg.common.files import md5_of
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.data.lineage import Ancestor, as_ancestors, read_lineage, studies_by_name
from prostate_seg.segmentation.networks.initial_weights import input_differences
from prostate_seg.segmentation.networks.model_folder import network_folders
from prostate_seg.segmentation.networks.storage import RECIPE, WEIGHTS, Recipe, load_recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialWeights:
    """Trained networks that a training starts from."""

    folders: Sequence[Path]
    """Folders of the networks, in the order of their folds."""
    source: str
    """train.init."""
    version: str | None = None
    """Name and version in the registry."""
    run_id: str | None = None
    """Run that trained the networks."""

    @property
    def name(self) -> str:
        """Version in the registry, or train.init."""
        return self.version or self.source

    def folder_of(self, fold_index: int) -> Path:
        """Return the network that a fold starts from: of several networks that of the same fold, counted cyclically."""
        return self.folders[fold_index % len(self.folders)]

    def folders_of(self, fold_indices: Iterable[int]) -> list[Path]:
        """Return the networks that folds start from, each once."""
        return list(dict.fromkeys(map(self.folder_of, fold_indices)))

    def tags(self, fold_indices: Iterable[int]) -> dict[str, str]:
        """Return tags of the run: source, version, run, hashes of the weights and number of the studies behind them."""
        lines_of_descent = [self.ancestors_of(index) for index in fold_indices]
        everyone = [ancestor for line in lines_of_descent for ancestor in line]
        num_studies = len(studies_by_name(study for one in everyone for study in one.studies))
        is_known = all(one.train is not None for one in everyone)
        known = {"version": self.version, "run_id": self.run_id}
        return {
            "init.source": self.source,
            "init.weights_md5": ",".join(sorted({line[0].weights_md5 for line in lines_of_descent})),
            "init.num_studies": str(num_studies) if is_known else f"{num_studies} and unknown ones",
            **{f"init.{name}": value for name, value in known.items() if value is not None},
        }

    def ancestors_of(self, fold_index: int) -> tuple[Ancestor, ...]:
        """Return the network that a fold starts from, and its ancestors."""
        folder = self.folder_of(fold_index)
        parent = Ancestor(
            weights_md5=md5_of(folder / WEIGHTS), source=self.source, version=self.version, run_id=self.run_id
        )
        return as_ancestors(parent, read_lineage(folder))


def find_initial_weights(cfg: Config, workspace: Workspace) -> InitialWeights | None:
    """Return the networks that train.init names; None for random weights.

    Raises:
        InputError: If there are none, or this training would replace them.
    """
    source = cfg.train.init
    if source is None:
        return None
    version, run_id = None, None
    if source.startswith(REGISTRY) or RUN_ID.fullmatch(source):
        from prostate_seg.tracking.registry import fetch_networks  # imports mlflow

        folder, found, run_id = fetch_networks(source, cfg.mlflow, workspace, setting="train.init")
        version = None if found is None else str(found)
    else:
        folder = Path(source)
        if folder.absolute().resolve().is_relative_to(workspace.model.absolute().resolve()):
            raise InputError(
                f"train.init: {folder} must not be in {workspace.model}, whose networks this training replaces\n"
                "Copy it to another folder and name that, or name the run that trained it."
            )
    folders = [folder] if (folder / RECIPE).is_file() else network_folders(folder, fold_index=None)
    return InitialWeights(folders=folders, source=source, version=version, run_id=run_id)


def check_initial_weights(initial: InitialWeights, wanted: Recipe, *, fold_indices: Iterable[int]) -> None:
    """Log what each fold starts from, and how its input differs; refuse weights of another architecture or scale."""
    lines: list[str] = []
    for index in fold_indices:
        folder = initial.folder_of(index)
        lines += input_differences(load_recipe(folder), wanted, source=initial.name)
        number = initial.folders.index(folder) + 1
        log.info("fold %d starts from network %d of %d of %s", index, number, len(initial.folders), initial.name)
    if lines:
        log.warning("train.init was trained on other inputs: %s", "; ".join(dict.fromkeys(lines)))
