"""A stand-in for CUDA graphs on the CPU: operations are recorded once and executed again on the same memory.

Like a capture it executes nothing that remains: what the operations overwrite is restored, what they return is NaN until the
first replay. Numbers of Python are recorded as they were, and waiting for the device is an error.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from prostate_seg.segmentation.training import cuda_graph, training, training_step

aten = torch.ops.aten
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.unique_dim, aten._unique2, aten.is_nonzero}
"""Operations whose result Python needs; a capture refuses them."""


def alias(value: Any) -> Any:
    """Return another tensor of the same memory, so that no reference to gradients or their history is kept."""
    return value.detach() if isinstance(value, torch.Tensor) else value


class Tape(TorchDispatchMode):
    """Records operations with their arguments and results."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.created: set[int] = set()
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.generators = [(one, one.get_state()) for one in (torch.default_generator, *generators)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in WAITING:
            raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing\nmore lines")
        args, kwargs = tree_map(alias, (args, kwargs or {}))
        for tensor in tensors_of((args, kwargs)):
            place = tensor.untyped_storage().data_ptr()
            if place not in self.created and place not in self.before:
                self.before[place] = (tensor, tensor.clone())  # all: batch norm does not declare what it overwrites
        result = func(*args, **kwargs)
        known = {tensor.untyped_storage().data_ptr() for tensor in tensors_of((args, kwargs))}
        self.created |= {one.untyped_storage().data_ptr() for one in tensors_of(result)} - known
        self.operations.append((func, args, kwargs, tree_map(alias, result)))
        return result

    def undo(self) -> None:
        """Restore what was overwritten, and the random number generators."""
        for tensor, before in self.before.values():
            tensor.copy_(before)
        for generator, state in self.generators:
            generator.set_state(state)
        for *_, result in self.operations:
            for tensor in tensors_of(result):
                if tensor.untyped_storage().data_ptr() in self.created and tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    @torch.no_grad()
    def replay(self) -> None:
        """Execute the operations again, with results where they were."""
        for func, args, kwargs, before in self.operations:
            places = {tensor.untyped_storage().data_ptr() for tensor in tensors_of((args, kwargs))}
            for old, new in zip(tensors_of(before), tensors_of(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() not in places:
                    old.copy_(new)


class OneDevice(TorchDispatchMode):
    """Refuses operations between devices, such as copies from the host, for which a step would wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {tensor.device for tensor in tensors_of((args, kwargs, result))}
        assert len(devices) < 2, f"{func} between {devices}"
        return result


def tensors_of(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def use_tape(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let trainings on the CPU behave as on a GPU; return a list of what happens: capture, failure, replay."""
    events: list[str] = []

    def capture(
        function: Callable[[], torch.Tensor], *, stream: None, generators: Sequence[torch.Generator]
    ) -> Callable[[], torch.Tensor]:
        events.append("capture")
        tape = Tape(generators)
        try:
            with tape:
                output = function()
        except RuntimeError:
            events.append("failure")
            raise
        finally:
            tape.undo()

        def replay() -> torch.Tensor:
            events.append("replay")
            tape.replay()
            return output

        return replay

    for module in (training, training_step):
        monkeypatch.setattr(module, "can_capture", lambda device: True)
    monkeypatch.setattr(cuda_graph, "new_stream", lambda device: None)
    monkeypatch.setattr(cuda_graph, "run_on", lambda stream, function: function())
    monkeypatch.setattr(cuda_graph, "capture", capture)
    return events
