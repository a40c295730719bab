"""The training step on a GPU: as a CUDA graph, whose kernels are recorded once and launched together, in the faster precision.

A step of a small network launches about a thousand kernels, for which Python needs several times longer than the GPU. A graph
reads and writes the same memory each time, so whatever changes between steps is a tensor on the device: slice indices, learning
rate, number of steps, and the states of the random number generators, which a replay advances as a step does.
"""

import logging
import time
from collections.abc import Callable, Sequence

import torch

from prostate_seg.segmentation.devices import computes_bf16
from prostate_seg.segmentation.settings import Precision

log = logging.getLogger(__name__)

NUM_STEPS_BEFORE = 3
"""Steps before the capture: they create what a capture cannot, such as the optimiser's state, cuDNN's handles and constants."""
NUM_TIMED_STEPS = 20
MAX_BF16_TIME = 0.95
"""Time of a bfloat16 step relative to a float32 step below which bfloat16 is used; equal steps are float32 in every run."""

Step = Callable[[torch.Tensor], torch.Tensor]
"""Takes a training step on slices, int64 [B], and returns its loss; both are on the device."""


class GraphedStep:
    """A training step that is captured after its first calls, and replayed from then on.

    The calls before the capture are steps of the training, and a replay gives the same bits as a call. If the capture fails,
    the reason is logged, and every step remains a call.
    """

    def __init__(self, step: Step, *, batch_size: int, rng: torch.Generator):
        self.step, self.rng = step, rng
        self.slices = torch.zeros(batch_size, dtype=torch.int64, device=rng.device)
        self.stream = new_stream(rng.device)
        self.num_calls = 0
        self.replay: Callable[[], torch.Tensor] | None = None

    def __call__(self, slices: torch.Tensor) -> torch.Tensor:
        """Take a step and return its loss; an OutOfMemoryError leaves the weights as they were."""
        self.slices.copy_(slices)
        if self.num_calls == NUM_STEPS_BEFORE:
            self.replay = self._capture()
        if self.replay is not None:
            loss = self.replay().clone()
        elif self.num_calls < NUM_STEPS_BEFORE:
            loss = run_on(self.stream, self._call)
        else:
            loss = self._call()
        self.num_calls += 1
        return loss

    def _call(self) -> torch.Tensor:
        return self.step(self.slices)

    def _capture(self) -> Callable[[], torch.Tensor] | None:
        """Return a function that replays the step and returns its loss, or None if the step cannot be captured."""
        try:
            return capture(self._call, stream=self.stream, generators=[self.rng])
        except RuntimeError as error:  # torch.OutOfMemoryError and torch.AcceleratorError are derived from it
            # The end of a failed capture raises another error; the context can also be that of a caller.
            first_error = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            reason = (str(first_error).splitlines() or [type(first_error).__name__])[0]
            log.warning("the training step is not captured as a CUDA graph, and is slower: %s", reason)
            return None


def can_capture(device: torch.device) -> bool:
    """Return whether training steps on a device are captured, and depend on tensors of the device only."""
    return device.type == "cuda"


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream besides the default one, on which nothing can be captured."""
    return torch.cuda.Stream(device)


def run_on(stream: torch.cuda.Stream, function: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Call a function on a stream, after what the current stream has to do, and before what it is given next."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        result = function()
    torch.cuda.current_stream(stream.device).wait_stream(stream)
    return result


def capture(
    function: Callable[[], torch.Tensor], *, stream: torch.cuda.Stream, generators: Sequence[torch.Generator]
) -> Callable[[], torch.Tensor]:
    """Record the kernels that a function launches, without executing them.

    Args:
        function: Launches kernels that depend on tensors only, and waits for none of them.
        stream: Stream of the recording.
        generators: Random number generators of the function besides the default one.

    Returns:
        A function that launches the kernels and returns the tensor they write, at the same address each time.

    Raises:
        RuntimeError: If the function waits for the device, or its memory does not fit.
    """
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    # The outer context restores the current stream: torch's own does not if the capture fails.
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        output = function()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


def faster_precision(step_in: Callable[[Precision], Step], slices: torch.Tensor) -> Precision:
    """Return the precision whose steps are faster, and log both times.

    Args:
        step_in: Returns a step of a network that is not trained, in a precision.
        slices: Slices of a batch, on the device.
    """
    if not computes_bf16(slices.device):
        return "fp32"
    fp32, bf16 = (_seconds(step_in(precision), slices) for precision in ("fp32", "bf16"))
    faster: Precision = "bf16" if bf16 < MAX_BF16_TIME * fp32 else "fp32"
    log.info(
        "train.precision=auto is %s here: a step takes %.2f ms in fp32, %.2f ms in bf16",
        faster,
        1000 * fp32,
        1000 * bf16,
    )
    return faster


def _seconds(step: Step, slices: torch.Tensor) -> float:
    """Return the mean seconds of a step, after those that precede its capture and its first replays."""
    for _ in range(NUM_STEPS_BEFORE + 3):
        step(slices).item()  # waits for the device
    start = time.perf_counter()
    for _ in range(NUM_TIMED_STEPS):
        loss = step(slices)
    loss.item()
    return (time.perf_counter() - start) / NUM_TIMED_STEPS
