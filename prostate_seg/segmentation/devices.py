"""Choice of the device, and of the number format of forward passes."""

from contextlib import AbstractContextManager

import torch

from prostate_seg.common.errors import InputError
from prostate_seg.segmentation.settings import Device, Precision


def choose_device(device: Device) -> torch.device:
    """Return the torch device.

    Raises:
        InputError: If a GPU is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise InputError(
            "machine.device=cuda: torch sees no GPU here; use machine.device=auto or install a CUDA build of torch"
        )
    return torch.device("cuda" if available and device != "cpu" else "cpu")


def available_gpus(device: Device) -> range:
    """Return the indices of the GPUs in CUDA_VISIBLE_DEVICES; empty for the CPU. Errors as in `choose_device`."""
    return range(torch.cuda.device_count() if choose_device(device).type == "cuda" else 0)


def computes_bf16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities()
    return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


def autocast(device: torch.device, *, precision: Precision) -> AbstractContextManager[None]:
    """Return the autocast context of a forward pass; `auto` enables bfloat16 if the device computes natively in it."""
    enabled = precision == "bf16" or (precision == "auto" and computes_bf16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
