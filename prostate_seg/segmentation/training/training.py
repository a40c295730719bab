"""Training loop of one fold: optimisation, EMA weights, learning-rate schedule, validation and resuming.

The loop moves tensors only: slices come from the packed set, are standardised and augmented as a batch on the device, and no
step waits for a number from it. The EMA weights are what is validated and kept.
"""

import copy
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from prostate_seg.common.errors import InputError
from prostate_seg.common.seeds import Stream, seed_sequence, torch_seed
from prostate_seg.imaging.regions import masks_of_bits
from prostate_seg.segmentation.inference.inference import Predictor, predict_probability
from prostate_seg.segmentation.inference.network_input import normalise
from prostate_seg.segmentation.inference.settings import Usage
from prostate_seg.segmentation.networks.networks import is_3d
from prostate_seg.segmentation.networks.storage import Recipe
from prostate_seg.segmentation.overlap import slice_counts
from prostate_seg.segmentation.settings import Precision
from prostate_seg.segmentation.training.augmentation import augment
from prostate_seg.segmentation.training.checkpoints import Checkpoints, TrainingState
from prostate_seg.segmentation.training.cuda_graph import GraphedStep, Step, can_capture, faster_precision
from prostate_seg.segmentation.training.distributed import SINGLE_PROCESS, ProcessGroup
from prostate_seg.segmentation.training.history import Epoch, TrainingResult
from prostate_seg.segmentation.training.packing import Batches, PackedSet
from prostate_seg.segmentation.training.settings import TrainConfig
from prostate_seg.segmentation.training.training_step import TrainingStep

log = logging.getLogger(__name__)

VAL_SLICES_FRACTION = 0.5
"""Most val slices per validation, as a fraction of the training slices since the last one: about a sixth of the time."""
VAL_THRESHOLD = 0.5
"""Probability from which a voxel is gland in validation."""
SECONDS_BETWEEN_CHECKPOINTS = 10.0
"""On a GPU, where writing one can take longer than an epoch; on a CPU each epoch has one."""


