"""Trained networks on the cases of the data set: what an evaluation reads, and how it segments a case."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from prostate_seg.common.errors import InputError
from prostate_seg.common.progress import map_cases
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.data.cases import Case
from prostate_seg.data.dataset import CaseRecord
from prostate_seg.data.folds import Fold
from prostate_seg.data.loading import LoadedCase, load_case
from prostate_seg.imaging.image_io import content_md5
from prostate_seg.imaging.regions import Regions, predicted_labels, region_masks
from prostate_seg.imaging.settings import WHOLE_GLAND
from prostate_seg.segmentation.devices import choose_device
from prostate_seg.segmentation.inference.inference import Predictor
from prostate_seg.segmentation.inference.out_of_distribution import merged_ranges
from prostate_seg.segmentation.inference.settings import Usage
from prostate_seg.segmentation.networks.storage import load_network, load_recipe
from prostate_seg.steps.dataset import checked_dataset, preprocess_settings, reference_regions
from prostate_seg.steps.leak_gate import checked_folds

Md5s = tuple[str, str]
"""Hashes of image and mask."""
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Trained folds and the data set of their test cases."""

    cfg: Config
    workspace: Workspace
    folds: dict[int, Fold]
    verdict: dict[str, Any]
    """Verdict of the leak gate on the folds."""
    dataset: dict[str, CaseRecord]
    regions: Regions
    """Labels of each region in the references."""
    predicted_regions: Regions
    """Labels of each region in predicted label maps: those of the data set that the networks were trained on."""

    @classmethod
    def of(cls, cfg: Config, workspace: Workspace) -> "Evaluation":
        """Read the data set and the folds; refuse folds that leak."""
        dataset, regions = checked_dataset(cfg, workspace), reference_regions(cfg, workspace)
        folds, verdict = checked_folds(cfg, workspace, dataset)
        return cls(
            cfg=cfg,
            workspace=workspace,
            folds=folds,
            verdict=verdict,
            dataset=dataset,
            regions=regions,
            predicted_regions=predicted_labels(preprocess_settings(cfg, workspace).regions),
        )

    @property
    def oracle_crop(self) -> bool:
        """Whether the windows are centred on the references, which no new study has."""
        return self.cfg.preprocess.crop == "mask"

    def predictor_of(self, folds: Iterable[int]) -> Predictor:
        """Load the networks of some folds, which must be trained on the present cases and preprocessing, as an ensemble."""
        cfg, device, networks, ranges = self.cfg, choose_device(self.cfg.machine.device), [], []
        settings = preprocess_settings(cfg, self.workspace)
        for index in folds:
            path, fold = self.workspace.fold(index), self.folds[index]
            recipe = load_recipe(path)
            # A training may have taken some of the training cases only (fold.max_train_cases).
            if recipe.val_ids != fold.val or not set(recipe.train_ids) <= set(fold.train):
                raise InputError(f"{path} was trained on other cases than kfold.json now lists: run stage=train again")
            if recipe.preprocess != settings:
                raise InputError(
                    f"{path} was trained on other preprocessing than this run asks for: run stage=train again"
                )
            networks.append(load_network(path, recipe=recipe, device=device))
            ranges.append(recipe.ranges)
        usage = Usage.of(cfg.evaluate, precision=cfg.train.precision)
        recipe = replace(recipe, ranges=merged_ranges(ranges))
        return Predictor(networks=networks, recipe=recipe, usage=usage, device=device)

    def map_cases(
        self, function: Callable[[Case, LoadedCase, Md5s], Result], case_ids: Sequence[str], *, label: str
    ) -> list[Result]:
        """Apply a function to cases of the data set, whose files must be those that preprocessing and the leak gate read."""

        def work(record: CaseRecord) -> Result:
            image, mask = self.workspace.data / record.image, self.workspace.data / record.mask
            for path, md5 in ((image, record.image_md5), (mask, record.mask_md5)):
                if not path.exists():
                    raise InputError(
                        f"{record.case_id}: {path} is gone since stage=preprocess; put it back, or set data.root"
                    )
                if content_md5(path) != md5:
                    raise InputError(
                        f"{record.case_id}: {path} has changed since stage=preprocess: run the pipeline again"
                    )
            case = Case(
                case_id=record.case_id,
                patient_id=record.patient_id,
                study_id=record.study_id,
                image=image,
                mask=mask,
                attributes=record.attributes,
            )
            loaded, quality = load_case(case, labels=self.regions[WHOLE_GLAND])
            assert loaded is not None, quality.findings  # the same files passed the same checks in stage=preprocess
            return function(case, loaded, (record.image_md5, record.mask_md5))

        records = [self.dataset[case_id] for case_id in case_ids]
        return map_cases(work, records, num_workers=self.cfg.machine.num_workers, label=label)

    def region_pairs(self, reference: np.ndarray, predicted: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return reference and predicted mask of each region, of two label maps on one grid."""
        masks = region_masks(reference, self.regions), region_masks(predicted, self.predicted_regions)
        return dict(zip(self.regions, zip(*masks, strict=True), strict=True))
