"""Inference: the same mask in world space for any storage of the study, and the same bits on any number of cores."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from prostate_seg.common.errors import InputError
from prostate_seg.common.progress import map_cases
from prostate_seg.imaging.geometry import Volume
from prostate_seg.imaging.image_io import read_volume, write_volume
from prostate_seg.segmentation.inference.inference import (
    Predictor,
    keep_largest_component,
    network_probabilities,
    predict_probability,
    segment,
)
from prostate_seg.segmentation.inference.network_threads import network_threads
from prostate_seg.segmentation.networks.networks import build_network
from prostate_seg.segmentation.networks.settings import ModelConfig
from prostate_seg.segmentation.settings import Precision
from tests.imaging_helpers import DEFAULT, dice, real_study, rotate, rotation
from tests.segmentation_helpers import model_2d, model_3d, predictor


class BrightVoxels(nn.Module):
    """A network that segments voxels brighter than the mean, in the middle slice of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 20 * x if x.ndim == 5 else 20 * x[:, x.shape[1] // 2, None]


class ConstantLogit(nn.Module):
    """A network that returns one logit everywhere."""

    def __init__(self, logit: float):
        super().__init__()
        self.logit = logit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x[:, :1], self.logit)


class LeftHalf(nn.Module):
    """A network that segments the left half of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.full_like(x[:, :1], -20.0)
        logits[..., : x.shape[-1] // 2] = 20.0
        return logits


class Ramp(nn.Module):
    """A network whose probability is the position in its patch: 1/D in the first slice, nearly 1 in the last of D."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        depth = x.shape[2]
        probability = (torch.arange(1, depth + 1) / depth).clamp(max=1 - 1e-6)
        return torch.logit(probability)[:, None, None].expand_as(x)


class DependsOnThreads(nn.Module):
    """A network whose output depends on the number of threads and on the batch size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1] + 1e-3 * torch.get_num_threads() + 1e-4 * len(x)


class RunsOutOfMemory(nn.Module):
    """A network that runs out of memory above a batch size."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return 20 * x


def bright_mask(image: Volume) -> np.ndarray:
    ready = predictor(BrightVoxels(), preprocess=replace(DEFAULT, spacing_mm=(3.0, 0.45, 0.45)))
    return segment(image, None, predictor=ready).label_map > 0


@pytest.mark.parametrize("model", [model_2d(), model_2d(num_slices=3), model_3d(), model_3d(num_slices=16)])
@pytest.mark.parametrize("num_slices", [3, 9, 40])
def test_probabilities_belong_to_their_slices(model: ModelConfig, num_slices: int) -> None:
    image = torch.linspace(-1, 1, num_slices)[:, None, None].expand(num_slices, 8, 8)
    probability = predict_probability(image, predictor=predictor(BrightVoxels(), model=model))[0]
    np.testing.assert_allclose(probability, torch.sigmoid(20 * image).numpy(), atol=1e-6)


@pytest.mark.parametrize("num_slices", [1, 15, 16])
def test_padding_of_a_study_shorter_than_the_patch_is_dropped(num_slices: int) -> None:
    image = torch.zeros(num_slices, 4, 4)
    probability = predict_probability(image, predictor=predictor(Ramp(), model=model_3d(num_slices=16)))[0]
    np.testing.assert_allclose(probability[:, 0, 0], np.arange(1, num_slices + 1) / 16, atol=2e-6)


def test_two_patches_of_a_study_just_deeper_than_the_patch_are_averaged_where_they_overlap() -> None:
    probability = predict_probability(torch.zeros(5, 4, 4), predictor=predictor(Ramp(), model=model_3d(num_slices=4)))[
        0
    ]
    expected = [1 / 4, (2 + 1) / 8, (3 + 2) / 8, (4 + 3) / 8, 1]
    np.testing.assert_allclose(probability[:, 0, 0], expected, atol=2e-6)


@pytest.mark.parametrize(("num_slices", "starts"), [(3, [0]), (4, [0]), (5, [0, 1]), (8, [0, 2, 4]), (9, [0, 2, 4, 5])])
def test_windows_overlap_by_half_and_the_last_ends_with_the_study(num_slices: int, starts: list[int]) -> None:
    found: list[float] = []

    class FirstSlice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found.extend(x[:, 0, 0, 0, 0].tolist())
            return x

    image = torch.arange(float(num_slices))[:, None, None].expand(num_slices, 4, 4)
    predict_probability(image, predictor=replace(predictor(FirstSlice(), model=model_3d()), num_threads=1))
    assert found == starts


def test_padding_of_a_short_study_repeats_its_last_slice_as_in_training() -> None:
    class DeepestSlice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 20 * x[:, :, -1:].expand_as(x)

    image = torch.tensor([-1.0, -1.0, 1.0])[:, None, None].expand(3, 4, 4)
    np.testing.assert_allclose(
        predict_probability(image, predictor=predictor(DeepestSlice(), model=model_3d()))[0], 1.0, atol=1e-6
    )


