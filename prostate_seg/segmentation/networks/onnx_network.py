"""Export of networks to ONNX, and inference with ONNX Runtime.

The packages are the optional extra `onnx`. Inputs and logits are those of the network itself, float32; only the batch varies.
"""

import importlib
import logging
import warnings
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from prostate_seg.common.errors import InputError, first_line
from prostate_seg.common.files import atomic_path
from prostate_seg.segmentation.networks.networks import is_3d
from prostate_seg.segmentation.networks.settings import ModelConfig

TOLERANCE = 1e-3
"""Largest difference in probability between ONNX Runtime and torch that counts as rounding."""


class OnnxNetwork(nn.Module):
    """A network that was exported to ONNX, run by ONNX Runtime on the CPU."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        runtime = _require("onnxruntime")
        if not path.is_file():
            raise InputError(
                f"{path.parent} has no {path.name}, which predict.backend=onnx runs: register the model with "
                "register.onnx=true, or take predict.backend=torch"
            )
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1  # several batches run side by side, see `network_threads`
        self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits of the inputs, on the CPU."""
        (logits,) = self._session.run(None, {"image": x.float().cpu().numpy()})
        return torch.from_numpy(logits)


def export_onnx(path: Path, network: nn.Module, *, model: ModelConfig, image_size: int) -> float:
    """Export a network, in eval mode on the CPU, and return its largest difference in probability on random inputs.

    Raises:
        InputError: If a package is missing, the export fails, or the difference is above `TOLERANCE`.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _require(package)
    lead = (1, model.num_slices) if is_3d(model) else (model.num_slices,)
    noise = torch.randn(3, *lead, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with atomic_path(path) as temporary:
        _export(temporary, network, noise[:2])
        difference = _difference(network, OnnxNetwork(temporary), noise)
        if difference > TOLERANCE:
            raise InputError(
                f"{path.parent.name}: ONNX Runtime and torch must agree to {TOLERANCE:g} in probability, and differ by "
                f"{difference:.2g}; register without register.onnx"
            )
    return difference


def _export(path: Path, network: nn.Module, example: torch.Tensor) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is absent, which is not needed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                network,
                (example,),
                str(path),
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        raise InputError(
            f"this network cannot be written as ONNX: {first_line(error)}\nRegister without register.onnx."
        ) from error


@torch.inference_mode()
def _difference(network: nn.Module, exported: nn.Module, inputs: torch.Tensor) -> float:
    return float((torch.sigmoid(network(inputs)) - torch.sigmoid(exported(inputs))).abs().max())


def _require(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"{package} is not installed, which ONNX needs: pip install 'prostate-seg[onnx]', or do without ONNX"
        ) from error
