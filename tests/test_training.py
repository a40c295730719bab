"""Training learns, ends with its budget, keeps the best weights, and is reproducible bit for bit."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch

from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import STAGE_SETTINGS, parse
from prostate_seg.segmentation import overlap
from prostate_seg.segmentation.inference.inference import predict_probability
from prostate_seg.segmentation.inference.network_input import Intensity, normalise
from prostate_seg.segmentation.networks.networks import build_network
from prostate_seg.segmentation.networks.settings import ModelConfig, ModelName
from prostate_seg.segmentation.networks.storage import Recipe, load_network, load_recipe, save_recipe, save_weights
from prostate_seg.segmentation.training import training
from prostate_seg.segmentation.training.augmentation import augment
from prostate_seg.segmentation.training.checkpoints import Checkpoints
from prostate_seg.segmentation.training.history import Epoch, TrainingResult, best_epoch
from prostate_seg.segmentation.training.packing import Batches, PackedSet
from prostate_seg.segmentation.training.settings import Augmentation, Optimizer, TrainConfig, ValMetric
from prostate_seg.segmentation.training.training import Budget, fit, reproducible, validate
from prostate_seg.segmentation.training.training_step import TrainingStep, build_optimizer
from prostate_seg.stages.train import training_identity
from tests.conftest import composed
from tests.segmentation_helpers import (
    SETTINGS,
    SIZE,
    TRAIN,
    VAL,
    model_2d,
    packed_discs,
    predictor,
    recipe,
    small_model,
    train_settings,
)


@pytest.fixture
def packed(tmp_path: Path) -> PackedSet:
    return packed_discs(tmp_path / "packed", TRAIN + VAL)


def run_fit(
    packed: PackedSet,
    settings: TrainConfig,
    *,
    model: ModelConfig | None = None,
    seed: int = 0,
    on_epoch_end: Callable[[Epoch], None] = lambda _: None,
    checkpoints: Checkpoints | None = None,
) -> tuple[list[Epoch], Mapping[str, torch.Tensor]]:
    model = model or model_2d()
    with reproducible(seed, deterministic=settings.deterministic):
        result = fit(
            packed,
            network=build_network(model),
            recipe=recipe(model),
            settings=settings,
            device=torch.device("cpu"),
            seed=seed,
            on_epoch_end=on_epoch_end,
            checkpoints=checkpoints,
        )
    return result.history, result.weights


@pytest.mark.parametrize("name", get_args(ModelName))
def test_every_network_of_the_table_learns_a_disc(packed: PackedSet, name: ModelName) -> None:
    model = small_model(name)
    settings = train_settings(max_epochs=40, augmentation="none")
    history, _ = run_fit(packed, settings, model=model, seed=1)  # with some seeds, 200 steps are too few for resunet_a
    assert history[-1].loss < history[0].loss
    assert max(epoch.val_dice for epoch in history) > 0.85


@pytest.mark.parametrize("augmentation", get_args(Augmentation))
def test_two_runs_are_bit_identical_and_another_seed_is_not(packed: PackedSet, augmentation: Augmentation) -> None:
    settings = train_settings(augmentation=augmentation, precision="auto")
    (first, weights), (again, same), (_, other) = (run_fit(packed, settings, seed=seed) for seed in (1, 1, 2))
    assert [(e.loss, e.val_dice) for e in first] == [(e.loss, e.val_dice) for e in again]
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert not all(torch.equal(weights[name], other[name]) for name in weights)


def test_kept_weights_are_those_of_the_best_epoch(packed: PackedSet, tmp_path: Path) -> None:
    history, kept = run_fit(packed, train_settings(max_epochs=6))
    network = build_network(model_2d())
    network.load_state_dict(kept)
    best = max(epoch.val_dice for epoch in history)
    dice, iou = validate(packed, VAL, predictor=predictor(network.eval()))
    assert dice == pytest.approx(best, abs=1e-12)
    assert iou == pytest.approx(dice / (2 - dice), abs=1e-12)  # of one study


class ProbabilityFromIntensity(torch.nn.Module):
    """A network whose probability is the intensity of its input."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.logit(inputs.clamp(1e-3, 1 - 1e-3))


