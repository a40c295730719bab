"""Text of the two pages, and which picture stands where."""

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from prostate_seg.imaging.geometry import Finding
from prostate_seg.phantom.settings import PhantomSettings
from prostate_seg.phantom.studies import PhantomCase, make_phantom_case
from prostate_seg.segmentation.training import augmentation
from scripts.gallery import quality_checks, steps
from scripts.gallery.quality_checks import Defect, planted_defects

DOCS = Path(__file__).parents[2] / "docs"
PICTURES = DOCS / "figures" / "gallery"
STEPS_PAGE, CHECKS_PAGE = DOCS / "gallery.md", DOCS / "quality_checks.md"
SEED = 3
Found = Sequence[tuple[Defect, Finding]]
"""Planted defects with their findings."""


def phantom(number: int = 1) -> PhantomCase:
    """Return a phantom: 1 of a standard scanner, 2 of one with dark images, 3 with a gland off the centre."""
    settings = PhantomSettings(
        num_patients=3,
        num_second_studies=0,
        field_of_view_mm=140.0,
        num_slices_range=(18, 24),
        gland_volume_range_ml=(30.0, 60.0),
        difficulty=0.3,
        scanners=("standard", "dark", "off_centre"),
    )
    return make_phantom_case(f"ph{number:03d}_1", settings=settings, seed=SEED)


STEPS_TEXT = """# Gallery: preprocessing and augmentation

`make gallery` draws this page with the functions that the stages call, on phantoms. Settings:
[reference](reference.md#preprocess); findings of the quality checks: [quality checks](quality_checks.md).

## Preprocessing

### Resampling

`preprocess.spacing_mm`: cubic B-spline for the image, with an anti-aliasing filter where pixels become larger; nearest
neighbour for the mask. The default, 3 x 0.8 x 0.8 mm, shows the contour as well as 0.5 mm with fewer voxels; at 2 mm it
is lost.

![The gland at four pixel spacings](figures/gallery/resampling.webp)

### Window

`preprocess.image_size` and `preprocess.crop`: the square that is kept of every slice (dashed). Centred on the image it
has to contain a gland that is off the centre; 80 voxels cut it (warning [gland_cut](quality_checks.md#gland_cut)).
`crop=mask` centres on the reference, which inference has not: every number from it is marked `oracle_crop`.

![Three windows on a study, and what each keeps](figures/gallery/window.webp)

### Intensity percentiles

`preprocess.intensity_percentiles` are mapped to 0 and 255. With the extremes, a few very bright voxels (upper left) make
the image dark; with 5 and 95, fat and vessels are saturated.

![One slice in 8 bits with three pairs of percentiles](figures/gallery/percentiles.webp)

### Normalisation

Training and inference shift and scale the intensities of each study to mean 0 and SD 1; `train.zscore` clips them to the
5th and 95th percentile before. A and B are phantoms of two scanners, on one grey scale.

![Two studies before and after normalisation](figures/gallery/zscore.webp)

### Regions

`target=zones`: the labels of the file become regions, one output of the network each; the whole gland is the union.

![Labels of a file and the three regions](figures/gallery/regions.webp)

### Back to the original grid

The network's probabilities are resampled linearly to the grid of the study and thresholded there, so that metrics are
measured on the original image. Drawn with 2 mm pixels, to show the difference.

![A mask on the network's grid, its probability and the mask on the study's grid](figures/gallery/restoring.webp)

## Augmentation

`train.augmentation=standard` (default), `coil`, `strong` or `none`. Spatial transforms are the same for the first three,
and move image and mask together; `strong` changes intensities more and more often, `coil` adds an endorectal coil. All
images are on one grey scale.
"""
STANDARD, STRONG = augmentation.INTENSITIES["standard"], augmentation.INTENSITIES["strong"]
SPATIAL_TEXT = {
    "rotation": f"Up to {augmentation.ROTATION_DEGREES:g} degrees.",
    "scale": f"By a factor from {augmentation.SCALE_RANGE[0]:g} to {augmentation.SCALE_RANGE[1]:g}.",
    "shift": f"Up to {augmentation.SHIFT_FRACTION:.0%} of the edge, in both directions.",
    "mirroring": "Left to right, half of the inputs: the gland is nearly symmetric.",
    "deformation": f"Elastic, with {augmentation.NUM_DEFORMATION_KNOTS} x {augmentation.NUM_DEFORMATION_KNOTS} control points; "
    f"{augmentation.DEFORMATION_PROBABILITY:.0%} of the inputs.",
}
INTENSITY_TEXT = {
    "contrast": f"A factor from {STANDARD.contrast_range[0]:g} to {STANDARD.contrast_range[1]:g} (strong: "
    f"{STRONG.contrast_range[0]:g} to {STRONG.contrast_range[1]:g}) about the lowest intensity.",
    "brightness": f"Added to all voxels: SD {STANDARD.brightness_sd:g} (strong: {STRONG.brightness_sd:g}).",
    "bias": "A smooth multiplicative field.",
    "gamma": f"A gamma curve with an exponent from {STANDARD.gamma_range[0]:g} to {STANDARD.gamma_range[1]:g} (strong: "
    f"{STRONG.gamma_range[0]:g} to {STRONG.gamma_range[1]:g}).",
    "noise": f"Gaussian, SD up to {STANDARD.noise_sd:g} (strong: {STRONG.noise_sd:g}).",
    "blur": f"Each voxel is mixed with its four neighbours; {augmentation.BLUR_PROBABILITY:.0%} of the inputs.",
    "coil": f"Brightening behind the gland, up to {1 + augmentation.COIL_GAIN:g} times; "
    f"{augmentation.COIL_PROBABILITY:.0%} of the inputs, with `coil` only.",
}
NAMES = {"bias": "Bias field", "deformation": "Elastic deformation", "coil": "Endorectal coil"}