@pytest.mark.parametrize(("channel", "neighbours"), [(0, [0, 0, 1, 2]), (2, [1, 2, 3, 3])])
def test_end_slices_are_their_own_outer_neighbours(channel: int, neighbours: list[int]) -> None:
    class Channel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, channel, None]

    image = torch.arange(4.0)[:, None, None].expand(4, 4, 4)
    probability = predict_probability(image, predictor=predictor(Channel(), model=model_2d(num_slices=3)))[0]
    np.testing.assert_allclose(probability, torch.sigmoid(image[neighbours]).numpy(), atol=1e-6)


@pytest.mark.parametrize("model", [model_2d(), model_3d()], ids=["2-D", "3-D"])
def test_each_network_gives_a_probability_per_region(model: ModelConfig) -> None:
    class Regions(nn.Module):
        """Two regions, whose logits are the input and its negative."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, -x], dim=1)

    image = torch.arange(6.0)[:, None, None].expand(6, 4, 4)
    networks = Regions(), nn.Sequential(Regions(), nn.Tanh())
    probability, _ = network_probabilities(image, predictor=predictor(*networks, model=model))
    assert probability.shape == (2, 2, 6, 4, 4)
    for network, logit in enumerate((image, torch.tanh(image))):
        for region, sign in enumerate((1, -1)):
            np.testing.assert_allclose(probability[network, region], torch.sigmoid(sign * logit), atol=1e-6)


def test_zones_of_a_study_are_inside_its_gland(cube_volume: Volume) -> None:
    class Noise(nn.Module):
        """The gland where the input is bright, and random zones everywhere."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(len(x), 2, *x.shape[2:], generator=torch.Generator().manual_seed(0))
            return torch.cat([20 * x[:, :1], noise], dim=1)

    zones = {"peripheral_zone": (5,), "transition_zone": (3,)}
    settings = replace(DEFAULT, image_size=64, whole_gland_labels=(3, 5), zones=zones)
    found = segment(cube_volume, None, predictor=predictor(Noise(), preprocess=settings)).label_map
    alone = predictor(BrightVoxels(), preprocess=replace(settings, zones={}))
    glands = [segment(cube_volume, None, predictor=alone, with_features=wanted) for wanted in (True, False)]
    assert [one.label_map.tobytes() == glands[0].label_map.tobytes() for one in glands] == [True, True]
    assert [bool(one.features) for one in glands] == [True, False]
    np.testing.assert_array_equal(found > 0, glands[0].label_map == 1)
    assert set(np.unique(found)) == {0, 3, 5}


def test_probabilities_of_an_ensemble_are_averaged() -> None:
    networks = ConstantLogit(0.0), ConstantLogit(np.log(3.0))  # probabilities 0.5 and 0.75
    probability = predict_probability(torch.zeros(4, 8, 8), predictor=predictor(*networks))[0]
    np.testing.assert_allclose(probability, 0.625, rtol=1e-6)


def test_tta_averages_the_prediction_of_the_mirrored_study() -> None:
    image = torch.zeros(4, 8, 8)
    np.testing.assert_allclose(predict_probability(image, predictor=predictor(LeftHalf(), tta=True)), 0.5, atol=1e-6)
    symmetric = predict_probability(image + 1, predictor=predictor(BrightVoxels(), tta=True))
    np.testing.assert_allclose(symmetric, 1.0, atol=1e-6)


def test_largest_component_is_kept_and_empty_stays_empty() -> None:
    mask = np.zeros((5, 20, 20), dtype=bool)
    assert not keep_largest_component(mask).any()
    mask[1:4, 2:8, 2:8] = True
    big = mask.copy()
    mask[1, 15:18, 15:18] = True
    np.testing.assert_array_equal(keep_largest_component(mask), big)
    np.testing.assert_array_equal(keep_largest_component(big), big)


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "RAI", "ASR", "SLP"])
def test_flipped_or_reoriented_study_gives_the_same_mask_in_world_space(
    shared_data: Path, tmp_path: Path, orientation: str
) -> None:
    image, _ = real_study(shared_data, "11373_1001396")
    write_volume(tmp_path / "copy.mha", replace(image, stored_orientation=orientation))
    copy = read_volume(tmp_path / "copy.mha")
    assert copy.stored_orientation == orientation
    expected, found = bright_mask(image), bright_mask(copy)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(
        copy.geometry.to_world(np.argwhere(found)), image.geometry.to_world(np.argwhere(expected)), atol=1e-6
    )


def test_rigidly_rotated_study_gives_the_rotated_mask(shared_data: Path) -> None:
    image, _ = real_study(shared_data, "p158020_1")
    turned = replace(image, geometry=rotate(image.geometry, degrees=12))
    expected, found = bright_mask(image), bright_mask(turned)
    assert dice(found, expected) > 0.9999  # rounding of the rotated grid can move a voxel across the threshold
    np.testing.assert_allclose(
        turned.geometry.to_world((3, 4, 5)), rotation(12) @ image.geometry.to_world((3, 4, 5)), atol=1e-9
    )


def test_mask_is_on_the_grid_of_the_study(shared_data: Path) -> None:
    image, _ = real_study(shared_data, "p158021_1")
    assert bright_mask(image).shape == image.array.shape


