"""Stage predict: segment studies without a reference, with a registered model or the networks of a folder."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from prostate_seg.common.errors import InputError, listed
from prostate_seg.common.files import md5_of_text, read_json
from prostate_seg.common.progress import map_cases
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.data.layouts import has_images
from prostate_seg.data.predictions import State, Target, new_mask, note_dicom_seg, state_of, write_volumes
from prostate_seg.data.scan_names import kind_of
from prostate_seg.data.scans import Scan, ScanList, find_scans
from prostate_seg.imaging.dicom_seg import require_dicom_packages, write_dicom_seg
from prostate_seg.imaging.image_io import content_md5, read_volume, write_volume
from prostate_seg.imaging.regions import region_masks
from prostate_seg.reporting.figures.overlays import RegionMasks, overlay_figure
from prostate_seg.reporting.figures.plots import save_png
from prostate_seg.reporting.pages.review_page import write_review
from prostate_seg.segmentation.devices import choose_device
from prostate_seg.segmentation.inference.prediction import Prediction, predict
from prostate_seg.segmentation.inference.settings import Usage
from prostate_seg.segmentation.networks.model_folder import Model, load_model, read_usage
from prostate_seg.tracking.registry import fetch_networks

log = logging.getLogger(__name__)

MAX_LOGGED_ROWS = 20
"""Studies in the table at the terminal; volumes.csv has all."""
SIZE_COLUMNS = {"volume_ml": ("mL", 1), "num_slices": ("slices", 0)}
UNCERTAINTY_COLUMNS = {"mean_confidence": ("confidence", 2), "fold_agreement": ("inter-model Dice", 2)}
TRUST_COLUMNS = {"expected_dice": ("expected Dice", 2), "dice_lower_bound": ("at least", 2)}
"""Heading and decimals of the columns of that table; expected Dice, where it is known, takes the place of what it combines."""


def run(cfg: Config, workspace: Workspace) -> None:
    """Write masks/, overlays/, records/, volumes.csv and review.html, and list the studies that were refused."""
    scans = requested_scans(cfg)
    for line in scans.left_out_lines:
        log.warning("%s", line)
    model = requested_model(cfg, workspace)
    output = Path(cfg.predict.output)
    targets = [Target(scan=scan, output=output) for scan in scans.scans]
    if model.no_expected_dice:
        log.info("no expected Dice: %s", model.no_expected_dice)
    waiting = unsegmented(targets, model, cfg)
    if len(waiting) < len(targets):
        log.info("%d of %d studies are segmented already", len(targets) - len(waiting), len(targets))
    segment = partial(segment_study, model=model, min_expected_dice=cfg.predict.min_expected_dice)
    rows = map_cases(segment, waiting, num_workers=cfg.machine.num_workers, label="predict")
    refused = [row for row in rows if row["error"]]
    for name, reason in sorted(scans.unreadable.items()):
        refused.append({"name": name, "error": reason, "model": model.name, "model_md5": model.md5})
    errors = {row["name"]: row["error"] for row in refused}
    segmented = [target for target in targets if target.scan.name not in errors]
    dicom_seg_errors = write_dicom_segs(segmented, model, cfg) if cfg.predict.dicom_seg else {}
    table = write_volumes(output, errors=refused)
    write_review(output, table)
    names = {target.scan.name for target in targets} | errors.keys()
    _log_table([row for row in table.to_dict("records") if row["name"] in names], output=output)
    failures = [
        *_failures(errors, len(names), "studies cannot be segmented", kept="The others are done."),
        *_failures(dicom_seg_errors, len(segmented), "DICOM SEG could not be written", kept="The masks are written."),
    ]
    if failures:
        raise InputError("\n".join(failures))


def requested_scans(cfg: Config) -> ScanList:
    """Return the studies to segment; refuse files for DICOM SEG, and an output that is a data set or a file."""
    assert cfg.predict.input is not None  # see `prerequisites`
    output = Path(cfg.predict.output)
    scans = find_scans(Path(cfg.predict.input), pattern=cfg.predict.pattern, output=output)
    if has_images(output):
        raise InputError(
            f"predict.output: {output} is the folder of a data set, and predicted masks must not lie among its references; "
            "choose another folder, such as predict.output=predictions"
        )
    if output.exists() and not output.is_dir():
        raise InputError(f"predict.output: {output} is a file, and must be a folder; choose another one")
    if cfg.predict.dicom_seg:
        require_dicom_packages()
        files = [scan.name for scan in scans.scans if not scan.is_dicom]
        if files:
            raise InputError(
                f"predict.dicom_seg refers to the images of a DICOM series, and {len(files)} studies are files: "
                f"{listed(files)}\nChoose the series with predict.pattern, or segment the files by themselves."
            )
    return scans


def requested_model(cfg: Config, workspace: Workspace) -> Model:
    """Load the ensemble of predict.model; a registered model keeps the inference settings of its evaluation."""
    wanted, backend = cfg.predict.model, cfg.predict.backend
    if wanted is not None and wanted.startswith("models:/"):
        folder, version, _ = fetch_networks(wanted, cfg.mlflow, workspace, setting="predict.model")
        name = str(version)
    else:
        folder = workspace.model if wanted is None else Path(wanted)
        name = str(folder)
    model = load_model(
        folder,
        fold_index=cfg.fold.index,
        usage=read_usage(folder) or Usage.of(cfg.evaluate, precision=cfg.train.precision),
        device=torch.device("cpu") if backend == "onnx" else choose_device(cfg.machine.device),
        backend=backend,
        name=name,
    )
    log.info("%d networks of %s", len(model.predictor.networks), name)
    return model


def unsegmented(targets: Sequence[Target], model: Model, cfg: Config) -> list[Target]:
    """Return the studies without a mask of this input, model and rule; refuse masks of others, unless they are overwritten."""
    rule = rule_md5(model, min_expected_dice=cfg.predict.min_expected_dice)
    waiting: list[Target] = []
    foreign: list[Path] = []
    for target in targets:
        state = State.absent
        if target.mask.exists():
            with suppress(OSError):  # `segment_study` reads the study again and returns the error
                md5 = content_md5(target.scan.path)
                state = state_of(target, input_md5=md5, model_md5=model.md5, rule_md5=rule)
        waiting += [target] if state is not State.done else []
        foreign += [target.mask] if state is State.foreign else []
    if foreign and not cfg.predict.overwrite:
        listing = "\n".join(f"  {path}" for path in foreign[:10]) + ("\n  ..." if len(foreign) > 10 else "")
        raise InputError(
            f"{len(foreign)} masks are there already, of another model or input:\n{listing}\n"
            "Choose another predict.output, or replace them: predict.overwrite=true"
        )
    return waiting


def rule_md5(model: Model, *, min_expected_dice: float) -> str | None:
    """Return a hash of what gives a mask its verdict; None if nothing does."""
    if model.expected_dice is None:
        return None
    return md5_of_text(f"{asdict(model.expected_dice)} {min_expected_dice}")


def segment_study(target: Target, *, model: Model, min_expected_dice: float) -> Mapping[str, Any]:
    """Segment one study, write its mask, overlay and record, and return its row of volumes.csv, with any error."""
    scan = target.scan
    row: dict[str, Any] = {
        "name": scan.name,
        "mask": target.mask.relative_to(target.output).as_posix(),
        "input": str(scan.path),
        "model": model.name,
        "model_md5": model.md5,
        "error": None,
    }
    try:
        image = read_volume(scan.path)
        row["input_md5"] = content_md5(scan.path)
        prediction = predict(image, model=model)
    except InputError as error:
        return row | {"error": str(error)}
    except OSError as error:
        return row | {"error": f"{error.filename} cannot be read ({error.strerror}); check its permissions"}
    row |= results_of(prediction, scan, model=model, min_expected_dice=min_expected_dice)
    marks = [f"{prediction.volume_ml:.1f} mL", trust_note(row), "see the warnings" if row["warnings"] else ""]
    title = "    ".join(filter(None, [scan.name, *marks]))
    masks = zip(model.regions, region_masks(prediction.mask.array, model.regions), strict=True)
    regions = [RegionMasks(name=name, predicted=mask) for name, mask in masks]
    save_png(target.overlay, overlay_figure(image.array, regions, spacing_mm=image.geometry.spacing_mm, title=title))
    with new_mask(target, row) as temporary:
        write_volume(temporary, prediction.mask)
    return row


def results_of(prediction: Prediction, scan: Scan, *, model: Model, min_expected_dice: float) -> dict[str, Any]:
    """Return what the row of a study has of its prediction: measurements, trust in the mask, and warnings."""
    warnings = list(prediction.warnings)
    if kind_of(scan.description) is not None:  # the DICOM header names another sequence or plane
        other = f'the series description is "{scan.description}", and an axial T2-weighted series is expected'
        warnings.insert(0, other)
    estimate: dict[str, Any] = {}
    if (found := prediction.estimate) is not None:
        dices = {"expected_dice": _rounded(found.expected_dice), "dice_lower_bound": _rounded(found.lower_bound)}
        estimate = {**dices, "verdict": found.verdict(min_expected_dice=min_expected_dice)}
    return {
        "volume_ml": round(prediction.volume_ml, 3),
        **({"zones": prediction.zones} if prediction.zones else {}),
        "num_slices": prediction.num_slices,
        "mean_confidence": _rounded(prediction.mean_confidence),
        "fold_agreement": _rounded(prediction.inter_model_dice),
        **estimate,
        "rule_md5": rule_md5(model, min_expected_dice=min_expected_dice),
        "warnings": "; ".join(warnings),
    }


def trust_note(row: Mapping[str, Any]) -> str:
    """Return expected Dice, lower bound and verdict of a row as text; empty if it has none."""
    if row.get("expected_dice") is None:
        return ""
    return f"expected Dice {row['expected_dice']:.2f}, at least {row['dice_lower_bound']:.2f}: {row['verdict']}"


def write_dicom_segs(targets: Sequence[Target], model: Model, cfg: Config) -> dict[str, str]:
    """Write the missing DICOM SEG of masks; record and return the errors by name of the study, whose mask is kept."""

    def write(target: Target) -> str | None:
        error = None
        try:
            write_dicom_seg(
                target.dicom_seg,
                read_volume(target.mask),
                regions=model.regions,
                series=target.scan.path,
                model_name=model.name,
                model_md5=model.md5,
                note=trust_note(read_json(target.record)),
            )
        except InputError as failure:
            error = str(failure)
        note_dicom_seg(target, error=error)
        return error

    missing = [target for target in targets if not target.dicom_seg.exists()]
    errors = map_cases(write, missing, num_workers=cfg.machine.num_workers, label="DICOM SEG")
    return {target.scan.name: error for target, error in zip(missing, errors, strict=True) if error}


def _failures(errors: Mapping[str, str], num: int, what: str, *, kept: str) -> list[str]:
    """Return a text with the errors by study, if there are any."""
    listing = "\n".join(f"  {name}: {error}" for name, error in errors.items())
    return [f"{len(errors)} of {num} {what}:\n{listing}\n{kept}"] if errors else []


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _log_table(rows: Sequence[Mapping[Any, Any]], *, output: Path) -> None:
    """Log a table of the studies, for 80 columns, with their warnings."""
    has_estimates = any(not pd.isna(row["verdict"]) for row in rows)
    columns = SIZE_COLUMNS | (TRUST_COLUMNS if has_estimates else UNCERTAINTY_COLUMNS)
    line = "%-32s %8s %7s" + ("%14s%9s  %s" if has_estimates else "%12s%18s%s")
    log.info(line, "study", *(heading for heading, _ in columns.values()), "verdict" if has_estimates else "")
    for row in rows[:MAX_LOGGED_ROWS]:
        name = row["name"] if len(row["name"]) <= 32 else f"...{row['name'][-29:]}"
        if isinstance(row["error"], str):
            log.info("%-32s refused", name)
            continue
        numbers = [
            "-" if pd.isna(row[column]) else f"{row[column]:.{digits}f}" for column, (_, digits) in columns.items()
        ]
        log.info(line, name, *numbers, "" if pd.isna(row["verdict"]) else row["verdict"])
        for warning in str(row["warnings"] or "").split("; "):
            if warning:
                log.info("    %s", warning)
    if len(rows) > MAX_LOGGED_ROWS:
        log.info("and %d more", len(rows) - MAX_LOGGED_ROWS)
    log.info("masks, overlays, volumes.csv and review.html are in %s", output)