def test_validation_thresholds_at_one_half_and_keeps_every_component(packed: PackedSet) -> None:
    """docs/science.md: threshold 0.5, no largest component, no test-time augmentation."""
    case = packed.cases["d"]
    part = slice(case.first_slice, case.last_slice + 1)
    images = np.zeros_like(packed.images[part], dtype=np.float32)
    masks = np.zeros_like(packed.masks[part])
    images[:, 2:10, 2:10], images[:, 20:24, 2:6], images[:, 2:10, 20:28] = 0.5, 0.9, 0.49
    masks[:, 2:10, 2:10] = 1
    plain = Intensity(low=0.0, high=1.0, mean=0.0, sd=1.0)
    alone = PackedSet(images=images, masks=masks, cases={"d": replace(case, first_slice=0, intensity=plain)})
    dice, iou = validate(alone, ["d"], predictor=predictor(ProbabilityFromIntensity()))
    gland, extra = 8 * 8, 4 * 4
    assert dice == pytest.approx(2 * gland / (2 * gland + extra))
    assert iou == pytest.approx(gland / (gland + extra))


def test_settings_of_evaluation_do_not_change_a_training() -> None:
    """docs/science.md: val Dice does not depend on evaluate.threshold, largest_component or tta."""
    recipe = Recipe(model=model_2d(), preprocess=SETTINGS, zscore=False, train_ids=["a"], val_ids=["b"])
    cfg = parse(composed())
    other = parse(
        composed("evaluate.threshold=0.2", "evaluate.largest_component=false", "evaluate.tta=false", "seed=12345")
    )
    assert training_identity(cfg, recipe, data="x", initial_md5=None) == training_identity(
        other, recipe, data="x", initial_md5=None
    )
    assert not [key for key in STAGE_SETTINGS["train"] if key.startswith("evaluate")]


@pytest.mark.parametrize("metric", get_args(ValMetric))
def test_metric_decides_which_epoch_is_kept(metric: ValMetric) -> None:
    def epoch(number: int, dice: float, iou: float) -> Epoch:
        return Epoch(
            epoch=number, loss=0.1, val_dice=dice, val_iou=iou, learning_rate=0.1, batch_size=4, seconds=float(number)
        )

    result = TrainingResult()
    for number, (dice, iou) in enumerate([(0.5, 0.4), (0.6, 0.5), (0.7, 0.45), (0.6, 0.5)]):
        result.add(epoch(number, dice, iou), {"weight": torch.tensor(number)}, metric=metric)
    kept = {"dice": 2, "iou": 1}[metric]
    assert result.weights["weight"] == kept
    assert best_epoch(result.history, metric=metric).epoch == kept


def test_many_val_studies_are_validated_less_often_and_in_the_last_epoch(packed: PackedSet) -> None:
    """Val has 7 slices, and an epoch of one step trains on 2 slices, for which validation of 1 slice is allowed."""
    history, weights = run_fit(packed, train_settings(batch_size=2, steps_per_epoch=1, max_epochs=16))
    validated = [epoch.epoch for epoch in history if epoch.val_dice is not None]
    assert validated == [7, 14, 16]
    assert "val/dice" not in history[0].as_dict()
    assert weights


class RunsOutOfMemory(torch.nn.Conv2d):
    """A network that runs out of memory above a batch size."""

    def __init__(self, most: int) -> None:
        super().__init__(1, 1, 3, padding=1)
        self.most = most

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training and len(inputs) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return super().forward(inputs)


def fit_with_little_memory(packed: PackedSet, settings: TrainConfig, *, most: int) -> TrainingResult:
    with reproducible(0, deterministic=True):
        return fit(
            packed,
            network=RunsOutOfMemory(most),
            recipe=recipe(),
            settings=settings,
            device=torch.device("cpu"),
            seed=0,
            on_epoch_end=lambda _: None,
        )


def test_batch_that_does_not_fit_is_split_into_micro_batches(
    packed: PackedSet, caplog: pytest.LogCaptureFixture
) -> None:
    """With a loss that is a mean over pixels the gradients of micro-batches add up to that of the whole batch."""
    settings = train_settings(batch_size=4, loss="bce", augmentation="none")
    whole = fit_with_little_memory(packed, settings, most=4)
    halved = fit_with_little_memory(packed, settings, most=1)
    assert [epoch.batch_size for epoch in whole.history] == [4, 4, 4]
    assert [epoch.batch_size for epoch in halved.history] == [1, 1, 1]
    for name, value in whole.weights.items():
        torch.testing.assert_close(halved.weights[name], value, rtol=1e-4, atol=1e-6)
    messages = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert len(messages) == 2
    assert "batches of train.batch_size=4 are split into micro-batches of 2 from step 1 on" in messages[0]


