"""Fitting one network on one fold.

The loop moves tensors and nothing else: slices come from the packed set, are standardised and augmented as a batch on the
device, and no step waits for a number to come back. What is validated and kept is the running mean of the weights.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Self

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from prostate_seg.common.errors import InputError
from prostate_seg.common.seeds import Stream, seed_sequence, torch_seed
from prostate_seg.segmentation.devices import autocast
from prostate_seg.segmentation.inference.inference import Predictor, predict_probability
from prostate_seg.segmentation.inference.windows import neighbours, patches
from prostate_seg.segmentation.networks.networks import is_3d
from prostate_seg.segmentation.networks.settings import ModelConfig
from prostate_seg.segmentation.training.augmentation import augment
from prostate_seg.segmentation.training.checkpoints import Checkpoints, TrainingState
from prostate_seg.segmentation.training.distributed import ALONE, Team
from prostate_seg.segmentation.training.losses import LossFunction, build_loss
from prostate_seg.segmentation.training.packing import PackedSet
from prostate_seg.segmentation.training.settings import TrainConfig, TrainingSlices, ValMetric

log = logging.getLogger(__name__)

GPU_SHARE_FOR_DATA = 0.5
"""Part of the free memory of a GPU that the packed set may fill; a larger set stays on the host."""

VAL_SLICES_SHARE = 0.5
"""Val slices that are looked at, as a part of the training slices since the look before: about a sixth of the time at most."""

VAL_THRESHOLD = 0.5
"""Probability from which a voxel is gland in validation."""

EMA_START_STEPS = 10
"""The running mean of the weights spans about a tenth of the steps so far until its full decay is reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """One row of the history."""

    epoch: int
    loss: float
    """Mean training loss."""
    val_dice: float | None
    """Mean Dice of the val studies as `val_scores` measures it, not as evaluation does; None without validation."""
    val_iou: float | None
    """Mean intersection over union of the same."""
    learning_rate: float
    """Of the step that follows the epoch."""
    batch_size: int
    """At the end of the epoch; smaller than asked for once a GPU has run out of memory."""
    seconds: float
    """Since training began."""

    def score(self, metric: ValMetric) -> float:
        """Return what epochs are compared by; minus infinity where val was not looked at."""
        score = {"dice": self.val_dice, "iou": self.val_iou}[metric]
        return -math.inf if score is None else score

    def as_dict(self) -> dict[str, float]:
        """Return metric names and values."""
        looked = (
            {}
            if self.val_dice is None or self.val_iou is None
            else {"val/dice": self.val_dice, "val/iou": self.val_iou}
        )
        return {
            "train/loss": self.loss,
            **looked,
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
            "seconds": self.seconds,
        }


