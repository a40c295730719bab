"""A training whose steps are replayed from a recording equals one whose steps are executed one by one.

CI has no GPU: `capture_helpers` records and replays on the CPU, and tensors without values show that no step reads one.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast, get_args

import pytest
import torch

from prostate_seg.segmentation.networks.initial_weights import start_from
from prostate_seg.segmentation.networks.networks import build_network, is_3d
from prostate_seg.segmentation.networks.settings import ModelConfig, ModelName
from prostate_seg.segmentation.settings import Precision
from prostate_seg.segmentation.training import cuda_graph, training, training_step
from prostate_seg.segmentation.training.checkpoints import Checkpoints
from prostate_seg.segmentation.training.history import Epoch, TrainingResult
from prostate_seg.segmentation.training.packing import Batches, PackedSet
from prostate_seg.segmentation.training.settings import Loss, TrainConfig
from prostate_seg.segmentation.training.training import _train_batch, fit, reproducible
from prostate_seg.segmentation.training.training_step import TrainingStep
from tests.capture_helpers import OneDevice, use_tape
from tests.segmentation_helpers import TRAIN, VAL, model_2d, packed_discs, recipe, small_model, train_settings

META_RNG = cast(torch.Generator, SimpleNamespace(device=torch.device("meta")))
NETWORKS = [
    replace(small_model("unet"), dropout=0.2),
    replace(small_model("dynunet"), norm="instance"),
    small_model("unet3d"),
]


@pytest.fixture
def packed(tmp_path: Path) -> PackedSet:
    return packed_discs(tmp_path / "packed", TRAIN + VAL)


def run(
    packed: PackedSet,
    settings: TrainConfig,
    *,
    network: Callable[[], torch.nn.Module] | None = None,
    model: ModelConfig | None = None,
    checkpoints: Checkpoints | None = None,
    stop_after: int | None = None,
) -> TrainingResult:
    def stop(epoch: Epoch) -> None:
        if epoch.epoch == stop_after:
            raise KeyboardInterrupt

    model = model or model_2d()
    with reproducible(0, deterministic=True):
        return fit(
            packed,
            network=network() if network else build_network(model),
            recipe=recipe(model),
            settings=settings,
            device=torch.device("cpu"),
            seed=0,
            on_epoch_end=stop,
            checkpoints=checkpoints,
        )


def assert_equal(one: TrainingResult, other: TrainingResult) -> None:
    assert [replace(epoch, seconds=0) for epoch in one.history] == [
        replace(epoch, seconds=0) for epoch in other.history
    ]
    assert all(torch.equal(one.weights[name], value) for name, value in other.weights.items())


@pytest.mark.parametrize("model", NETWORKS, ids=lambda model: model.name)
def test_replayed_steps_equal_executed_steps(
    packed: PackedSet, monkeypatch: pytest.MonkeyPatch, model: ModelConfig
) -> None:
    """Learning rate, EMA decay, slices, augmentation and dropout change from step to step; none of them is recorded."""
    events = use_tape(monkeypatch)
    settings = train_settings(augmentation="coil", max_epochs=4, ema_decay=0.9)
    replayed = run(packed, settings, model=model)
    num_steps = 4 * 5  # 19 slices in batches of 4
    assert events == ["capture"] + ["replay"] * (num_steps - cuda_graph.NUM_STEPS_BEFORE)
    monkeypatch.setattr(cuda_graph, "NUM_STEPS_BEFORE", 1000)
    assert_equal(replayed, run(packed, settings, model=model))
    assert "capture" not in events[1:]


def test_replayed_steps_keep_a_frozen_encoder_to_the_bit(packed: PackedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = small_model("unet"), train_settings(init="x", freeze="encoder", max_epochs=3, ema_decay=0.9)
    torch.manual_seed(1)
    initial = build_network(model).state_dict()

    def frozen() -> torch.nn.Module:
        network = build_network(model)
        start_from(network, initial, name="unet", freeze="encoder")
        return network

    events = use_tape(monkeypatch)
    replayed = run(packed, settings, model=model, network=frozen)
    assert events.count("replay") > 5
    changed = {name for name, value in initial.items() if not torch.equal(value, replayed.weights[name])}
    assert changed
    assert all(name.startswith("model.2.") for name in changed)
    monkeypatch.setattr(cuda_graph, "NUM_STEPS_BEFORE", 1000)
    assert_equal(replayed, run(packed, settings, model=model, network=frozen))


def test_training_on_the_device_equals_that_on_the_cpu_up_to_rounding(
    packed: PackedSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network has no bias before a norm, whose gradient is rounding alone and whose steps would be of any sign."""
    settings, network = train_settings(max_epochs=4, ema_decay=0.9), partial(torch.nn.Conv2d, 1, 1, 3, padding=1)
    expected = run(packed, settings, network=network)
    use_tape(monkeypatch)
    replayed = run(packed, settings, network=network)
    for one, other in zip(replayed.history, expected.history, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.learning_rate == pytest.approx(other.learning_rate, rel=1e-6, abs=1e-12)
    for name, value in expected.weights.items():
        torch.testing.assert_close(replayed.weights[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stop_after", [1, 2])
def test_resumed_training_equals_an_uninterrupted_one(
    packed: PackedSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stop_after: int
) -> None:
    use_tape(monkeypatch)
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    settings = train_settings(max_epochs=4, augmentation="standard")
    whole = run(packed, settings)
    checkpoints = Checkpoints(folder=tmp_path / "checkpoints", identity="x")
    with pytest.raises(KeyboardInterrupt):
        run(packed, settings, checkpoints=checkpoints, stop_after=stop_after)
    assert_equal(run(packed, settings, checkpoints=checkpoints), whole)


class RunsOutOfMemory(torch.nn.Conv2d):
    """A network that runs out of memory above a batch size, or only within a capture."""

    def __init__(self, most: int, events: list[str], *, in_capture_only: bool = False) -> None:
        super().__init__(1, 1, 3, padding=1)
        self.most, self.events, self.in_capture_only = most, events, in_capture_only

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training and len(inputs) > self.most and (not self.in_capture_only or self.events == ["capture"]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return super().forward(inputs)


def test_captured_step_accumulates_micro_batches(packed: PackedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    events = use_tape(monkeypatch)
    settings = train_settings(loss="bce", augmentation="none")
    halved = run(packed, settings, network=lambda: RunsOutOfMemory(1, events))
    assert [epoch.batch_size for epoch in halved.history] == [1, 1, 1]
    assert events.count("replay") == 15 - cuda_graph.NUM_STEPS_BEFORE
    whole = run(packed, settings, network=lambda: RunsOutOfMemory(4, events))
    for name, value in whole.weights.items():
        torch.testing.assert_close(halved.weights[name], value, rtol=1e-4, atol=1e-6)


def test_memory_that_does_not_suffice_for_the_capture_leaves_executed_steps(
    packed: PackedSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    events = use_tape(monkeypatch)
    expected = run(packed, train_settings(), network=lambda: RunsOutOfMemory(4, events))
    events.clear()
    executed = run(packed, train_settings(), network=lambda: RunsOutOfMemory(3, events, in_capture_only=True))
    assert_equal(executed, expected)
    assert events == ["capture", "failure"]
    assert "the training step is not captured as a CUDA graph, and is slower: CUDA out of memory" in caplog.text


class Waits(torch.nn.Conv2d):
    """A network that reads a number from the device."""

    def __init__(self) -> None:
        super().__init__(1, 1, 3, padding=1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) * float(inputs.mean() > -1e6)


def test_network_that_cannot_be_captured_is_trained_step_by_step(
    packed: PackedSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    events = use_tape(monkeypatch)
    trained = run(packed, train_settings(), network=Waits)
    assert events == ["capture", "failure"]
    messages = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert messages == [
        "the training step is not captured as a CUDA graph, and is slower: "
        "CUDA error: operation not permitted when stream is capturing"
    ]
    monkeypatch.setattr(cuda_graph, "NUM_STEPS_BEFORE", 1000)
    assert_equal(trained, run(packed, train_settings(), network=Waits))


@pytest.mark.parametrize(
    ("name", "loss"),
    [*((name, "dice_ce") for name in get_args(ModelName)), *(("unet", loss) for loss in get_args(Loss))],
)
def test_no_step_waits_for_the_device(
    packed: PackedSet, monkeypatch: pytest.MonkeyPatch, name: ModelName, loss: Loss
) -> None:
    """Tensors of the meta device have no values: to read one is an error, and OneDevice refuses copies from the host."""
    device, model = torch.device("meta"), small_model(name)
    batches = Batches(packed, recipe(model), device=torch.device("cpu"))
    batches.device = device
    for table in ("images", "masks", "ends", "intensity"):
        setattr(batches, table, getattr(batches, table).to(device))
    settings = train_settings(loss=loss, augmentation="coil")
    step = TrainingStep(build_network(model), settings=settings, device=device, volumetric=is_3d(model))
    monkeypatch.setattr(step.optimizer, "step", lambda: None)  # torch's fused kernel has no meta version
    step.optimizer.state[next(step.network.parameters())] = {"step": torch.zeros((), device=device)}
    for module in (training, training_step):
        monkeypatch.setattr(module, "can_capture", lambda device: True)
    monkeypatch.setattr(training_step, "autocast", lambda device, precision: nullcontext())
    for function in ("rand", "randn", "randperm"):  # there is no generator of the meta device
        plain = getattr(torch, function)
        monkeypatch.setattr(torch, function, lambda *args, plain=plain, generator, **kw: plain(*args, **kw))
    take_step = partial(_train_batch, batches, step, torch.zeros(4, dtype=torch.int64, device=device), rng=META_RNG)
    take_step()  # creates cached constants
    with OneDevice():
        assert take_step().device == device


def test_copy_from_the_host_is_detected() -> None:
    with OneDevice(), pytest.raises(AssertionError, match=r"_to_copy"):
        torch.ones(2).to("meta")


def test_checkpoints_on_a_gpu_are_written_at_intervals_and_at_the_end(
    packed: PackedSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_tape(monkeypatch)
    checkpoints = Checkpoints(folder=tmp_path / "checkpoints", identity="x")
    with pytest.raises(KeyboardInterrupt):
        run(packed, train_settings(), checkpoints=checkpoints, stop_after=2)
    assert not checkpoints.folder.exists()
    run(packed, train_settings(), checkpoints=checkpoints)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["epoch000003_x.safetensors"]


@pytest.mark.parametrize(("fp32", "bf16", "faster"), [(3e-3, 1e-3, "bf16"), (1e-3, 3e-3, "fp32"), (2e-3, 2e-3, "fp32")])
def test_auto_is_the_faster_precision(
    monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float, faster: Precision
) -> None:
    clock = count_seconds(monkeypatch)

    def step_in(format_: Precision) -> Callable[[torch.Tensor], torch.Tensor]:
        def step(slices: torch.Tensor) -> torch.Tensor:
            clock["now"] += {"fp32": fp32, "bf16": bf16}[format_]
            return slices.sum()

        return step

    assert cuda_graph.faster_precision(step_in, torch.zeros(2)) == faster


def count_seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    clock = {"now": 0.0}
    monkeypatch.setattr(cuda_graph, "computes_bf16", lambda device: True)
    monkeypatch.setattr(cuda_graph, "time", SimpleNamespace(perf_counter=lambda: clock["now"]))
    return clock


def test_gpu_without_bfloat16_trains_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "computes_bf16", lambda device: False)
    assert cuda_graph.faster_precision(lambda _: pytest.fail("nothing is measured"), torch.zeros(2)) == "fp32"


def test_measured_precision_is_that_of_the_training_and_of_its_continuation(
    packed: PackedSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The measurement trains copies: the network starts from the same weights as with a given precision."""
    use_tape(monkeypatch)
    count_seconds(monkeypatch)
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    expected = run(packed, train_settings(precision="bf16"))
    monkeypatch.setattr(cuda_graph, "MAX_BF16_TIME", math.inf)
    monkeypatch.setattr(cuda_graph, "_seconds", with_seconds(cuda_graph._seconds))
    checkpoints = Checkpoints(folder=tmp_path / "checkpoints", identity="x")
    with pytest.raises(KeyboardInterrupt):
        run(packed, train_settings(precision="auto"), checkpoints=checkpoints, stop_after=2)
    monkeypatch.setattr(training, "faster_precision", lambda *_: pytest.fail("it is measured once"))
    resumed = run(packed, train_settings(precision="auto"), checkpoints=checkpoints)
    assert resumed.measured_precision == "bf16"
    assert_equal(resumed, expected)


def with_seconds(measure: Callable[..., float]) -> Callable[..., float]:
    """Return a measurement that takes the steps and returns a number that does not depend on the clock."""

    def seconds(*args: object) -> float:
        measure(*args)
        return 1.0

    return seconds