def test_input_that_does_not_fit_alone_is_an_error_with_the_next_step(packed: PackedSet) -> None:
    with pytest.raises(InputError, match=r"(?s)one input does not fit .*Lower preprocess.image_size") as caught:
        fit_with_little_memory(packed, train_settings(batch_size=4), most=0)
    assert "20.00 MiB" in str(caught.value)


def test_training_and_schedule_end_with_max_minutes(packed: PackedSet) -> None:
    start = time.perf_counter()
    history, _ = run_fit(packed, train_settings(max_epochs=100_000, max_minutes=0.03))
    assert time.perf_counter() - start < 0.03 * 60 + 5
    assert history[-1].learning_rate < 1e-2 * 0.05


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that makes the clock of the training jump by a year at its n-th reading."""

    def jump_at(reading: int) -> None:
        readings = count(1)
        seconds = lambda: 3e7 if next(readings) >= reading else 0.0  # noqa: E731
        monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=seconds))

    return jump_at


def test_no_epoch_without_a_step_is_recorded_when_time_is_up(packed: PackedSet, clock: Callable[[int], None]) -> None:
    """Time is up before the first step, within an epoch, between two epochs, or during validation, every 4th epoch."""
    settings = train_settings(batch_size=4, steps_per_epoch=1, max_epochs=9, max_minutes=1.0)
    lengths = set()
    for reading in range(1, 18):
        clock(reading)
        result = fit_with_little_memory(packed, settings, most=4)
        assert all(np.isfinite(epoch.loss) for epoch in result.history), reading
        assert result.history[-1].val_dice is not None
        assert result.weights
        lengths.add(len(result.history))
    assert {1, 2, 3, 4} <= lengths


def test_time_for_less_than_an_epoch_is_a_warning(
    packed: PackedSet, clock: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    clock(2)
    history, _ = run_fit(packed, train_settings(steps_per_epoch=3, max_minutes=0.5))
    assert len(history) == 1
    assert "train.max_minutes=0.5 ended the training after step 1 of 3 of its first epoch" in caplog.text


@pytest.mark.parametrize("max_minutes", [None, 0.001])
def test_finished_training_takes_no_step_when_it_is_resumed(
    packed: PackedSet, tmp_path: Path, max_minutes: float | None
) -> None:
    settings = train_settings(max_epochs=2, max_minutes=max_minutes)
    checkpoints = Checkpoints(folder=tmp_path / "checkpoints", identity="x")
    history, weights = run_fit(packed, settings, checkpoints=checkpoints)
    again, same = run_fit(packed, settings, checkpoints=checkpoints)
    assert again == history
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    step = TrainingStep(
        build_network(model_2d()), settings=train_settings(max_epochs=10), device=torch.device("cpu"), volumetric=False
    )
    budget = Budget(step, steps_per_epoch=10, start=time.perf_counter())
    rates = []
    for step.num_steps in range(100):
        budget.is_spent()
        rates.append(1e-2 * budget.learning_rate_factor())
    assert rates[:3] == pytest.approx([1e-4, 1e-3, 2e-3])
    assert max(rates) == rates[10] == pytest.approx(1e-2)
    assert rates[55] == pytest.approx(0.5e-2)
    assert rates[-1] < 1e-5
    step.settings, step.num_steps = train_settings(schedule="constant"), 25
    constant = Budget(step, steps_per_epoch=10, start=time.perf_counter())
    assert constant.learning_rate_factor() == 1.0


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
@pytest.mark.parametrize("name", get_args(ModelName))
def test_only_weights_of_convolutions_decay(name: ModelName, optimizer: Optimizer) -> None:
    """Without a gradient a step only applies weight decay."""
    network = build_network(replace(small_model(name), activation="prelu") if name == "unet" else small_model(name))
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, 0.5)
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(network, train_settings(optimizer=optimizer, weight_decay=0.1, learning_rate=0.1)).step()
    convolutions = {
        id(module.weight) for module in network.modules() if isinstance(module, torch.nn.modules.conv._ConvNd)
    }
    decayed = {id(parameter) for parameter in network.parameters() if not bool((parameter == 0.5).all())}
    assert decayed == convolutions
    assert len(decayed) < len(list(network.parameters()))


@pytest.mark.parametrize("warmup", [0.0, 0.3])
@pytest.mark.parametrize("stop", [None, 1])
def test_learning_rate_of_every_step_follows_the_formula(
    packed: PackedSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warmup: float, stop: int | None
) -> None:
    """Linear warm-up, then half a cosine, over 12 steps; the same if training is interrupted after 4 steps."""
    taken: list[set[float]] = []
    update = TrainingStep.update

    def recording(step: TrainingStep) -> None:
        taken.append({group["lr"] for group in step.optimizer.param_groups})
        update(step)

    monkeypatch.setattr(TrainingStep, "update", recording)
    settings = train_settings(learning_rate=3e-3, warmup_fraction=warmup, steps_per_epoch=4, max_epochs=3)
    checkpoints = Checkpoints(folder=tmp_path / "checkpoints", identity="x")

    def stopping(epoch: Epoch) -> None:
        if epoch.epoch == stop:
            raise KeyboardInterrupt

    if stop is not None:
        with pytest.raises(KeyboardInterrupt):
            run_fit(packed, settings, checkpoints=checkpoints, on_epoch_end=stopping)
    history, _ = run_fit(packed, settings, checkpoints=checkpoints)
    expected = [
        3e-3 * max(spent / warmup, 0.01)
        if spent < warmup
        else 3e-3 * 0.5 * (1 + math.cos(math.pi * (spent - warmup) / (1 - warmup)))
        for spent in (step / 12 for step in range(13))
    ]
    assert taken == [{rate} for rate in expected[:12]]
    assert [epoch.learning_rate for epoch in history] == [expected[4], expected[8], expected[12]]


def test_every_training_slice_is_sampled_once_before_any_is_repeated(packed: PackedSet) -> None:
    batches = Batches(packed, recipe(), device=torch.device("cpu"))
    everyone = sorted(packed.slices_of(TRAIN))  # 6 + 7 + 6 slices
    drawn = np.array(list(batches.order(4, num_batches=10, rng=np.random.default_rng(0))))
    assert drawn.shape == (10, 4)
    assert sorted(drawn.ravel()[:19]) == everyone
    assert sorted(drawn.ravel()[19:38]) == everyone


def test_steps_per_epoch_sets_the_length_of_an_epoch(packed: PackedSet) -> None:
    settings = train_settings(steps_per_epoch=3, max_epochs=2, schedule="cosine")
    history, _ = run_fit(packed, settings)
    assert len(history) == 2
    assert history[-1].learning_rate == pytest.approx(0, abs=1e-9)


def test_gland_slices_only_excludes_the_others(packed: PackedSet) -> None:
    batches = Batches(packed, recipe(), device=torch.device("cpu"), kind="gland")
    assert packed.masks[batches.slices].any(axis=(1, 2)).all()
    assert len(batches.slices) == len(packed.slices_of(TRAIN)) - 2 * len(TRAIN)


def test_batch_is_standardised_and_neighbours_are_of_the_same_study(packed: PackedSet) -> None:
    batches = Batches(packed, recipe(model_2d(num_slices=3)), device=torch.device("cpu"))
    first = packed.cases["b"].first_slice
    images, masks = batches.load(torch.tensor([first]))
    assert images.shape == (1, 3, SIZE, SIZE)
    assert masks.shape == (1, 1, SIZE, SIZE)
    assert torch.equal(images[:, 0], images[:, 1])  # the neighbour below the first slice is the first slice
    intensity = packed.cases["b"].intensity
    expected = (packed.images[first].astype(np.float32) - intensity.mean) / intensity.sd
    np.testing.assert_allclose(images[0, 1].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["unet", "unet3d"])
def test_batches_have_a_mask_per_region_that_augmentation_moves_with_the_image(
    packed: PackedSet, name: ModelName
) -> None:
    model = small_model(name)
    packed.masks[:] = packed.masks | (packed.masks > 0) * np.uint8(0b100)  # gland, an empty region, and the gland again
    settings = replace(SETTINGS, whole_gland_labels=(1, 2), zones={"empty": (1,), "again": (2,)})
    batches = Batches(packed, recipe(model, preprocess=settings), device=torch.device("cpu"))
    images, masks = batches.load(torch.from_numpy(packed.slices_of(["a"])[2:4]))
    depth = model.num_slices if name == "unet3d" else 1
    assert masks.shape == (2, depth, SIZE, SIZE)
    _, moved = augment(images, masks, rng=torch.Generator().manual_seed(0), are_bits=True)
    _, expected = augment(images, (masks > 0).float(), rng=torch.Generator().manual_seed(0))
    assert (batches.regions_of(moved)[:, :depth] != expected).float().mean() < 0.02  # nearest neighbour against linear
    for one in (batches.regions_of(masks), batches.regions_of(moved)):
        gland, empty, again = one.unflatten(1, (3, depth)).unbind(1)
        assert gland.any()
        assert not empty.any()
        assert torch.equal(gland, again)
    assert not torch.equal(moved, masks)


@pytest.mark.parametrize("name", get_args(ModelName))
def test_every_network_learns_the_regions_and_validation_is_their_mean(packed: PackedSet, name: ModelName) -> None:
    left = np.arange(SIZE) < SIZE // 2
    packed.masks[:] = packed.masks | (packed.masks > 0) * left * np.uint8(0b10)
    model = small_model(name)
    settings = replace(SETTINGS, whole_gland_labels=(1, 2), zones={"left": (2,)})
    result = fit(
        packed,
        network=build_network(model, num_regions=2),
        recipe=recipe(model, preprocess=settings),
        settings=train_settings(max_epochs=3, augmentation="none"),
        device=torch.device("cpu"),
        seed=1,
        on_epoch_end=lambda _: None,
    )
    assert result.history[-1].loss < result.history[0].loss
    case = packed.cases["d"]
    part = slice(case.first_slice, case.last_slice + 1)
    network = build_network(model, num_regions=2)
    network.load_state_dict(result.weights)
    ready = predictor(network.eval(), model=model, preprocess=settings)
    image = torch.from_numpy(normalise(packed.images[part], intensity=case.intensity))
    probability = predict_probability(image, predictor=ready)
    bits = packed.masks[part]
    expected = [overlap.dice(bits & bit > 0, one >= 0.5) for bit, one in zip((1, 2), probability, strict=True)]
    assert validate(packed, VAL, predictor=ready)[0] == pytest.approx(np.mean(expected), abs=1e-9)


def test_loss_that_is_not_finite_stops_with_the_next_step(packed: PackedSet) -> None:
    settings = train_settings(learning_rate=1.0, max_epochs=2)
    packed.images[:] = 0
    broken = build_network(model_2d())
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(
        InputError,
        match=r"loss is nan in step 1 \(epoch 1\), on slices of [abc].*; the state after epoch 0 is kept\n.*learning_rate",
    ):
        fit(
            packed,
            network=broken,
            recipe=recipe(),
            settings=settings,
            device=torch.device("cpu"),
            seed=0,
            on_epoch_end=lambda _: None,
        )


def test_saved_network_round_trip(tmp_path: Path) -> None:
    network = build_network(model_2d()).eval()
    recipe = Recipe(model=model_2d(), preprocess=SETTINGS, zscore=True, train_ids=["a"], val_ids=["b"])
    save_weights(tmp_path, network.state_dict())
    save_recipe(tmp_path, recipe)
    assert load_recipe(tmp_path) == recipe
    loaded = load_network(tmp_path, recipe=recipe, device=torch.device("cpu"))
    image = torch.randn(1, 1, SIZE, SIZE)
    assert torch.equal(loaded(image), network(image))


def test_absent_or_damaged_network_is_refused_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run stage=train first"):
        load_recipe(tmp_path)
    recipe = Recipe(model=model_2d(), preprocess=SETTINGS, zscore=True, train_ids=["a"], val_ids=["b"])
    (tmp_path / "weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_network(tmp_path, recipe=recipe, device=torch.device("cpu"))
