"""One planted defect per quality check: the finding is that of the package, the picture shows a slice before and after."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from prostate_seg.data.cases import Case
from prostate_seg.imaging.geometry import Finding, Spacing, Volume, bounding_box
from prostate_seg.imaging.image_io import write_volume
from prostate_seg.imaging.quality import check_case, check_slice_planes, check_zones
from prostate_seg.phantom.studies import PhantomCase
from prostate_seg.stages.preprocess import preprocess_case
from prostate_seg.steps.dataset import findings_of_data_set
from scripts.gallery.drawing import Panel, write_panels
from scripts.gallery.steps import default_settings

THICKNESS_VOX = 7
"""Pixels of a row that become one slice of a sagittal series."""
MAX_DRAWN_LABEL = 1000
"""Larger values are intensities, whose contours are not drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """A case with one planted defect."""

    check: str
    sentence: str
    """What was planted."""
    image: Volume
    mask: Volume
    labels: tuple[int, ...] | None = None
    """As in `check_case`."""
    allow_others: bool = True
    view: str = "axial"
    titles: tuple[str, str] = ("as it should be", "with the defect")
    window_mm: float | None = None
    """Edge length of a centred square drawn on the slice."""
    find: Callable[["Defect"], Sequence[Finding]] | None = None
    """Checks that compare cases or need a window; None for `check_case`."""

    def finding(self) -> Finding:
        """Return the finding of this defect's check; an AssertionError if the package finds something else."""
        find = self.find or _check
        found = [one for one in find(self) if one.check == self.check]
        assert found, f"{self.check} was not found: {self.sentence}"
        return found[0]


def _check(defect: Defect) -> Sequence[Finding]:
    checked = check_case("case", defect.image, defect.mask, labels=defect.labels, allow_others=defect.allow_others)
    return checked.findings


def planted_defects(case: PhantomCase) -> list[Defect]:
    """Return a defect for each check, errors first; the phantom has no finding before."""
    return [
        *_image_errors(case),
        *_mask_errors(case),
        *_image_warnings(case),
        *_mask_warnings(case),
        _cut_image(case),
        *_of_others(case),
    ]


def _image_errors(case: PhantomCase) -> list[Defect]:
    image, mask = case.image, case.mask
    middle = _middle(bounding_box(mask.array > 0)[0])
    x_mm, y_mm, z_mm = mask.geometry.origin_mm
    elsewhere = replace(mask.geometry, origin_mm=(x_mm + 12.0, y_mm, z_mm))
    holed = image.array.astype(np.float32)
    holed[middle, 60:90, 60:110] = np.nan
    two = replace(image.geometry, shape_vox=(2, *image.geometry.shape_vox[1:]))
    few_images, few_masks = (replace(one, array=one.array[middle : middle + 2], geometry=two) for one in (image, mask))
    planted = [
        ("few_slices", "All slices but two are left out.", few_images, few_masks),
        ("nan", "Part of a slice is not a number.", replace(image, array=holed), mask),
        ("constant_image", "Every voxel has one value.", replace(image, array=np.full_like(image.array, 7)), mask),
        (
            "grids_differ",
            "The mask's origin is 12 mm further to the left, as after an export on another series.",
            image,
            replace(mask, geometry=elsewhere),
        ),
    ]
    return [
        Defect(
            check=check,
            sentence=sentence,
            image=changed,
            mask=its_mask,
            view="coronal" if check == "few_slices" else "axial",
        )
        for check, sentence, changed, its_mask in planted
    ]


