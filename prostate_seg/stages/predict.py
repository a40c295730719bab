"""Stage predict: segment studies that have no reference, with networks from the registry or from a folder."""

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from prostate_seg.config import Backend, Config
from prostate_seg.data.predictions import State, Target, new_mask, state_of, write_volumes
from prostate_seg.data.scans import Scan, find_scans
from prostate_seg.errors import ConfigError, InputError
from prostate_seg.imaging.dicom_seg import require_dicom_packages, write_dicom_seg
from prostate_seg.imaging.image_io import content_md5, read_volume, write_volume
from prostate_seg.progress import map_cases
from prostate_seg.reporting.overlays import draw_prediction
from prostate_seg.segmentation.devices import choose_device
from prostate_seg.segmentation.model_folder import Model, Usage, load_model, read_usage
from prostate_seg.segmentation.prediction import Prediction, predict
from prostate_seg.workspace import StageResult, Workspace

log = logging.getLogger(__name__)

SHOWN_ROWS = 20
"""Studies that are listed at the terminal; volumes.csv has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedModel:
    """Networks, and what they are called where their masks are read."""

    name: str
    model: Model


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Write masks/, overlays/, records/ and volumes.csv below predict.output; name what could not be segmented."""
    scans = requested_scans(cfg)
    named = load_named_model(cfg, workspace)
    targets = [Target(scan=scan, output=Path(cfg.predict.output)) for scan in scans]
    waiting = waiting_targets(targets, named.model, cfg)
    if len(waiting) < len(targets):
        log.info("%d of %d studies are segmented already", len(targets) - len(waiting), len(targets))
    work = partial(segment_study, named=named, dicom_seg=cfg.predict.dicom_seg)
    rows = map_cases(work, waiting, num_workers=cfg.machine.num_workers, label="predict")
    refused = [row for row in rows if row["error"]]
    table = write_volumes(Path(cfg.predict.output), errors=refused)
    _show([row for row in table.to_dict("records") if row["name"] in {scan.name for scan in scans}], cfg)
    if refused:
        listing = "\n".join(f"  {row['name']}: {row['error']}" for row in refused)
        raise InputError(
            f"{len(refused)} of {len(scans)} studies cannot be segmented:\n{listing}\nThe others are done."
        )
    return StageResult()


def requested_scans(cfg: Config) -> list[Scan]:
    """Return the studies to segment.

    Raises:
        ConfigError: If none are asked for.
        InputError: If there are none, or DICOM SEG is asked for what is no DICOM series.
    """
    if cfg.predict.input is None:
        raise ConfigError("predict.input: must name an image file, a DICOM folder or a folder of either, is null")
    scans = find_scans(Path(cfg.predict.input), pattern=cfg.predict.pattern)
    if cfg.predict.dicom_seg:
        require_dicom_packages()
        files = [scan.name for scan in scans if not scan.is_dicom]
        if files:
            raise InputError(
                f"predict.dicom_seg refers to the images of a DICOM series, and {len(files)} studies are files: "
                f"{', '.join(files[:5])}\nChoose the series with predict.pattern, or segment the files by themselves."
            )
    return scans


def load_named_model(cfg: Config, workspace: Workspace) -> NamedModel:
    """Load the networks that the config names; a registered model is used as it was evaluated.

    Raises:
        InputError: If there are none.
    """
    wanted = cfg.predict.model
    if wanted is not None and wanted.startswith("models:/"):
        registry = importlib.import_module("prostate_seg.tracking.registry")  # mlflow, which a folder does without
        folder, name = registry.fetch_networks(wanted, cfg.mlflow, cache=workspace.cache)
    else:
        folder = workspace.model if wanted is None else Path(wanted)
        name = str(folder)
    device = torch.device("cpu") if cfg.predict.backend is Backend.onnx else choose_device(cfg.machine.device)
    usage = read_usage(folder) or Usage.of(cfg)
    model = load_model(folder, fold_index=cfg.fold.index, usage=usage, device=device, backend=cfg.predict.backend)
    log.info("%d networks of %s", len(model.predictor.networks), name)
    return NamedModel(name=name, model=model)