# --- the same bits on any number of cores ----------------------------------------------------------------------------


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """Restore the number of torch's threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def noise(seed: int, *, num_slices: int = 19) -> torch.Tensor:
    return torch.randn(num_slices, 64, 64, generator=torch.Generator().manual_seed(seed))


def untrained(*, precision: Precision = "fp32", model: ModelConfig | None = None) -> Predictor:
    """Return three networks with random weights and test-time augmentation."""
    torch.manual_seed(0)
    model = model or replace(model_2d(num_slices=3), channels=[7, 18, 33], strides=[[2, 2], [2, 2]])
    networks = [build_network(model).eval() for _ in range(3)]
    return predictor(*networks, model=model, tta=True, precision=precision)


def digest(probabilities: list[np.ndarray]) -> str:
    return hashlib.md5(b"".join(each.tobytes() for each in probabilities)).hexdigest()


@pytest.mark.slow
@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize("model", [None, model_3d()], ids=["2-D", "3-D"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bits_are_the_same_for_any_number_of_workers_and_threads(
    precision: Precision, model: ModelConfig | None
) -> None:
    images, found = [noise(seed) for seed in range(3)], set()
    ready = untrained(precision=precision, model=model)
    for num_workers, num_threads in ((1, 1), (2, 2), (8, 4), (1, 4), (2, 1)):
        torch.set_num_threads(num_threads)
        several = replace(ready, num_threads=num_threads)
        found.add(
            digest(
                map_cases(
                    lambda image, several=several: predict_probability(image, predictor=several),
                    images,
                    num_workers=num_workers,
                    label="x",
                )
            )
        )
    assert len(found) == 1


@pytest.mark.usefixtures("torch_threads")
def test_network_always_runs_on_one_thread_and_on_batches_of_one_size() -> None:
    """Rounding of libraries differs between machines; this network depends on threads and batch size on all of them."""
    found = set()
    for num_threads in (1, 2, 4):
        torch.set_num_threads(num_threads)
        several = replace(predictor(DependsOnThreads()), num_threads=num_threads)
        found.add(digest([predict_probability(noise(0), predictor=several)]))
    assert len(found) == 1


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process to a core")
def test_bits_are_the_same_on_one_core_as_on_all() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from prostate_seg.segmentation.inference.inference import predict_probability\n"
        "from tests.test_inference import digest, noise, untrained\n"
        "ready = untrained(); assert ready.num_threads == 1\n"
        "print(digest([predict_probability(noise(0), predictor=ready)]))"
    )
    one_core = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert one_core.stdout.strip() == digest([predict_probability(noise(0), predictor=untrained())])


@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize("model", [None, model_3d()], ids=["2-D", "3-D"])
def test_parallel_studies_start_no_nested_threads(model: ModelConfig | None) -> None:
    torch.set_num_threads(8)
    ready, process, counts = replace(untrained(model=model), num_threads=4), psutil.Process(), []
    before = process.num_threads()

    def work(image: torch.Tensor) -> None:
        predict_probability(image, predictor=ready)
        counts.append(process.num_threads())

    map_cases(work, [noise(seed) for seed in range(8)], num_workers=8, label="x")
    assert max(counts) - before <= 8 + 4


@pytest.mark.usefixtures("torch_threads")
def test_number_of_torch_threads_is_restored_after_a_prediction() -> None:
    torch.set_num_threads(3)
    predict_probability(noise(0), predictor=replace(untrained(), num_threads=5))
    with ThreadPoolExecutor(1) as new_thread:
        assert (torch.get_num_threads(), new_thread.submit(torch.get_num_threads).result()) == (3, 3)


# --- memory of a GPU -------------------------------------------------------------------------------------------------


def test_a_gpu_runs_one_batch_at_a_time_whatever_the_number_of_workers() -> None:
    assert replace(predictor(BrightVoxels()), device=torch.device("cuda"), num_threads=8).pool is network_threads(1)
    running, most = 0, 0
    lock = threading.Lock()

    class Counts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            result = 20 * x
            with lock:
                running -= 1
            return result

    ready = replace(predictor(Counts()), num_threads=1)
    map_cases(lambda image: predict_probability(image, predictor=ready), [noise(0)] * 4, num_workers=4, label="x")
    assert most == 1


def test_batch_that_does_not_fit_is_split_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    ready = replace(predictor(RunsOutOfMemory(2)), num_threads=1)
    for seed in range(2):
        expected = torch.sigmoid(20 * noise(seed)).numpy()
        np.testing.assert_allclose(predict_probability(noise(seed), predictor=ready)[0], expected, atol=1e-6)
    logged = [record.getMessage() for record in caplog.records]
    assert logged == ["the GPU is out of memory: the batch size of inference is 2 from here on"]


def test_input_that_does_not_fit_alone_is_an_error_with_the_next_step() -> None:
    with pytest.raises(InputError, match=r"(?s)one input does not fit .*20.00 MiB.*machine.device=cpu"):
        predict_probability(noise(0), predictor=replace(predictor(RunsOutOfMemory(0)), num_threads=1))
