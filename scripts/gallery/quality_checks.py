"""One planted defect per quality check: the finding is that of the package, the picture shows a slice before and after."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from prostate_seg.data.cases import Case
from prostate_seg.imaging.geometry import Spacing, Volume, bounding_box
from prostate_seg.imaging.image_io import write_volume
from prostate_seg.imaging.preprocessing import PreprocessSettings
from prostate_seg.imaging.quality import Finding, check_case, check_slice_planes, check_zones
from prostate_seg.phantom.studies import PhantomCase
from prostate_seg.stages.common import findings_of_data_set
from prostate_seg.stages.preprocess import preprocess_case
from scripts.gallery.drawing import Panel, write_panels

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
    return [*_image_errors(case), *_mask_errors(case), *_image_warnings(case), *_mask_warnings(case), *_of_others(case)]


def _image_errors(case: PhantomCase) -> list[Defect]:
    image, mask = case.image, case.mask
    middle = int((mask.array > 0).sum(axis=(1, 2)).argmax())
    holed = image.array.astype(np.float32)
    holed[middle, 60:90, 60:110] = np.nan
    two = replace(image.geometry, shape_vox=(2, *image.geometry.shape_vox[1:]))
    return [
        Defect(
            check="few_slices",
            sentence="All slices but two are left out.",
            image=replace(image, array=image.array[middle : middle + 2], geometry=two),
            mask=replace(mask, array=mask.array[middle : middle + 2], geometry=two),
            view="coronal",
        ),
        Defect(
            check="nan",
            sentence="Part of a slice is not a number.",
            image=replace(image, array=holed),
            mask=mask,
        ),
        Defect(
            check="constant_image",
            sentence="Every voxel has one value.",
            image=replace(image, array=np.full_like(image.array, 7)),
            mask=mask,
        ),
        Defect(
            check="grids_differ",
            sentence="The mask's origin is 12 mm further to the left, as after an export on another series.",
            image=image,
            mask=replace(mask, geometry=_shifted(mask, x_mm=12.0)),
        ),
    ]


def _shifted(mask: Volume, *, x_mm: float):  # type: ignore[no-untyped-def]
    x, y, z = mask.geometry.origin_mm
    return replace(mask.geometry, origin_mm=(x + x_mm, y, z))


def _mask_errors(case: PhantomCase) -> list[Defect]:
    image, mask = case.image, case.mask
    gland = (mask.array > 0).astype(np.float32)
    smooth = gland.copy()
    smooth[:, 1:-1] = (gland[:, :-2] + gland[:, 1:-1] + gland[:, 2:]) / 3
    _, rows, columns = bounding_box(gland > 0)
    leaked = gland.astype(np.uint8)
    leaked[gland.any(axis=(1, 2)), : rows.start + 12, columns.start + 12 : columns.start + 30] = 1
    steps = np.where(gland > 0, 1 + np.arange(gland.shape[2]) // 4 % 12, 0).astype(np.uint8)
    lesion = mask.array.copy()
    lesion[_ball(mask, radius_mm=7.0)] = 3

    def planted(check: str, sentence: str, array: np.ndarray, **arguments) -> Defect:  # type: ignore[no-untyped-def]
        return Defect(check=check, sentence=sentence, image=image, mask=replace(mask, array=array), **arguments)

    return [
        planted("mask_is_image", "The mask file is a copy of the image.", image.array),
        planted("label_not_integer", "The mask was interpolated linearly, so that its border has fractions.", smooth),
        planted("label_out_of_range", "A label 255 was stored in a signed 8-bit file.", -gland.astype(np.int16)),
        planted("too_many_labels", "The gland has twelve labels.", steps),
        planted("empty_mask", "No voxel is marked.", np.zeros_like(mask.array)),
        planted(
            "wanted_label_absent", "`data.whole_gland_labels=[5]`, and the mask has 1 and 2.", mask.array, labels=(5,)
        ),
        planted(
            "unnamed_label",
            "A lesion has a label without a name, with `target=zones`.",
            lesion,
            labels=(1, 2),
            allow_others=False,
        ),
        planted("not_compact", "The mask leaks to the front, beyond the gland.", leaked),
    ]


def _ball(mask: Volume, *, radius_mm: float) -> np.ndarray:
    """Return the voxels within a distance of the gland's centre, bool [Z, Y, X]."""
    index = np.indices(mask.array.shape)
    centre = np.argwhere(mask.array > 0).mean(axis=0)
    offsets_mm = (index - centre[:, None, None, None]) * np.array(mask.geometry.spacing_mm)[:, None, None, None]
    return np.sqrt((offsets_mm**2).sum(axis=0)) <= radius_mm


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
    image, mask = case.image, case.mask
    gland = (mask.array > 0).astype(np.uint8)
    inside, rows, columns = bounding_box(gland > 0)
    middle = (inside.start + inside.stop) // 2
    stray, holed, gap, tongue = (gland.copy() for _ in range(4))
    stray[middle - 1 : middle + 2, rows.start - 25 : rows.start - 15, columns.start - 20 : columns.start - 8] = 1
    holed[_ball(mask, radius_mm=5.0)] = 0
    gap[[middle, middle + 2]] = 0
    width = (rows.stop - rows.start) // 2
    tongue[inside.start + 2 : inside.stop - 2, rows.start - width : _middle(rows), _middle(columns) - 6 :][
        :, :, :12
    ] = 1
    ignored = np.where(_ball(mask, radius_mm=8.0), 255, gland).astype(np.uint8)
    tiny = _ball(mask, radius_mm=13.0).astype(np.uint8)
    cut = slice((rows.start + rows.stop) // 2, None)
    shape = (len(gland), gland.shape[1] - cut.start, gland.shape[2])
    below = image.geometry.window((0, cut.start, 0), shape)

    def planted(check: str, sentence: str, array: np.ndarray, **arguments) -> Defect:  # type: ignore[no-untyped-def]
        return Defect(check=check, sentence=sentence, image=image, mask=replace(mask, array=array), **arguments)

    return [
        planted("several_components", "A second, small region is marked.", stray),
        planted("holes", "A ball inside the gland is not marked.", holed),
        planted("gap", "Two slices were not drawn.", gap, view="coronal"),
        planted("not_compact", "A tongue of the mask reaches to the front: a milder form is a warning.", tongue),
        planted("label_255", "Part of the gland has label 255 beside 1.", ignored),
        planted("implausible_volume", "Only the middle of the gland is marked, 9 mL.", tiny),
        Defect(
            check="mask_touches_border",
            sentence="The front of the image was cut off, through the gland.",
            image=replace(image, array=image.array[:, cut], geometry=below),
            mask=replace(mask, array=gland[:, cut], geometry=below),
        ),
    ]


def _middle(extent: slice) -> int:
    return int(extent.start + extent.stop) // 2


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
    settings = PreprocessSettings(
        spacing_mm=(3.0, 0.8, 0.8),
        image_size=48,
        crop="center",
        to_8bit=True,
        intensity_percentiles=(0.5, 99.5),
        whole_gland_labels=None,
        zones={},
    )
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
    md5s = {"image": {"10001_1": "0cc175b9", "10002_1": "0cc175b9"}}
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