def waiting_targets(targets: Sequence[Target], model: Model, cfg: Config) -> list[Target]:
    """Return the studies that are yet to be segmented.

    Raises:
        InputError: If masks of something else are in their place, and may not be replaced.
    """
    states = {target.mask: _state(target, model, cfg) for target in targets}
    foreign = [path for path, state in states.items() if state is State.foreign]
    if foreign and not cfg.predict.overwrite:
        listing = "\n".join(f"  {path}" for path in foreign[:10]) + ("\n  ..." if len(foreign) > 10 else "")
        raise InputError(
            f"{len(foreign)} masks are there already, of another model or input:\n{listing}\n"
            "Choose another predict.output, or replace them: predict.overwrite=true"
        )
    return [target for target in targets if states[target.mask] is not State.done]


def _state(target: Target, model: Model, cfg: Config) -> State:
    if not target.mask.exists():
        return State.absent
    return state_of(
        target,
        input_md5=content_md5(target.scan.path),
        model_md5=model.md5,
        needs_dicom_seg=cfg.predict.dicom_seg,
    )


def segment_study(target: Target, *, named: NamedModel, dicom_seg: bool) -> Mapping[str, Any]:
    """Segment one study and write all that comes of it; a study that cannot be used gives a row with the reason."""
    scan = target.scan
    row = {
        "name": scan.name,
        "mask": target.mask.relative_to(target.output).as_posix(),
        "input": str(scan.path),
        "model": named.name,
        "model_md5": named.model.md5,
        "error": None,
    }
    try:
        image = read_volume(scan.path)
        found = predict(image, model=named.model)
        if dicom_seg:
            write_dicom_seg(
                target.dicom_seg, found.mask, series=scan.path, model_name=named.name, model_md5=named.model.md5
            )
    except InputError as error:
        return row | {"error": str(error)}
    draw_prediction(
        target.overlay,
        image=image.array,
        predicted=found.mask.array,
        spacing_mm=image.geometry.spacing_mm,
        title=_title(scan, found),
    )
    row |= {"input_md5": content_md5(scan.path), **_numbers(found)}
    with new_mask(target, row) as made:
        write_volume(made, found.mask)
    return row


def _numbers(found: Prediction) -> dict[str, Any]:
    return {
        "volume_ml": round(found.volume_ml, 3),
        "num_slices": found.num_slices,
        "mean_confidence": None if found.mean_confidence is None else round(found.mean_confidence, 4),
        "fold_agreement": None if found.fold_agreement is None else round(found.fold_agreement, 4),
        "warnings": "; ".join(found.warnings),
    }


def _title(scan: Scan, found: Prediction) -> str:
    marks = "    look at the warnings" if found.warnings else ""
    return f"{scan.name}    {found.volume_ml:.1f} mL{marks}"


def _show(rows: Sequence[Mapping[Any, Any]], cfg: Config) -> None:
    """Log a table of the studies of this command, and the warnings of each."""
    log.info("%-40s %9s %7s %11s %10s", "study", "mL", "slices", "confidence", "agreement")
    for row in rows[:SHOWN_ROWS]:
        if isinstance(row["error"], str):
            log.info("%-40s refused", _shortened(row["name"]))
            continue
        numbers = (row["volume_ml"], row["num_slices"], row["mean_confidence"], row["fold_agreement"])
        log.info("%-40s %9s %7s %11s %10s", _shortened(row["name"]), *map(_number, numbers, (1, 0, 2, 2)))
        for warning in str(row["warnings"] or "").split("; "):
            if warning:
                log.info("    %s", warning)
    if len(rows) > SHOWN_ROWS:
        log.info("and %d more", len(rows) - SHOWN_ROWS)
    log.info("masks, overlays and volumes.csv are in %s", cfg.predict.output)


def _shortened(name: str) -> str:
    return name if len(name) <= 40 else f"...{name[-37:]}"


def _number(value: Any, digits: int) -> str:
    return "-" if pd.isna(value) else f"{value:.{digits}f}"
