"""The packed set returns every study unchanged, and neighbouring slices are of the same study."""

from pathlib import Path

import numpy as np
import pytest
import torch

from prostate_seg.segmentation.inference.network_input import measure_intensity, normalise, patches
from prostate_seg.segmentation.training.packing import is_packed, open_packed, pack
from tests.segmentation_helpers import disc_study, packed_discs


def test_studies_come_back_as_they_were(tmp_path: Path) -> None:
    packed_discs(tmp_path / "packed", ["a", "b", "c"])
    packed = open_packed(tmp_path / "packed")
    for seed, case_id in enumerate(["a", "b", "c"]):
        image, mask = disc_study(seed, num_slices=6 + seed % 2)
        slices = packed.slices_of([case_id])
        np.testing.assert_array_equal(packed.images[slices], image)
        np.testing.assert_array_equal(packed.masks[slices], mask)
        assert packed.cases[case_id].intensity == measure_intensity(image, clip=False)


def test_failed_packing_leaves_no_packed_set(tmp_path: Path) -> None:
    def read_case(case_id: str) -> tuple[np.ndarray, np.ndarray]:
        if case_id == "b":
            raise OSError("gone")
        return disc_study(0)

    with pytest.raises(OSError, match="gone"):
        pack(tmp_path / "packed", ["a", "b"], read_case=read_case, zscore=False)
    assert not is_packed(tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def test_writing_to_the_mapped_set_does_not_reach_the_disk(tmp_path: Path) -> None:
    packed = packed_discs(tmp_path / "packed", ["a"])
    packed.images[:] = 0
    assert open_packed(tmp_path / "packed").images.any()


def test_normalised_study_has_mean_0_and_sd_1() -> None:
    image, _ = disc_study(0)
    values = normalise(image, intensity=measure_intensity(image, clip=False))
    assert values.mean() == pytest.approx(0, abs=1e-5)
    assert values.std() == pytest.approx(1, abs=1e-5)


def test_zscore_clips_to_the_5th_and_95th_percentile() -> None:
    image = np.arange(101.0)
    intensity = measure_intensity(image, clip=True)
    assert (intensity.low, intensity.high) == (5.0, 95.0)
    assert normalise(image, intensity=intensity)[0] == pytest.approx((5 - 50) / intensity.sd)


def test_constant_study_does_not_divide_by_zero() -> None:
    assert measure_intensity(np.ones(5), clip=False).sd == 1.0


def test_neighbours_repeat_the_ends_of_the_study() -> None:
    rows = patches(torch.tensor([4, 6, 7]) - 1, depth=3, first=4, last=7)
    assert rows.tolist() == [[4, 4, 5], [5, 6, 7], [6, 7, 7]]


def test_patches_repeat_the_ends_of_the_study() -> None:
    rows = patches(torch.tensor([3, 5, 6]), depth=4, first=torch.full((3,), 4), last=torch.full((3,), 8))
    assert rows.tolist() == [[4, 4, 5, 6], [5, 6, 7, 8], [6, 7, 8, 8]]
