"""The gallery has every quality check and augmentation, its texts are those of the code, and its pictures are small."""

import re

from prostate_seg.imaging.quality import check_case
from scripts.gallery import pages, steps

MAX_BYTES = 1_500_000


def test_every_check_is_found_where_its_defect_was_planted_and_the_page_is_current() -> None:
    case = pages.phantom()
    assert check_case("case", case.image, case.mask, labels=None).findings == []
    defects = pages.findings(case)
    assert pages.CHECKS_PAGE.read_text(encoding="utf-8") == pages.checks_page(defects), "run make gallery"
    named = set(re.findall(r"`(\w+)`", (check_case.__doc__ or "").partition("Args:")[0]))
    no_checks = {"Volume"}  # `Volume.warnings` are those of headers, see docs/data.md
    assert named - no_checks <= {defect.check for defect, _ in defects}
    names = {f"check_{defect.check}{'' if finding.is_error else '_warning'}" for defect, finding in defects}
    assert names <= {path.stem for path in pages.PICTURES.iterdir()}


def test_page_of_the_steps_is_current_and_every_augmentation_has_a_picture() -> None:
    text = pages.STEPS_PAGE.read_text(encoding="utf-8")
    assert text == pages.steps_page(), "run make gallery"
    for name in [
        *steps.SPATIAL,
        *steps.intensity_transforms("strong"),
        *map("augmentation_{}".format, steps.options()),
    ]:
        assert f"figures/gallery/{name}.webp" in text


def test_pictures_are_small() -> None:
    assert sum(path.stat().st_size for path in pages.PICTURES.iterdir()) < MAX_BYTES
