"""Duplicates are found by voxel hash, near-duplicates by thumbnail; studies of other patients are not."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from prostate_seg.imaging import fingerprint
from prostate_seg.imaging.fingerprint import (
    NEAR_DUPLICATE_SIMILARITY,
    THUMBNAIL_SHAPE,
    near_duplicates,
    similarity,
    thumbnail,
    voxels_sha1,
)
from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.imaging.image_io import read_volume, write_volume
from prostate_seg.phantom.settings import PhantomSettings
from prostate_seg.phantom.studies import make_phantom_case, phantom_case_ids

SHIFTS_MM = {"moved aside": (0, 3, 0), "moved up": (6, 0, 0), "moved in the plane": (0, 8, 8), "moved": (6, 8, 8)}


def changed(volume: Volume, kind: str) -> Volume:
    """Return a copy with typical modifications by other programs."""
    values, grid = volume.array.astype(np.float32), volume.geometry
    if kind == "noise":
        return replace(volume, array=values + np.random.default_rng(0).normal(0, 0.5 * values.std(), values.shape))
    if kind == "scale and gamma":
        return replace(volume, array=255 * (values / values.max()) ** 1.4)
    if kind in SHIFTS_MM:
        shift_vox = [mm / spacing for mm, spacing in zip(SHIFTS_MM[kind], grid.spacing_mm, strict=True)]
        return replace(volume, array=ndimage.shift(values, shift_vox, order=1, mode="nearest"))
    if kind == "half the pixels":
        z, y, x = grid.spacing_mm
        small = values[:, ::2, ::2]
        return Volume(array=small, geometry=replace(grid, shape_vox=small.shape, spacing_mm=(z, 2 * y, 2 * x)))
    margin = grid.shape_vox[1] // 10
    kept = values[1:-1, margin:-margin, margin:-margin]
    return Volume(array=kept, geometry=replace(grid, shape_vox=kept.shape))


@pytest.mark.parametrize("kind", ["noise", "scale and gamma", *SHIFTS_MM, "half the pixels", "cropped"])
def test_slightly_modified_copy_is_a_near_duplicate(shared_data: Path, kind: str) -> None:
    for path in ("11373_1001396.mha", "p158020_1.nii.gz"):
        image = read_volume(shared_data / "t2w" / "images" / path)
        pair = {"original": thumbnail(image), "copy": thumbnail(changed(image, kind))}
        assert near_duplicates(pair), path


def test_repeated_series_is_found_and_different_patients_are_far_apart(shared_data: Path) -> None:
    files = sorted((shared_data / "t2w" / "images").iterdir())
    thumbnails = {path.name.split(".")[0]: thumbnail(read_volume(path)) for path in files}
    assert list(near_duplicates(thumbnails)) == [("10795_1000811", "10795_1000811b")]
    others = [
        similarity(thumbnails[a], thumbnails[b])
        for a, b in combinations(thumbnails, 2)
        if (a, b) != ("10795_1000811", "10795_1000811b")
    ]
    assert max(others) < NEAR_DUPLICATE_SIMILARITY / 4


@pytest.mark.slow
def test_phantom_patients_are_no_near_duplicates() -> None:
    settings = PhantomSettings(
        num_patients=8,
        num_second_studies=0,
        field_of_view_mm=140.0,
        num_slices_range=(18, 24),
        gland_volume_range_ml=(25.0, 90.0),
        difficulty=0.3,
        scanners=("standard",),
    )
    images = [
        thumbnail(make_phantom_case(case_id, settings=settings, seed=12345).image)
        for case_id in phantom_case_ids(settings)
    ]
    assert max(similarity(a, b) for a, b in combinations(images, 2)) < NEAR_DUPLICATE_SIMILARITY / 2


def test_voxels_have_one_hash_in_every_file_format_and_integer_type(tmp_path: Path, cube_volume: Volume) -> None:
    whole = replace(cube_volume, array=np.rint(cube_volume.array).astype(np.int16))
    write_volume(tmp_path / "a.mha", whole)
    write_volume(tmp_path / "b.nii.gz", replace(whole, array=whole.array.astype(np.uint16), stored_orientation="RAS"))
    write_volume(tmp_path / "c.nrrd", replace(whole, array=whole.array.astype(np.float32)))
    hashes = {voxels_sha1(read_volume(tmp_path / name)) for name in ("a.mha", "b.nii.gz", "c.nrrd")}
    assert hashes == {voxels_sha1(whole)}
    other = whole.array.copy()
    other[3, 4, 5] += 1
    assert voxels_sha1(replace(whole, array=other)) not in hashes


def test_copy_at_the_threshold_passes_the_coarse_comparison() -> None:
    rng = np.random.default_rng(0)
    noise = [ndimage.gaussian_filter(rng.normal(size=THUMBNAIL_SHAPE), 1.2) for _ in range(2)]
    for weight in (0.66, 0.7):
        mixed = weight * noise[0] / noise[0].std() + np.sqrt(1 - weight**2) * noise[1] / noise[1].std()
        pair = {"a": np.rint(42 * noise[0] / noise[0].std()), "b": np.rint(42 * mixed)}
        thumbnails = {name: np.clip(one, -127, 127).astype(np.int8) for name, one in pair.items()}
        assert list(near_duplicates(thumbnails)) == [("a", "b")]


def test_empty_and_constant_thumbnails_are_no_pair() -> None:
    flat = np.zeros((16, 50, 50), dtype=np.int8)
    assert near_duplicates({}) == {}
    assert near_duplicates({"a": flat}) == {}
    assert near_duplicates({"a": flat, "b": flat}) == {}


def test_every_pair_is_compared_for_any_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    distinct = [np.random.default_rng(seed).integers(-127, 128, THUMBNAIL_SHAPE).astype(np.int8) for seed in range(4)]
    thumbnails = {f"{number:02d}": distinct[number % 4] for number in range(11)}
    copies = {(a, b) for a, b in combinations(thumbnails, 2) if int(a) % 4 == int(b) % 4}
    for blocks in ((256, 512), (2, 3), (3, 2), (1, 1)):
        monkeypatch.setattr(fingerprint, "BLOCK", blocks[0])
        monkeypatch.setattr(fingerprint, "WIDE_BLOCK", blocks[1])
        assert near_duplicates(thumbnails).keys() == copies
        for new in (["05"], ["00", "04", "10"], ["absent", "07"], []):
            found = near_duplicates(thumbnails, new=new)
            assert found.keys() == {pair for pair in copies if not set(new).isdisjoint(pair)}


def test_padding_of_small_studies_does_not_make_them_near_duplicates() -> None:
    spacing_mm = (4.0, 1.4, 1.4)
    grid = Geometry(shape_vox=(10, 50, 50), spacing_mm=spacing_mm, origin_mm=(0, 0, 0), direction=tuple(np.eye(3).flat))
    textures = [np.random.default_rng(seed).normal(size=grid.shape_vox) for seed in range(4)]
    blurred = [ndimage.gaussian_filter(texture, 2.5 / np.array(spacing_mm)) for texture in textures]
    studies = [Volume(array=600 + 100 * one / one.std(), geometry=grid) for one in blurred]
    assert (
        max(similarity(thumbnail(a), thumbnail(b)) for a, b in combinations(studies, 2)) < NEAR_DUPLICATE_SIMILARITY / 4
    )