def fit(
    packed: PackedSet,
    *,
    network: nn.Module,
    recipe: Recipe,
    settings: TrainConfig,
    device: torch.device,
    seed: int,
    fold_index: int = 0,
    on_epoch_end: Callable[[Epoch], None],
    checkpoints: Checkpoints | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> TrainingResult:
    """Train until the budget of epochs or minutes is spent.

    Each epoch has at least one step, and the last ends with validation.

    Args:
        packed: Preprocessed studies.
        network: The untrained network.
        recipe: Its architecture and input; its train studies are trained on, its val studies choose the best epoch.
        settings: Training settings.
        device: Where the network is trained.
        seed: Seed of batch order, augmentation and dropout.
        fold_index: The folds of one seed have independent random streams.
        on_epoch_end: Called after each epoch; when training resumes, first with the epochs before the interruption.
        checkpoints: Where the state is saved after epochs, and loaded from; rank 0 alone needs it.
        group: The processes that train this network; each calls this function.

    Raises:
        InputError: If the loss is no longer finite.
    """
    batches = Batches(packed, recipe, device=device, kind=settings.slices)
    state = group.broadcast_from_rank0(lambda: None if checkpoints is None else checkpoints.newest())
    measured = None
    if settings.precision == "auto" and can_capture(device):
        measured = group.broadcast_from_rank0(partial(_measured_precision, state, batches, network, settings))
        settings = replace(settings, precision=measured)
    step = TrainingStep(network, settings=settings, device=device, volumetric=is_3d(recipe.model), group=group)
    result, saved_at = TrainingResult(measured_precision=measured), 0.0
    if state is not None:
        result = replace(step.restore(state), measured_precision=measured)
        log.info("go on after epoch %d, where training was stopped", len(result.history))
    for epoch in result.history:
        on_epoch_end(epoch)

    last = result.history[-1] if result.history else None
    start = time.perf_counter() - (0.0 if last is None else last.seconds)
    epochs = Epochs(batches, step, start=start, stream=partial(seed_sequence, seed=seed, fold_index=fold_index))
    predictor = _val_predictor(step, recipe)
    epochs_per_validation = _epochs_per_validation(
        packed, recipe.val_ids, num_slices=epochs.num_steps * settings.batch_size
    )
    is_over = last is not None and last.val_dice is not None and epochs.budget.is_spent()
    while not is_over:
        number = len(result.history) + 1
        mean_loss = epochs.train(number, packed=packed)
        val_dice = val_iou = None
        if epochs.budget.is_spent() or number % epochs_per_validation == 0:
            val_dice, val_iou = validate(packed, recipe.val_ids, predictor=predictor, group=group)
        # Measured before `seconds`, by which a resumed training decides.
        is_over = val_dice is not None and epochs.budget.is_spent()
        epoch = Epoch(
            epoch=number,
            loss=mean_loss,
            val_dice=val_dice,
            val_iou=val_iou,
            learning_rate=float(epochs.scheduler.get_last_lr()[0]),
            batch_size=step.micro_batch_size,
            seconds=time.perf_counter() - start,
        )
        result.add(epoch, step.ema.module.state_dict(), metric=settings.metric)
        is_due = not can_capture(device) or epoch.seconds - saved_at >= SECONDS_BETWEEN_CHECKPOINTS
        if checkpoints is not None and (is_due or is_over):
            checkpoints.save(step.state(result), epoch=number)
            saved_at = epoch.seconds
        on_epoch_end(epoch)
    epochs.warn_if_incomplete()
    return result


def _val_predictor(step: TrainingStep, recipe: Recipe) -> Predictor:
    """Return the predictor with the EMA weights."""
    precision = step.settings.precision
    usage = Usage(threshold=VAL_THRESHOLD, largest_component=False, tta=False, precision=precision)
    networks, num_threads = [step.ema.module], torch.get_num_threads()
    return Predictor(networks=networks, recipe=recipe, usage=usage, device=step.device, num_threads=num_threads)


def _epochs_per_validation(packed: PackedSet, val_ids: Sequence[str], *, num_slices: int) -> int:
    """Return how many epochs of `num_slices` slices end with one validation."""
    return max(1, math.ceil(len(packed.slices_of(val_ids)) / (VAL_SLICES_FRACTION * num_slices)))


def _measured_precision(
    state: TrainingState | None, batches: Batches, network: nn.Module, settings: TrainConfig
) -> Precision:
    """Return the precision of the training that is resumed, or the one in which copies of the network train faster."""
    if state is not None and (resumed := state.facts.get("precision")):
        precision: Precision = resumed
        return precision

    def step_in(precision: Precision) -> Step:
        changed, device = replace(settings, precision=precision), batches.device
        step = TrainingStep(copy.deepcopy(network), settings=changed, device=device, volumetric=is_3d(batches.model))
        return partial(_with_fitting_micro_batches, _step_function(batches, step, torch.Generator(device)), step)

    order = batches.order(settings.batch_size, num_batches=1, rng=np.random.default_rng(0))
    return faster_precision(step_in, torch.from_numpy(order[0]).to(batches.images.device))


def _step_function(batches: Batches, step: TrainingStep, rng: torch.Generator) -> Step:
    """Return the function that takes a step on slices, as a CUDA graph where that is possible."""
    take_step: Step = partial(_train_batch, batches, step, rng=rng)
    if not can_capture(step.device):
        return take_step
    if step.group.world_size > 1:
        log.info("the training step is not captured as a CUDA graph: the processes wait for each other within a step")
        return take_step
    if batches.images.device.type != step.device.type:
        log.info("the training step is not captured as a CUDA graph: the training set does not fit on the GPU")
        return take_step
    return GraphedStep(take_step, batch_size=step.settings.batch_size, rng=rng)


class Epochs:
    """Trains one epoch after the other: learning rate, batch order and random streams of each step."""

    def __init__(
        self, batches: Batches, step: TrainingStep, *, start: float, stream: Callable[..., np.random.SeedSequence]
    ):
        self.batches, self.step, self.stream = batches, step, stream
        self.num_steps = step.settings.steps_per_epoch or math.ceil(len(batches.slices) / step.settings.batch_size)
        self.budget = Budget(step, steps_per_epoch=self.num_steps, start=start)
        self.scheduler = LambdaLR(step.optimizer, lambda _: self.budget.learning_rate_factor())
        self.augmentation_rng = torch.Generator(step.device)
        self.take_step = _step_function(batches, step, self.augmentation_rng)

    def train(self, number: int, *, packed: PackedSet) -> float:
        """Take the steps of an epoch, at least one and fewer when the budget ends before, and return their mean loss.

        Random streams are seeded anew, so that a resumed training repeats an uninterrupted one bit for bit.
        """
        index, step, losses = number - 1, self.step, []
        torch.manual_seed(torch_seed(self.stream(Stream.dropout, index, step.group.rank)))
        self.augmentation_rng.manual_seed(torch_seed(self.stream(Stream.augmentation, index)))
        order_rng = np.random.default_rng(self.stream(Stream.batch_order, index))
        order = self.batches.order(step.settings.batch_size, num_batches=self.num_steps, rng=order_rng)
        first_step = step.num_steps
        for slices in torch.from_numpy(order).to(self.batches.images.device):
            step.num_steps += 1
            losses.append(_with_fitting_micro_batches(self.take_step, step, slices))
            is_over = self.budget.is_spent()
            self.scheduler.step()
            if is_over:
                break
        mean_loss = partial(_mean_loss, losses, order, packed=packed, first_step=first_step, epoch=number)
        return step.group.broadcast_from_rank0(mean_loss)

    def warn_if_incomplete(self) -> None:
        """Log a warning if the training ended within its first epoch."""
        if self.step.num_steps < self.num_steps:
            log.warning(
                "train.max_minutes=%g ended the training after step %d of %d of its first epoch: use a larger number",
                self.step.settings.max_minutes,
                self.step.num_steps,
                self.num_steps,
            )


def _with_fitting_micro_batches(take_step: Step, step: TrainingStep, slices: torch.Tensor) -> torch.Tensor:
    """Take one step and return its loss, with smaller micro-batches from here on if the GPU runs out of memory."""
    while True:
        try:
            return take_step(slices)
        except torch.OutOfMemoryError as error:
            reason = str(error)  # not the error itself: its traceback keeps the tensors of the step alive
        step.halve_micro_batch(reason)


def _train_batch(batches: Batches, step: TrainingStep, slices: torch.Tensor, *, rng: torch.Generator) -> torch.Tensor:
    """Load, augment, and take one step of gradient descent; return its loss. Nothing here waits for the device."""
    augmentation = step.settings.augmentation
    step.optimizer.zero_grad(set_to_none=True)
    losses = []
    for micro_batch in slices.tensor_split(math.ceil(len(slices) / step.micro_batch_size)):
        images, masks = batches.load(micro_batch)
        if augmentation != "none":
            are_bits = batches.num_regions > 1
            images, masks = augment(images, masks, rng=rng, kind=augmentation, are_bits=are_bits)
        losses.append(step.backward(images, batches.regions_of(masks), fraction=len(micro_batch) / len(slices)))
    step.update()
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


class Budget:
    """Spent fraction of the epochs or minutes, whichever ends first; the learning-rate schedule follows it.

    A check reads the clock of rank 0, so all processes check at the same places.
    """

    def __init__(self, step: TrainingStep, *, steps_per_epoch: int, start: float):
        self.step, self.settings, self.start = step, step.settings, start
        self.max_steps = self.settings.max_epochs * steps_per_epoch
        self.is_spent()

    def is_spent(self) -> bool:
        """Measure the spent fraction, 0 to 1 and a little beyond, and return whether training must end."""
        self.spent = self.step.num_steps / self.max_steps
        if self.settings.max_minutes is not None:
            minutes = self.step.group.broadcast_from_rank0(lambda: (time.perf_counter() - self.start) / 60)
            self.spent = max(self.spent, minutes / self.settings.max_minutes)
        return self.spent >= 1

    def learning_rate_factor(self) -> float:
        """Return the factor of train.learning_rate in the next step: linear warm-up, then the schedule."""
        spent, warmup = min(1.0, self.spent), self.settings.warmup_fraction
        if spent < warmup:
            return max(spent / warmup, 0.01)
        if self.settings.schedule == "constant":
            return 1.0
        # Cosine annealing to 0 without restarts (Loshchilov and Hutter 2017).
        return 0.5 * (1 + math.cos(math.pi * (spent - warmup) / (1 - warmup)))


def validate(
    packed: PackedSet, case_ids: Sequence[str], *, predictor: Predictor, group: ProcessGroup = SINGLE_PROCESS
) -> tuple[float, float]:
    """Return the mean Dice and the mean IoU over studies and regions, on the network's grid.

    Evaluation measures otherwise: on the original grid, at evaluate.threshold, with the largest component and test-time
    augmentation if asked for. Here the threshold is fixed and every voxel counts: training depends on no setting of evaluation.
    """
    if not case_ids:
        return 0.0, 0.0
    shard = case_ids[group.shard(len(case_ids))]
    scores = group.all_gather([_dice_and_iou(packed, case_id, predictor=predictor) for case_id in shard])
    dice, iou = np.mean(scores, axis=0)
    return float(dice), float(iou)


def _dice_and_iou(packed: PackedSet, case_id: str, *, predictor: Predictor) -> tuple[float, float]:
    case = packed.cases[case_id]
    slices = slice(case.first_slice, case.last_slice + 1)
    image = torch.from_numpy(normalise(packed.images[slices], intensity=case.intensity))
    predicted = predict_probability(image, predictor=predictor) >= predictor.usage.threshold
    references = masks_of_bits(packed.masks[slices], num_regions=len(predicted))
    counts = [slice_counts(*pair) for pair in zip(references, predicted, strict=True)]
    return float(np.mean([one.dice() for one in counts])), float(np.mean([one.iou() for one in counts]))


@contextmanager
def reproducible(seed: int, *, deterministic: bool) -> Iterator[None]:
    """Seed torch, and on request use only operations that give the same bits each time."""
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    # Uninitialised memory is never read here, so it need not be filled.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _mean_loss(
    losses: Sequence[torch.Tensor], order: np.ndarray, *, packed: PackedSet, first_step: int, epoch: int
) -> float:
    """Return the mean loss of an epoch; the first that is not finite is an error with its step and studies.

    `order` has the slices of each step, int64 [steps, B].
    """
    values = torch.stack(list(losses)).float().cpu()
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return float(values.mean())
    bad = int((~finite).nonzero()[0])
    studies = [case_id for case_id in packed.cases if np.isin(packed.slices_of([case_id]), order[bad]).any()]
    raise InputError(
        f"the training loss is {float(values[bad])} in step {first_step + bad + 1} (epoch {epoch}), "
        f"on slices of {', '.join(studies)}; the state after epoch {epoch - 1} is kept\n"
        "Check these studies; then lower train.learning_rate, or use train.precision=fp32."
    )
