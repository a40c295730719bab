"""Loading of a case with all its checks, and the handling of bad cases."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prostate_seg.common.errors import InputError, VolumeError
from prostate_seg.data.cases import Case
from prostate_seg.imaging.geometry import Finding, Volume
from prostate_seg.imaging.image_io import read_volume
from prostate_seg.imaging.labels import as_labels
from prostate_seg.imaging.quality import CaseQuality, check_case

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedCase:
    """A readable case, on the image's grid."""

    image: Volume
    mask: Volume


def load_case(
    case: Case, *, labels: Sequence[int] | None, allow_others: bool = True
) -> tuple[LoadedCase | None, CaseQuality]:
    """Read and check image and mask; a bad case gives None and the findings, never an exception; labels as `check_case`."""
    image, mask, quality = check_files(case, labels=labels, allow_others=allow_others)
    if image is None or mask is None or any(finding.is_error for finding in quality.findings):
        return None, quality
    return LoadedCase(image=image, mask=mask), quality


def check_files(
    case: Case, *, labels: Sequence[int] | None, allow_others: bool = True
) -> tuple[Volume | None, Volume | None, CaseQuality]:
    """Return image and mask, None where absent or unreadable, and all findings on them."""
    volumes: dict[str, Volume] = {}
    unreadable = []
    for kind, path, read in (("image", case.image, read_volume), ("mask", case.mask, read_mask)):
        if path is not None:
            try:
                volumes[kind] = read(path)
            except VolumeError as error:
                unreadable.append(Finding(error.check, f"{path.name}: {error}", is_error=True, case_id=case.case_id))
    image, mask = volumes.get("image"), volumes.get("mask")
    checked = check_case(case.case_id, image, mask, labels=labels, allow_others=allow_others)
    return image, mask, replace(checked, findings=[*unreadable, *checked.findings])


def read_mask(path: Path) -> Volume:
    """Read a mask, with integer labels unless a value is no whole number, which `quality.check_case` refuses."""
    return as_labels(read_volume(path))


def refuse_or_exclude(findings: Sequence[Finding], *, num_usable: int, exclude: bool) -> list[str]:
    """Log the warnings, and return the ids of the bad cases.

    Raises:
        InputError: If there are bad cases and `exclude` is false, or no case is usable; the text has every reason.
    """
    for finding in findings:
        if not finding.is_error:
            log.warning("warning: %s: %s: %s", finding.case_id, finding.check, finding.message)
    errors = [finding for finding in findings if finding.is_error]
    bad = sorted({finding.case_id for finding in errors})
    listing = "\n".join(f"  {finding.case_id}: {finding.check}: {finding.message}" for finding in errors)
    if bad and not exclude:
        raise InputError(
            f"{len(bad)} of {len(bad) + num_usable} cases cannot be used:\n{listing}\n"
            "Fix them, list them under data.exclude, or go on without them: data.on_bad_case=exclude"
        )
    if num_usable == 0:
        raise InputError(f"no usable case is left; fix the data, or correct data.exclude\n{listing}".rstrip())
    if bad:
        log.warning("excluded %d cases that cannot be used:\n%s", len(bad), listing)
    return bad