class Batches:
    """The training inputs of a fold, drawn from the packed set."""

    def __init__(
        self,
        packed: PackedSet,
        case_ids: Sequence[str],
        *,
        model: ModelConfig,
        device: torch.device,
        kind: TrainingSlices = "all",
    ):
        self.model, self.device = model, device
        self.images, self.masks = _resident(packed, device)
        self.first, self.last, self.intensity = _slice_tables(packed)
        self.slices = packed.slices_of(case_ids)
        if kind == "gland":
            self.slices = self.slices[packed.masks[self.slices].any(axis=(1, 2))]

    def order(self, batch_size: int, *, num_batches: int, generator: np.random.Generator) -> np.ndarray:
        """Return [num_batches, batch_size] slices; each slice comes once before any comes again."""
        num_passes = math.ceil(num_batches * batch_size / len(self.slices))
        order = np.concatenate([generator.permutation(self.slices) for _ in range(num_passes)])
        return order[: num_batches * batch_size].reshape(num_batches, batch_size)

    def load(self, slices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return standardised images [B, C, Y, X] and 0/1 masks [B, D, Y, X] around some slices, on the device."""
        first, last, depth = self.first[slices], self.last[slices], self.model.num_slices
        if is_3d(self.model):
            rows = wanted = patches(slices - depth // 2, depth=depth, first=first, last=last)
        else:
            rows, wanted = neighbours(slices, num_slices=depth, first=first, last=last), slices[:, None]
        low, high, mean, sd = self.intensity[:, torch.from_numpy(slices), None, None, None].to(self.device)
        images = self.images[torch.from_numpy(rows)].to(self.device, torch.float32)
        masks = self.masks[torch.from_numpy(wanted)].to(self.device, torch.float32)
        return images.clamp_(low, high).sub_(mean).div_(sd), masks


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What a training came to."""

    history: list[Epoch]
    """One row per epoch."""
    weights: Mapping[str, torch.Tensor]
    """Of the best epoch."""


def fit(
    packed: PackedSet,
    *,
    train_ids: Sequence[str],
    val_ids: Sequence[str],
    settings: TrainConfig,
    predictor: Predictor,
    seed: int,
    fold_index: int = 0,
    on_epoch_end: Callable[[Epoch], None],
    checkpoints: Checkpoints | None = None,
    team: Team = ALONE,
) -> Fitted:
    """Train until the budget of epochs or minutes is spent.

    Each epoch has at least one step, and the last ends with validation.

    Args:
        packed: Preprocessed studies.
        train_ids: Studies that fit the weights.
        val_ids: Studies that choose the checkpoint.
        settings: How to train.
        predictor: The one fresh network, and how it is run for validation.
        seed: Source of batch order, augmentation and dropout, together with `fold_index`.
        fold_index: The fold; the folds of one seed draw independent random numbers.
        on_epoch_end: Told after each epoch; of epochs before an interruption too, at once.
        checkpoints: Where the state is kept after each epoch, and where a training that was stopped goes on.
        team: The processes that train this network; each calls this, the first with checkpoints.

    Raises:
        InputError: If the loss is no longer finite.
    """
    device, volumetric = predictor.device, is_3d(predictor.model)
    batches = Batches(packed, train_ids, model=predictor.model, device=device, kind=settings.slices)
    step = Step(predictor.networks[0], settings=settings, device=device, volumetric=volumetric, team=team)
    averaged = replace(predictor, networks=[step.averaged.module], num_threads=torch.get_num_threads())
    steps_per_epoch = settings.steps_per_epoch or math.ceil(len(batches.slices) / settings.batch_size)
    new_slices = VAL_SLICES_SHARE * steps_per_epoch * settings.batch_size
    epochs_per_look = max(1, math.ceil(len(packed.slices_of(val_ids)) / new_slices))
    progress = _progress(checkpoints, step, team=team)
    for epoch in progress.history:
        on_epoch_end(epoch)
    start = time.perf_counter() - progress.seconds
    budget = Budget(settings, steps_per_epoch=steps_per_epoch, start=start, num_steps=step.num_steps, team=team)
    scheduler = LambdaLR(step.optimizer, lambda _: budget.learning_rate_factor())
    seed_of = partial(seed_sequence, seed=seed, fold_index=fold_index)
    while not (progress.is_validated and budget.is_spent()):
        number = len(progress.history)
        torch.manual_seed(torch_seed(seed_of(Stream.dropout, number, team.rank)))
        losses = _train_epoch(
            batches,
            step,
            budget,
            scheduler,
            num_steps=steps_per_epoch,
            order=np.random.default_rng(seed_of(Stream.batch_order, number)),
            augmentation=torch.Generator(device).manual_seed(torch_seed(seed_of(Stream.augmentation, number))),
        )
        looks = budget.is_spent() or (number + 1) % epochs_per_look == 0
        val_dice, val_iou = val_scores(packed, val_ids, predictor=averaged, team=team) if looks else (None, None)
        first_step = step.num_steps - len(losses)
        epoch = Epoch(
            epoch=number + 1,
            loss=team.of_first(partial(_finite_mean, losses, packed=packed, first_step=first_step, epoch=number + 1)),
            val_dice=val_dice,
            val_iou=val_iou,
            learning_rate=float(scheduler.get_last_lr()[0]),
            batch_size=step.batch_size,
            seconds=time.perf_counter() - start,
        )
        progress.add(epoch, step.averaged.module.state_dict())
        if checkpoints is not None:
            checkpoints.save(progress.state(step), epoch=epoch.epoch)
        on_epoch_end(epoch)
    if step.num_steps < steps_per_epoch:
        log.warning(
            "train.max_minutes=%g ended the training after step %d of %d of its first epoch: use a larger number",
            settings.max_minutes,
            step.num_steps,
            steps_per_epoch,
        )
    return Fitted(history=progress.history, weights=progress.best_weights)


class Progress:
    """The epochs so far and the weights of the best one."""

    def __init__(self, metric: ValMetric) -> None:
        self.metric = metric
        self.history: list[Epoch] = []
        self.best_weights: Mapping[str, torch.Tensor] = {}

    @property
    def is_validated(self) -> bool:
        """Return whether the last epoch ended with validation."""
        return bool(self.history) and self.history[-1].val_dice is not None

    @property
    def seconds(self) -> float:
        """Return the time that the epochs so far took."""
        return self.history[-1].seconds if self.history else 0.0

    def add(self, epoch: Epoch, weights: Mapping[str, torch.Tensor]) -> None:
        """Take an epoch, and its weights if it is the best."""
        self.history.append(epoch)
        if not self.best_weights or best_epoch(self.history, metric=self.metric) is epoch:
            self.best_weights = {name: value.detach().clone() for name, value in weights.items()}

    def state(self, step: "Step") -> TrainingState:
        """Return all that the next epoch depends on."""
        best = {f"best.{name}": value for name, value in self.best_weights.items()}
        history = [asdict(epoch) for epoch in self.history]
        facts = {"history": history, "num_steps": step.num_steps, "batch_size": step.batch_size}
        return TrainingState(tensors=step.tensors() | best, facts=facts)

    @classmethod
    def restored(cls, state: TrainingState, *, metric: ValMetric) -> Self:
        """Read what `state` gave."""
        progress = cls(metric)
        progress.history = [Epoch(**row) for row in state.facts["history"]]
        progress.best_weights = state.part("best")
        return progress


def _progress(checkpoints: Checkpoints | None, step: "Step", *, team: Team) -> Progress:
    """Return that of a training that was stopped, with `step` as it was then; without one there is none yet."""
    found = team.of_first(lambda: None if checkpoints is None else checkpoints.newest())
    if found is None:
        return Progress(step.settings.metric)
    progress = Progress.restored(found, metric=step.settings.metric)
    step.restore(found)
    log.info("go on after epoch %d, where training was stopped", len(progress.history))
    return progress


def best_epoch(history: Sequence[Epoch], *, metric: ValMetric) -> Epoch:
    """Return the first of the epochs with the highest score."""
    return max(history, key=lambda epoch: epoch.score(metric))


def _train_epoch(
    batches: Batches,
    step: "Step",
    budget: "Budget",
    scheduler: LambdaLR,
    *,
    num_steps: int,
    order: np.random.Generator,
    augmentation: torch.Generator,
) -> list[tuple[torch.Tensor, np.ndarray]]:
    """Take the steps of an epoch, fewer but at least one when the budget ends before, and return their losses and slices."""
    settings, losses = step.settings, []
    for slices in batches.order(settings.batch_size, num_batches=num_steps, generator=order):
        losses.append((_train_step(batches, step, slices, augmentation=augmentation), slices))
        budget.num_steps += 1
        is_over = budget.is_spent()
        scheduler.step()
        if is_over:
            break
    return losses


def _train_step(batches: Batches, step: "Step", slices: np.ndarray, *, augmentation: torch.Generator) -> torch.Tensor:
    """Take one step and return its loss; a batch that the GPU has no room for goes through in parts, from here on."""
    while True:
        parts = np.array_split(slices, math.ceil(len(slices) / step.batch_size))
        try:
            losses = []
            for part in parts:
                images, masks = batches.load(part)
                if step.settings.augmentation != "none":
                    coil = step.settings.augmentation == "coil"
                    images, masks = augment(images, masks, generator=augmentation, coil=coil)
                losses.append(step.add_gradient(images, masks, share=len(part) / len(slices)))
            step.descend()
            return losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        except torch.OutOfMemoryError as error:
            reason = str(error)  # the error itself holds the tensors of the step, and ends with this block
        step.halve_batch(reason)


class Step:
    """One step of gradient descent, and the running mean of the weights."""

    def __init__(
        self,
        network: nn.Module,
        *,
        settings: TrainConfig,
        device: torch.device,
        volumetric: bool,
        team: Team = ALONE,
    ):
        memory_format = torch.channels_last if device.type == "cuda" and not volumetric else torch.contiguous_format
        self.network = network.to(device, memory_format=memory_format).train()  # type: ignore[call-overload]
        self.replica = team.replica(self.network)
        self.settings, self.device, self.volumetric, self.team = settings, device, volumetric, team
        self.loss: LossFunction = build_loss(settings.loss)
        self.optimizer = build_optimizer(network, settings)
        self.averaged = AveragedModel(network, use_buffers=True).eval()
        self.num_steps = 0
        self.batch_size = settings.batch_size
        """Inputs that go through the network at once."""

    def add_gradient(self, images: torch.Tensor, masks: torch.Tensor, *, share: float = 1.0) -> torch.Tensor:
        """Add the gradient of some inputs, that are a share of the batch, and return their part of its loss, on the device.

        Of several processes each is given all of them and runs the network on its part.
        """
        if self.volumetric:  # the slices of a 3-D input are an axis, those of a 2.5-D input are channels
            images, masks = images[:, None], masks[:, None]
        with autocast(self.device, precision=self.settings.precision):
            logits = self.replica(images[self.team.part(len(images))])
        loss = self.loss(self.team.whole(logits.float(), len(images)), masks) * share
        (loss * self.team.size).backward()  # the processes' gradients are parts of a sum, and averaged
        return loss.detach()

    def descend(self) -> None:
        """Follow the gradient."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1
        decay = min(self.settings.ema_decay, self.num_steps / (EMA_START_STEPS + self.num_steps))
        self.averaged.multi_avg_fn = get_ema_multi_avg_fn(decay)
        self.averaged.update_parameters(self.network)

    def halve_batch(self, reason: str) -> None:
        """Send half as many inputs at once, their gradients still added up over the whole batch.

        Raises:
            InputError: If a single input does not fit, or several processes would have to halve at the same place.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.team.size > 1:
            raise InputError(
                f"a part of train.batch_size={self.batch_size} does not fit into the memory of the GPU of process "
                f"{self.team.rank}: {reason}\n"
                "Start more processes or lower train.batch_size; only a single process sends a batch in halves."
            )
        if self.batch_size == 1:
            raise InputError(
                f"one input does not fit into the memory of the GPU: {reason}\n"
                "Lower preprocess.image_size or model.channels, or use machine.device=cpu."
            )
        self.batch_size = math.ceil(self.batch_size / 2)
        log.warning(
            "the GPU is out of memory: batches of train.batch_size=%d go through it in parts of %d from step %d on",
            self.settings.batch_size,
            self.batch_size,
            self.num_steps + 1,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return network, running mean and optimiser by dotted name."""
        optimizer = self.optimizer.state_dict()["state"]
        return {
            **{f"network.{name}": value for name, value in self.network.state_dict().items()},
            **{f"averaged.{name}": value for name, value in self.averaged.state_dict().items()},
            **{f"optimizer.{i}.{name}": value for i, state in optimizer.items() for name, value in state.items()},
        }

    def restore(self, state: TrainingState) -> None:
        """Become what `tensors` and the number of steps describe."""
        self.network.load_state_dict(state.part("network"))
        self.averaged.load_state_dict(state.part("averaged"))
        optimizer = self.optimizer.state_dict()
        for key, value in state.part("optimizer").items():
            index, name = key.split(".")
            optimizer["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(optimizer)
        self.num_steps = int(state.facts["num_steps"])
        if self.team.size == 1:
            self.batch_size = int(state.facts["batch_size"])


class Budget:
    """How much of the epochs and minutes is spent; the learning rate follows whichever ends first.

    A check reads the clock, and asks the first of several processes for it: all of them check at the same places.
    """

    def __init__(
        self, settings: TrainConfig, *, steps_per_epoch: int, start: float, num_steps: int = 0, team: Team = ALONE
    ):
        self.settings, self.start, self.team = settings, start, team
        self.max_steps = settings.max_epochs * steps_per_epoch
        self.num_steps = num_steps
        self.spent = self._measure()
        """Spent fraction of the budget when it was last checked, 0 to 1 and a little beyond."""

    def is_spent(self) -> bool:
        """Check the budget, and return whether training must end."""
        self.spent = self._measure()
        return self.spent >= 1

    def _measure(self) -> float:
        by_steps, max_minutes = self.num_steps / self.max_steps, self.settings.max_minutes
        if max_minutes is None:
            return by_steps
        minutes = self.team.of_first(lambda: (time.perf_counter() - self.start) / 60)
        return max(by_steps, minutes / max_minutes)

    def learning_rate_factor(self) -> float:
        """Return by what train.learning_rate is multiplied in the next step: linear warm-up, then the schedule."""
        spent, warmup = min(1.0, self.spent), self.settings.warmup_fraction
        if spent < warmup:
            return max(spent / warmup, 0.01)
        if self.settings.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (spent - warmup) / (1 - warmup)))


def val_scores(
    packed: PackedSet, case_ids: Sequence[str], *, predictor: Predictor, team: Team = ALONE
) -> tuple[float, float]:
    """Return the mean Dice and the mean intersection over union of some studies, on the network's grid.

    Evaluation measures otherwise: on the original grid, at evaluate.threshold, with the largest component and the mirrored
    study if asked for. Here the threshold is fixed and every voxel counts: training depends on no setting of evaluation.
    """
    if not case_ids:
        return 0.0, 0.0
    mine = case_ids[team.part(len(case_ids))]
    scores = team.gathered([_dice_and_iou(packed, case_id, predictor=predictor) for case_id in mine])
    dice, iou = np.mean(scores, axis=0)
    return float(dice), float(iou)


@contextmanager
def reproducible(seed: int, *, deterministic: bool) -> Iterator[None]:
    """Seed torch and, if asked, allow only operations that give the same bits each time."""
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    # Nothing here reads memory that was not written, so it need not be filled.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _dice_and_iou(packed: PackedSet, case_id: str, *, predictor: Predictor) -> tuple[float, float]:
    case = packed.cases[case_id]
    part = slice(case.first_slice, case.last_slice + 1)
    clipped = np.clip(packed.images[part], case.intensity.low, case.intensity.high).astype(np.float32)
    image = torch.from_numpy((clipped - case.intensity.mean) / case.intensity.sd)
    predicted = predict_probability(image, predictor=predictor) >= VAL_THRESHOLD
    reference = packed.masks[part] > 0
    both, size = np.count_nonzero(predicted & reference), np.count_nonzero(predicted) + np.count_nonzero(reference)
    return (2 * both / size, both / (size - both)) if size else (1.0, 1.0)


def _resident(packed: PackedSet, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the packed arrays as tensors: on the GPU if they fit there, else mapped from disk."""
    images, masks = torch.from_numpy(packed.images), torch.from_numpy(packed.masks)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if images.nbytes + masks.nbytes < GPU_SHARE_FOR_DATA * free:
            return images.to(device), masks.to(device)
    return images, masks


def _slice_tables(packed: PackedSet) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Return for every slice its study's first and last slice, and [4, slices] low, high, mean and SD."""
    cases, sizes = list(packed.cases.values()), [case.num_slices for case in packed.cases.values()]
    first = np.repeat([case.first_slice for case in cases], sizes)
    last = np.repeat([case.last_slice for case in cases], sizes)
    values = [(c.intensity.low, c.intensity.high, c.intensity.mean, c.intensity.sd) for c in cases]
    return first, last, torch.tensor(np.repeat(values, sizes, axis=0).T, dtype=torch.float32)


def build_optimizer(network: nn.Module, settings: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimiser of a network; only weights of convolutions and linear layers decay.

    Biases, weights of norms and slopes of PReLU have one axis: pulling them to 0 would change what the layer computes, and
    does not make the network simpler.
    """
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[settings.optimizer]
    decaying = [parameter for parameter in network.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in network.parameters() if parameter.ndim < 2]
    groups = [{"params": decaying, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return kind(groups, lr=settings.learning_rate, fused=True)


def _finite_mean(
    losses: Sequence[tuple[torch.Tensor, np.ndarray]], *, packed: PackedSet, first_step: int, epoch: int
) -> float:
    """Return the mean loss of an epoch; the first that is not finite stops the training by step and studies."""
    values = torch.stack([loss for loss, _ in losses]).float().cpu()
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return float(values.mean())
    bad = int((~finite).nonzero()[0])
    slices = losses[bad][1]
    studies = [case_id for case_id, case in packed.cases.items() if _holds(case.first_slice, case.last_slice, slices)]
    raise InputError(
        f"the training loss is {float(values[bad])} in step {first_step + bad + 1} (epoch {epoch}), "
        f"on slices of {', '.join(studies)}; the state after epoch {epoch - 1} is kept\n"
        "Look at these studies; then lower train.learning_rate, or use train.precision=fp32."
    )


def _holds(first: int, last: int, slices: np.ndarray) -> bool:
    return bool(((slices >= first) & (slices <= last)).any())
