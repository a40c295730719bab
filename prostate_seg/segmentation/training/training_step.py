"""One step of gradient descent: network, optimiser and EMA weights, on one or several processes, and their state on disk."""

import logging
import math
from dataclasses import asdict
from functools import partial

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from prostate_seg.common.errors import InputError
from prostate_seg.segmentation.devices import autocast
from prostate_seg.segmentation.training.checkpoints import TrainingState
from prostate_seg.segmentation.training.cuda_graph import can_capture
from prostate_seg.segmentation.training.distributed import SINGLE_PROCESS, ProcessGroup
from prostate_seg.segmentation.training.history import Epoch, TrainingResult
from prostate_seg.segmentation.training.losses import LossFunction, build_loss
from prostate_seg.segmentation.training.settings import TrainConfig

log = logging.getLogger(__name__)

EMA_WARMUP_STEPS = 10
"""The EMA spans about a tenth of the steps so far until its full decay is reached."""


class TrainingStep:
    """Network, optimiser and EMA weights; one step of gradient descent over the micro-batches of a batch."""

    def __init__(
        self,
        network: nn.Module,
        *,
        settings: TrainConfig,
        device: torch.device,
        volumetric: bool,
        group: ProcessGroup = SINGLE_PROCESS,
    ):
        self.network = network.to(device).train()
        for layer in self.network.modules():
            if is_frozen(layer):
                layer.eval()  # a norm keeps its running statistics, too
        self.replica = group.data_parallel(self.network)
        self.settings, self.device, self.volumetric, self.group = settings, device, volumetric, group
        self.loss: LossFunction = build_loss(settings.loss)
        self.optimizer = build_optimizer(network, settings)
        # Buffers are averaged too: the running statistics of batch norms belong to the weights they were measured with.
        self.ema = AveragedModel(network, use_buffers=True).eval()
        self.num_steps = 0
        """Steps that were begun."""
        self.micro_batch_size = settings.batch_size
        """Inputs per forward pass."""

    def backward(self, images: torch.Tensor, masks: torch.Tensor, *, fraction: float = 1.0) -> torch.Tensor:
        """Accumulate the gradient of a micro-batch, a fraction of the batch; return its part of the loss, on the device.

        Each process passes the whole micro-batch and runs the network on its shard.
        """
        if self.volumetric:  # slices are an axis of a 3-D input, and the channels of a 2.5-D input
            images, masks = images[:, None], masks.unflatten(1, (-1, images.shape[1]))
        with autocast(self.device, precision=self.settings.precision):
            logits = self.replica(images[self.group.shard(len(images))])
        if not self.volumetric:
            # The gradient of the loss gets the layout of the network: operations on two layouts are slow.
            logits.register_hook(partial(torch.Tensor.contiguous, memory_format=torch.channels_last))
        # In float32, in the layout of the masks, and on the logits of all processes: the Dice loss is pooled over the batch,
        # not a mean over inputs.
        rows = self.group.all_gather_rows(logits.to(torch.float32, memory_format=torch.contiguous_format), len(images))
        loss = self.loss(rows, masks) * fraction
        # Each process has the gradient through its own rows; their sum is wanted, and DistributedDataParallel averages.
        (loss * self.group.world_size).backward()
        return loss.detach()

    def update(self) -> None:
        """Apply the accumulated gradient, and update the EMA weights."""
        self.optimizer.step()
        # EMA of the weights (Tarvainen and Valpola 2017). The decay ramps up with the steps: at once at its full value, the
        # untrained weights would dominate the average for the first 1 / (1 - decay) steps.
        if can_capture(self.device):
            num_steps = next(iter(self.optimizer.state.values()))["step"]  # a tensor, unlike self.num_steps
            decay = (num_steps / (EMA_WARMUP_STEPS + num_steps)).clamp_(max=self.settings.ema_decay)
            decay.mul_(num_steps > 1)  # as in AveragedModel, the first average is a copy
            update_ema_(self.ema.module, self.network, weight=1 - decay)
        else:
            decay = min(self.settings.ema_decay, self.num_steps / (EMA_WARMUP_STEPS + self.num_steps))
            self.ema.multi_avg_fn = get_ema_multi_avg_fn(decay)
            self.ema.update_parameters(self.network)

    def halve_micro_batch(self, reason: str) -> None:
        """Halve the inputs per forward pass; gradients are still accumulated over the whole batch.

        Raises:
            InputError: If a single input does not fit, or with several processes, which would have to halve together.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.group.world_size > 1:
            raise InputError(
                f"a shard of train.batch_size={self.micro_batch_size} does not fit into the memory of the GPU of rank "
                f"{self.group.rank}: {reason}\n"
                "Start more processes or lower train.batch_size; only a single process splits its batches."
            )
        if self.micro_batch_size == 1:
            raise InputError(
                f"one input does not fit into the memory of the GPU: {reason}\n"
                "Lower preprocess.image_size or model.channels, or use machine.device=cpu."
            )
        self.micro_batch_size = math.ceil(self.micro_batch_size / 2)
        log.warning(
            "the GPU is out of memory: batches of train.batch_size=%d are split into micro-batches of %d from step %d on",
            self.settings.batch_size,
            self.micro_batch_size,
            self.num_steps,
        )

    def state(self, result: TrainingResult) -> TrainingState:
        """Return the state of training, from which `restore` continues."""
        moments = self.optimizer.state_dict()["state"]
        tensors = {
            **{f"network.{name}": value for name, value in self.network.state_dict().items()},
            **{f"averaged.{name}": value for name, value in self.ema.state_dict().items()},
            **{f"optimizer.{i}.{name}": value for i, state in moments.items() for name, value in state.items()},
            **{f"best.{name}": value for name, value in result.weights.items()},
        }
        history = [asdict(epoch) for epoch in result.history]
        facts = {
            "history": history,
            "num_steps": self.num_steps,
            "batch_size": self.micro_batch_size,
            "precision": result.measured_precision,
        }
        return TrainingState(tensors=tensors, facts=facts)

    def restore(self, state: TrainingState) -> TrainingResult:
        """Load a state that `state` returned, and return its history and best weights."""
        self.network.load_state_dict(state.part("network"))
        self.ema.load_state_dict(state.part("averaged"))
        optimizer = self.optimizer.state_dict()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for key, value in state.part("optimizer").items():
            index, name = key.split(".")
            if value.ndim:  # the fused optimiser ignores strides: moments need the layout of their parameter
                value = torch.empty_like(parameters[int(index)], dtype=value.dtype, device="cpu").copy_(value)
            optimizer["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(optimizer)
        self.num_steps = int(state.facts["num_steps"])
        if self.group.world_size == 1:
            self.micro_batch_size = int(state.facts["batch_size"])
        return TrainingResult(history=[Epoch(**row) for row in state.facts["history"]], weights=state.part("best"))


def is_frozen(layer: nn.Module) -> bool:
    """Return whether a layer has parameters of its own, and none of them is trained."""
    own = list(layer.parameters(recurse=False))
    return bool(own) and not any(parameter.requires_grad for parameter in own)


def build_optimizer(network: nn.Module, settings: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimiser of a network; only weights of convolutions and linear layers decay.

    Biases, weights of norms and slopes of PReLU have one axis: decay would pull what the layer computes towards 0 without
    making the network simpler.
    """
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[settings.optimizer]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    decaying = [parameter for parameter in trained if parameter.ndim >= 2]
    others = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": decaying, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    device = decaying[0].device
    is_captured = can_capture(device)
    learning_rate = torch.tensor(settings.learning_rate, device=device) if is_captured else settings.learning_rate
    return kind(groups, lr=learning_rate, fused=True, capturable=is_captured)


@torch.no_grad()
def update_ema_(averaged: nn.Module, network: nn.Module, *, weight: torch.Tensor) -> None:
    """Move averaged weights and buffers towards those of the network by a fraction, which is a tensor of their device.

    Counts of batches, the only integers, are copied. AveragedModel would wait for the device.
    """
    pairs = [
        (one.detach(), other.detach())
        for part in (nn.Module.parameters, nn.Module.buffers)
        for one, other in zip(part(averaged), part(network), strict=True)
    ]
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    difference = torch._foreach_sub([value for _, value in floats], [average for average, _ in floats])
    torch._foreach_mul_(difference, weight)
    torch._foreach_add_([average for average, _ in floats], difference)
    if counts := [pair for pair in pairs if not pair[0].is_floating_point()]:
        torch._foreach_copy_([average for average, _ in counts], [value for _, value in counts])
