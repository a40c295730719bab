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

from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.common.progress import map_cases
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.data.layouts import has_images
from prostate_seg.data.predictions import State, Target, new_mask, note_dicom_seg, state_of, write_volumes
from prostate_seg.data.scan_names import kind_of
from prostate_seg.data.scans import Scan, ScanList, find_scans
from prostate_seg.imaging.dicom_seg import require_dicom_packages, write_dicom_seg
from prostate_seg.imaging.image_io import content_md5, read_volume, write_volume
from prostate_seg.reporting.overlays import overlay_figure
from prostate_seg.reporting.plots import save_png
from prostate_seg.segmentation.devices import choose_device
from prostate_seg.segmentation.inference.prediction import Prediction, predict
from prostate_seg.segmentation.networks.model_folder import Model, Usage, load_model, read_usage

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
    found = requested_scans(cfg)
    for line in found.left_out_lines:
        log.warning("%s", line)
    named = load_named_model(cfg, workspace)
    output = Path(cfg.predict.output)
    targets = [Target(scan=scan, output=output) for scan in found.scans]
    waiting = waiting_targets(targets, named.model, cfg)
    if len(waiting) < len(targets):
        log.info("%d of %d studies are segmented already", len(targets) - len(waiting), len(targets))
    work = partial(segment_study, named=named)
    rows = map_cases(work, waiting, num_workers=cfg.machine.num_workers, label="predict")
    refused = [row for row in rows if row["error"]] + _unreadable_rows(found, named)
    names_refused = {row["name"] for row in refused}
    segmented = [target for target in targets if target.scan.name not in names_refused]
    without_object = write_dicom_segs(segmented, named, cfg) if cfg.predict.dicom_seg else {}
    table = write_volumes(output, errors=refused)
    names = {target.scan.name for target in targets} | names_refused
    _show([row for row in table.to_dict("records") if row["name"] in names], cfg)
    _conclude(refused, without_object, num_studies=len(names), num_segmented=len(segmented))
    return StageResult()


def _conclude(
    refused: Sequence[Mapping[str, Any]], without_object: Mapping[str, str], *, num_studies: int, num_segmented: int
) -> None:
    """Raise an `InputError` that names every study that could not be segmented, and every mask without DICOM SEG."""
    parts = []
    if refused:
        listing = "\n".join(f"  {row['name']}: {row['error']}" for row in refused)
        parts.append(f"{len(refused)} of {num_studies} studies cannot be segmented:\n{listing}\nThe others are done.")
    if without_object:
        listing = "\n".join(f"  {name}: {reason}" for name, reason in without_object.items())
        parts.append(
            f"{len(without_object)} of {num_segmented} DICOM SEG could not be written:\n{listing}\nThe masks are written."
        )
    if parts:
        raise InputError("\n".join(parts))


def requested_scans(cfg: Config) -> ScanList:
    """Return the studies to segment.

    Raises:
        ConfigError: If none are asked for.
        InputError: If there are none, DICOM SEG is asked for what is no DICOM series, or results would lie in a data set.
    """
    if cfg.predict.input is None:
        raise ConfigError("predict.input: must name an image file, a DICOM folder or a folder of either, is null")
    output = Path(cfg.predict.output)
    found = find_scans(Path(cfg.predict.input), pattern=cfg.predict.pattern, output=output)
    if has_images(output):
        raise InputError(
            f"predict.output: {output} is the folder of a data set, and predicted masks must not lie among its references; "
            "choose another folder, such as predict.output=predictions"
        )
    if output.exists() and not output.is_dir():
        raise InputError(f"predict.output: {output} is a file, and must be a folder; choose another one")
    if cfg.predict.dicom_seg:
        require_dicom_packages()
        files = [scan.name for scan in found.scans if not scan.is_dicom]
        if files:
            raise InputError(
                f"predict.dicom_seg refers to the images of a DICOM series, and {len(files)} studies are files: "
                f"{', '.join(files[:5])}\nChoose the series with predict.pattern, or segment the files by themselves."
            )
    return found


def _unreadable_rows(found: ScanList, named: NamedModel) -> list[dict[str, Any]]:
    """Return the rows of what may be studies and could not be opened."""
    model = {"model": named.name, "model_md5": named.model.md5}
    return [{"name": name, "error": reason, **model} for name, reason in sorted(found.unreadable.items())]


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
    device = torch.device("cpu") if cfg.predict.backend == "onnx" else choose_device(cfg.machine.device)
    usage = read_usage(folder) or Usage.of(cfg.evaluate, precision=cfg.train.precision)
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
    try:
        input_md5 = content_md5(target.scan.path)
    except OSError:
        return State.absent  # reading it is tried again, and refused in words
    return state_of(target, input_md5=input_md5, model_md5=model.md5)


def segment_study(target: Target, *, named: NamedModel) -> Mapping[str, Any]:
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
        row["input_md5"] = content_md5(scan.path)
        found = predict(image, model=named.model)
    except InputError as error:
        return row | {"error": str(error)}
    except OSError as error:
        return row | {"error": f"{error.filename} cannot be read ({error.strerror}); check its permissions"}
    spacing_mm, title = image.geometry.spacing_mm, _title(scan, found)
    figure = overlay_figure(image.array, found.mask.array, reference=None, spacing_mm=spacing_mm, title=title)
    save_png(target.overlay, figure)
    row |= _numbers(found, _doubts(scan))
    with new_mask(target, row) as made:
        write_volume(made, found.mask)
    return row


def write_dicom_segs(targets: Sequence[Target], named: NamedModel, cfg: Config) -> dict[str, str]:
    """Write the DICOM SEG of every mask that has none, and return why some could not be written, by name of the study."""
    missing = [target for target in targets if not target.dicom_seg.exists()]
    work = partial(_write_dicom_seg, named=named)
    errors = map_cases(work, missing, num_workers=cfg.machine.num_workers, label="DICOM SEG")
    return {target.scan.name: error for target, error in zip(missing, errors, strict=True) if error}


def _write_dicom_seg(target: Target, *, named: NamedModel) -> str | None:
    """Write a mask as DICOM SEG; the reason why that cannot be done stands in the record of the mask, which is kept."""
    error = None
    try:
        write_dicom_seg(
            target.dicom_seg,
            read_volume(target.mask),
            series=target.scan.path,
            model_name=named.name,
            model_md5=named.model.md5,
        )
    except InputError as failure:
        error = str(failure)
    note_dicom_seg(target, error=error)
    return error


def _doubts(scan: Scan) -> list[str]:
    """Return the warning that the header of a series names another sequence or plane than axial T2."""
    if kind_of(scan.description) is None:
        return []
    return [f'the series description is "{scan.description}", and an axial T2-weighted series is expected']


def _numbers(found: Prediction, doubts: Sequence[str]) -> dict[str, Any]:
    return {
        "volume_ml": round(found.volume_ml, 3),
        "num_slices": found.num_slices,
        "mean_confidence": None if found.mean_confidence is None else round(found.mean_confidence, 4),
        "fold_agreement": None if found.fold_agreement is None else round(found.fold_agreement, 4),
        "warnings": "; ".join([*doubts, *found.warnings]),
    }


def _title(scan: Scan, found: Prediction) -> str:
    marks = "    see the warnings" if found.warnings else ""
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