CHECKS_TEXT = """# Quality checks: one defect each

`make gallery` plants each defect in a phantom and draws a slice before and after; the message is the one that
`stage=inspect` and `stage=preprocess` print. An error excludes the case (`data.on_bad_case=exclude`) or stops the stage
(`fail`); a warning is listed, in the report too. Contours are those of the mask's labels. Findings about headers and
DICOM series, which no slice shows: [image headers](data.md#image-headers), [DICOM](data.md#dicom).
"""


def findings(case: PhantomCase) -> Found:
    """Return every planted defect of a phantom with its finding."""
    return [(defect, defect.finding()) for defect in planted_defects(case)]


def pictures(defects: Found) -> dict[str, Callable[[Path], None]]:
    """Return the function that draws each picture, by file name without suffix."""
    case, dark, off_centre = phantom(1), phantom(2), phantom(3)
    found: dict[str, Callable[[Path], None]] = {
        "resampling": partial(steps.draw_resampling, case=case),
        "window": partial(steps.draw_window, case=off_centre),
        "percentiles": partial(steps.draw_percentiles, case=case),
        "zscore": partial(steps.draw_zscore, cases=[case, dark]),
        "regions": partial(steps.draw_regions, case=case),
        "restoring": partial(steps.draw_restoring, case=case),
    }
    found |= {name: partial(steps.draw_spatial, case=case, name=name) for name in SPATIAL_TEXT}
    found |= {name: partial(steps.draw_intensity, case=case, name=name) for name in INTENSITY_TEXT}
    found |= {f"augmentation_{kind}": partial(steps.draw_option, case=case, kind=kind) for kind in steps.options()}
    for defect, finding in defects:
        found[picture_name(defect, finding)] = partial(quality_checks.draw, defect=defect, case=case)
    return found


def picture_name(defect: Defect, finding: Finding) -> str:
    """Return the name of a defect's picture; a check with an error and a warning has two."""
    return f"check_{defect.check}" if finding.is_error else f"check_{defect.check}_warning"


def steps_page() -> str:
    """Return the text of docs/gallery.md."""
    parts = [STEPS_TEXT]
    for name, sentence in (SPATIAL_TEXT | INTENSITY_TEXT).items():
        title = NAMES.get(name, name.capitalize())
        parts.append(f"### {title}\n\n{sentence}\n\n![{title}: the input and examples](figures/gallery/{name}.webp)\n")
    parts.append("### All together\n")
    parts += [
        f"`train.augmentation={kind}`, six inputs of a batch:\n\n"
        f"![Examples of {kind}](figures/gallery/augmentation_{kind}.webp)\n"
        for kind in steps.options()
    ]
    return "\n".join(parts)


def checks_page(found: Found) -> str:
    """Return the text of docs/quality_checks.md."""
    parts = [CHECKS_TEXT]
    for title, is_error in (("Errors", True), ("Warnings", False)):
        parts.append(f"## {title}\n")
        parts += [_section(defect, finding) for defect, finding in found if finding.is_error == is_error]
    return "\n".join(parts)


def _section(defect: Defect, finding: Finding) -> str:
    lines = f"{defect.check}: {finding.message}".splitlines()
    message = "\n".join(textwrap.indent(textwrap.fill(line, 96, subsequent_indent="  "), "    ") for line in lines)
    suffix = " (mild)" if defect.check == "not_compact" and not finding.is_error else ""
    return (
        f"### {defect.check}{suffix}\n\n{defect.sentence}\n\n"
        f"![{defect.check}: a slice before and after](figures/gallery/{picture_name(defect, finding)}.webp)\n\n"
        f"{message}\n"
    )


def write_gallery() -> int:
    """Write pages and pictures; pictures of former checks are removed."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    STEPS_PAGE.write_text(steps_page(), encoding="utf-8")
    defects = findings(phantom())
    CHECKS_PAGE.write_text(checks_page(defects), encoding="utf-8")
    drawn = pictures(defects)
    for former in set(PICTURES.glob("*.webp")) - {PICTURES / f"{name}.webp" for name in drawn}:
        former.unlink()
    for name, draw in drawn.items():
        draw(PICTURES / f"{name}.webp")
    return len(drawn)
