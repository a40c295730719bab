"""The preprocessed data set of a workspace: its settings and labels, and the findings on all of its cases together."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.data.dataset import CaseRecord, chosen_settings, read_dataset, recorded_labels, require_contract
from prostate_seg.data.label_names import label_names, region_labels
from prostate_seg.imaging.geometry import Finding, Spacing
from prostate_seg.imaging.preprocessing import PreprocessSettings
from prostate_seg.imaging.quality import CaseQuality, check_slice_planes, check_zones
from prostate_seg.imaging.regions import Regions
from prostate_seg.imaging.target_grid import auto_names


def preprocess_settings(cfg: Config, workspace: Workspace) -> PreprocessSettings:
    """Return the settings that decide the network's input; stage=preprocess has chosen the values of those that are auto."""
    chosen = chosen_settings(workspace.contract_json, auto_names(cfg.preprocess))
    return PreprocessSettings.of(cfg.preprocess, regions=_regions_of_data(cfg, workspace), chosen=chosen)


def _regions_of_data(cfg: Config, workspace: Workspace) -> Regions:
    """Return the labels of each region in the data set; stage=preprocess has recorded the names in its files."""
    is_recorded = len(cfg.target.regions) > 1 and cfg.data.labels is None
    names = recorded_labels(workspace.contract_json) if is_recorded else cfg.data.labels
    return region_labels(cfg.target.regions, names=names, whole_gland_labels=cfg.data.whole_gland_labels)


def reference_regions(cfg: Config, workspace: Workspace) -> Regions:
    """Return the labels of each region in the masks that are evaluated: those of the data set, or of evaluate.external_root."""
    if cfg.evaluate.external_root is None:
        return _regions_of_data(cfg, workspace)
    root = Path(cfg.evaluate.external_root)
    try:
        return regions_in(root, cfg, labels=cfg.evaluate.external_labels)[0]
    except InputError as error:
        text = str(error).replace("data.labels=", "evaluate.external_labels=")
        raise InputError(f"{root}: {text}") from error


def regions_in(root: Path, cfg: Config, *, labels: Mapping[str, int] | None) -> tuple[Regions, dict[str, int] | None]:
    """Return the labels of each region in a data folder, and the label of each name; None for the gland alone."""
    names = label_names(root, given=labels) if len(cfg.target.regions) > 1 else None
    return region_labels(cfg.target.regions, names=names, whole_gland_labels=cfg.data.whole_gland_labels), names


def allows_other_labels(cfg: Config) -> bool:
    """Return whether masks may have labels of no region, as `quality.check_case` allows it."""
    return len(cfg.target.regions) == 1 or cfg.data.whole_gland_labels is not None


def checked_dataset(cfg: Config, workspace: Workspace) -> dict[str, CaseRecord]:
    """Return dataset.csv after checking that it was made with this config's preprocessing."""
    require_contract(workspace.contract_json, preprocess_settings(cfg, workspace))
    return read_dataset(workspace.dataset_csv)


def findings_of_data_set(
    qualities: Mapping[str, CaseQuality],
    *,
    md5s: Mapping[str, Mapping[str, str]],
    spacings_mm: Mapping[str, Spacing],
    labels: Sequence[int] | None,
) -> list[Finding]:
    """Return the findings on each case, then those of comparing cases: shared files, missing zones, other slice planes.

    Args:
        qualities: Checks of each case, by case id.
        md5s: By case id, md5 by kind, image or mask, where the file can be read.
        spacings_mm: Voxel edges along z, y, x of each image, by case id.
        labels: Mask labels that are gland; None takes every label above 0.
    """
    findings = [finding for quality in qualities.values() for finding in quality.findings]
    for kind in ("image", "mask"):
        first_with: dict[str, str] = {}
        for case_id, md5 in ((case_id, of_case[kind]) for case_id, of_case in md5s.items() if kind in of_case):
            if md5 in first_with:  # one image under two names, or one mask for two images
                message = f"its {kind} file is identical to that of {first_with[md5]}"
                findings.append(Finding(f"identical_{kind}", message, case_id=case_id))
            first_with.setdefault(md5, case_id)
    gland_labels = {
        case_id: [label for label in quality.reference.labels_ml if labels is None or label in labels]
        for case_id, quality in qualities.items()
        if quality.reference is not None
    }
    return [*findings, *check_zones(gland_labels), *check_slice_planes(spacings_mm)]