def _mask_errors(case: PhantomCase) -> list[Defect]:
    gland = (case.mask.array > 0).astype(np.uint8)
    columns = np.arange(gland.shape[2])
    lesion = np.where(_ball(case.mask, radius_mm=7.0), 3, case.mask.array).astype(np.uint8)
    planted = [
        ("mask_is_image", "The mask file is a copy of the image.", case.image.array),
        (
            "label_not_integer",
            "The mask was interpolated linearly, so that its border has fractions.",
            ndimage.uniform_filter1d(gland.astype(np.float32), 3, axis=1),
        ),
        ("label_out_of_range", "A label 255 was stored in a signed 8-bit file.", -gland.astype(np.int16)),
        ("too_many_labels", "The gland has twelve labels.", gland * (1 + columns // 4 % 12).astype(np.uint8)),
        ("empty_mask", "No voxel is marked.", np.zeros_like(gland)),
        ("not_compact", "The mask leaks to the front, beyond the gland.", _leaked(gland)),
    ]
    absent = "`data.whole_gland_labels=[5]`, and the mask has 1 and 2."
    unnamed = "A lesion has a label without a name, with `target=zones`."
    return [
        *(_with_mask(case, check, sentence, array) for check, sentence, array in planted),
        _with_mask(case, "wanted_label_absent", absent, case.mask.array, labels=(5,)),
        _with_mask(case, "unnamed_label", unnamed, lesion, labels=(1, 2), allow_others=False),
    ]


def _with_mask(case: PhantomCase, check: str, sentence: str, array: np.ndarray, **arguments: Any) -> Defect:
    """Return a defect of the mask alone."""
    return Defect(check=check, sentence=sentence, image=case.image, mask=replace(case.mask, array=array), **arguments)


def _leaked(gland: np.ndarray) -> np.ndarray:
    """Return a gland that reaches the front of the image."""
    inside, rows, columns = bounding_box(gland > 0)
    leaked = gland.copy()
    leaked[inside, : rows.start + 12, columns.start + 12 : columns.start + 30] = 1
    return leaked


def _tongue(gland: np.ndarray) -> np.ndarray:
    """Return a gland with a narrow protrusion to the front."""
    inside, rows, columns = bounding_box(gland > 0)
    first, middle = rows.start - (rows.stop - rows.start) // 2, _middle(columns)
    tongue = gland.copy()
    tongue[inside.start + 2 : inside.stop - 2, first : _middle(rows), middle - 6 : middle + 6] = 1
    return tongue


def _ball(mask: Volume, *, radius_mm: float) -> np.ndarray:
    """Return the voxels within a distance of the gland's centre, bool [Z, Y, X]."""
    index = np.indices(mask.array.shape)
    centre = np.argwhere(mask.array > 0).mean(axis=0)
    offsets_mm = (index - centre[:, None, None, None]) * np.array(mask.geometry.spacing_mm)[:, None, None, None]
    return np.sqrt((offsets_mm**2).sum(axis=0)) <= radius_mm


def _middle(extent: slice) -> int:
    return int(extent.start + extent.stop) // 2


def _image_warnings(case: PhantomCase) -> list[Defect]:
    image, mask = case.image, case.mask
    order = [*range(0, len(image.array), 2), *range(1, len(image.array), 2)]
    sagittal = {"image": _sagittal(image, order=1), "mask": _sagittal(mask, order=0)}
    return [
        Defect(
            check="slices_out_of_order",
            sentence="Even slices come before odd ones, as in an interleaved acquisition sorted by time.",
            image=replace(image, array=image.array[order]),
            mask=replace(mask, array=mask.array[order]),
            view="coronal",
        ),
        Defect(check="not_axial", sentence="A sagittal series: its slices are thick from right to left.", **sagittal),
        Defect(
            check="slice_plane_differs",
            sentence="One case of six is a sagittal series.",
            find=_planes_beside_axial,
            **sagittal,
        ),
    ]


def _sagittal(volume: Volume, *, order: int) -> Volume:
    """Return a volume with thick slices along x and thin ones along z, on about the same extent."""
    thin = ndimage.zoom(volume.array, (THICKNESS_VOX, 1, 1), order=order, grid_mode=True, mode="nearest")
    num = thin.shape[2] // THICKNESS_VOX
    blocks = thin[..., : num * THICKNESS_VOX].reshape(*thin.shape[:2], num, THICKNESS_VOX)
    array = (blocks.mean(axis=3) if order else blocks[..., THICKNESS_VOX // 2]).astype(volume.array.dtype)
    z_mm, y_mm, x_mm = volume.geometry.spacing_mm
    spacing_mm = z_mm / THICKNESS_VOX, y_mm, x_mm * THICKNESS_VOX
    return replace(volume, array=array, geometry=replace(volume.geometry, shape_vox=array.shape, spacing_mm=spacing_mm))


def _planes_beside_axial(defect: Defect) -> list[Finding]:
    axial: Spacing = (3.0, 0.5, 0.5)
    spacings = {f"other {number}": axial for number in range(5)}
    return check_slice_planes({"case": defect.image.geometry.spacing_mm, **spacings})


def _mask_warnings(case: PhantomCase) -> list[Defect]:
    gland = (case.mask.array > 0).astype(np.uint8)
    inside, rows, columns = bounding_box(gland > 0)
    middle = _middle(inside)
    stray, gap = gland.copy(), gland.copy()
    stray[middle - 1 : middle + 2, rows.start - 25 : rows.start - 15, columns.start - 20 : columns.start - 8] = 1
    gap[[middle, middle + 2]] = 0
    holed = np.where(_ball(case.mask, radius_mm=5.0), 0, gland).astype(np.uint8)
    ignored = np.where(_ball(case.mask, radius_mm=8.0), 255, gland).astype(np.uint8)
    small = _ball(case.mask, radius_mm=13.0).astype(np.uint8)
    milder = "A tongue of the mask reaches to the front: a milder form is a warning."
    return [
        _with_mask(case, "several_components", "A second, small region is marked.", stray),
        _with_mask(case, "holes", "A ball inside the gland is not marked.", holed),
        _with_mask(case, "gap", "Two slices were not drawn.", gap, view="coronal"),
        _with_mask(case, "not_compact", milder, _tongue(gland)),
        _with_mask(case, "label_255", "Part of the gland has label 255 beside 1.", ignored),
        _with_mask(case, "implausible_volume", "Only the middle of the gland is marked, 9 mL.", small),
    ]


def _cut_image(case: PhantomCase) -> Defect:
    """Return a case whose image ends inside the gland."""
    first = _middle(bounding_box(case.mask.array > 0)[1])
    slices, rows, columns = case.image.array.shape
    behind = case.image.geometry.window((0, first, 0), (slices, rows - first, columns))
    return Defect(
        check="mask_touches_border",
        sentence="The front of the image was cut off, through the gland.",
        image=replace(case.image, array=case.image.array[:, first:], geometry=behind),
        mask=replace(case.mask, array=(case.mask.array[:, first:] > 0).astype(np.uint8), geometry=behind),
    )


def _of_others(case: PhantomCase) -> list[Defect]:
    image, mask = case.image, case.mask
    central = np.where(mask.array == 1, mask.array, 0).astype(np.uint8)
    return [
        Defect(
            check="zone_missing",
            sentence="Five other masks have labels 1 and 2, and this only 1.",
            image=image,
            mask=replace(mask, array=central),
            find=lambda defect: check_zones({"case": {1}, **{f"other {number}": {1, 2} for number in range(5)}}),
        ),
        Defect(
            check="gland_cut",
            sentence="`preprocess.image_size=48`: the window, 38 mm wide, is smaller than the gland.",
            image=image,
            mask=mask,
            window_mm=48 * 0.8,
            find=_with_a_small_window,
        ),
        Defect(
            check="identical_image",
            sentence="One image file has two names; `identical_mask` is the same for masks.",
            image=image,
            mask=mask,
            titles=("10001_1", "10002_1"),
            find=_with_a_copy,
        ),
    ]


def _with_a_small_window(defect: Defect) -> list[Finding]:
    settings = default_settings(image_size=48)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = Case(
            case_id="case", patient_id="case", study_id="", image=folder / "image.nii.gz", mask=folder / "mask.nii.gz"
        )
        write_volume(folder / "image.nii.gz", defect.image)
        write_volume(folder / "mask.nii.gz", defect.mask)
        for kind in ("images", "masks"):
            (folder / kind).mkdir()
        _, quality = preprocess_case(case, data=folder, folder=folder, settings=settings, allow_others=True)
    return quality.findings


def _with_a_copy(defect: Defect) -> list[Finding]:
    md5s = {"10001_1": {"image": "0cc175b9"}, "10002_1": {"image": "0cc175b9"}}
    return findings_of_data_set({}, md5s=md5s, spacings_mm={}, labels=None)


# --- pictures -------------------------------------------------------------------------------------------------------


def draw(path: Path, defect: Defect, case: PhantomCase) -> None:
    """Write the phantom and the planted defect beside each other."""
    before, after = defect.titles
    axis = ("axial", "coronal").index(defect.view)
    write_panels(
        path,
        [
            _panel(before, case.image, case.mask, axis=axis),
            _panel(after, defect.image, defect.mask, axis=axis, window_mm=defect.window_mm),
        ],
    )


def _panel(title: str, image: Volume, mask: Volume, *, axis: int, window_mm: float | None = None) -> Panel:
    """Return the slice along z or y through the gland's middle, with the labels of its mask."""
    is_label_map = np.abs(mask.array).max() < MAX_DRAWN_LABEL
    gland = mask.array != 0 if is_label_map and mask.array.any() else np.ones_like(mask.array, dtype=bool)
    index = round(float(np.argwhere(gland).mean(axis=0)[axis]))
    pixels, labels = (volume.array.take(index, axis=axis) for volume in (image, mask))
    edges_mm = np.delete(image.geometry.spacing_mm, axis)
    if axis == 1:
        pixels, labels = pixels[::-1], labels[::-1]
    _, y, x = image.geometry.to_index(mask.geometry.to_world((0.0, 0.0, 0.0)))
    window = None
    if window_mm is not None:
        height, width = window_mm / edges_mm
        window = (pixels.shape[0] - height) / 2, (pixels.shape[1] - width) / 2, height, width
    return Panel(
        title=title,
        pixels=pixels.astype(float),
        labels=labels if is_label_map else None,
        aspect=float(edges_mm[0] / edges_mm[1]),
        shift_vox=(y, x) if axis == 0 else (0.0, x),
        square_vox=window,
    )
