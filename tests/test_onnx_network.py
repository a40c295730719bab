"""Every exported ONNX network gives torch's probabilities for any batch size."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from prostate_seg.common.errors import InputError
from prostate_seg.segmentation.networks import onnx_network
from prostate_seg.segmentation.networks.networks import build_network
from prostate_seg.segmentation.networks.onnx_network import TOLERANCE, OnnxNetwork, export_onnx
from prostate_seg.segmentation.networks.resunet_a import _cell_maxima
from prostate_seg.segmentation.networks.settings import ModelName
from tests.segmentation_helpers import SIZE, small_model

pytest.importorskip("onnxruntime")


@pytest.mark.slow
@pytest.mark.parametrize("name", get_args(ModelName))
def test_exported_network_computes_the_same(name: ModelName, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small_model(name)
    network = build_network(model, num_regions=3).eval()
    difference = export_onnx(tmp_path / "network.onnx", network, model=model, image_size=SIZE)
    assert difference <= TOLERANCE
    inputs = torch.randn(5, *((1,) if name == "unet3d" else ()), model.num_slices, SIZE, SIZE)
    with torch.inference_mode():
        again = OnnxNetwork(tmp_path / "network.onnx")(inputs)
        torch.testing.assert_close(torch.sigmoid(again), torch.sigmoid(network(inputs)), atol=TOLERANCE, rtol=0)


def test_plain_maxima_are_those_of_adaptive_pooling() -> None:
    x = torch.randn(2, 3, 10, 7)
    for cells in (1, 2, 4, 7):
        torch.testing.assert_close(_cell_maxima(x, cells), nn.functional.adaptive_max_pool2d(x, cells), rtol=0, atol=0)


def test_a_network_with_other_outputs_is_refused_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model("unet")
    monkeypatch.setattr(onnx_network, "_difference", lambda *_: 0.5)
    with pytest.raises(InputError, match=r"must agree to 0.001 in probability, and differ by 0.5"):
        export_onnx(tmp_path / "network.onnx", build_network(model).eval(), model=model, image_size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_reported_with_the_install_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"pip install 'prostate-seg\[onnx\]'"):
        OnnxNetwork(tmp_path / "network.onnx")
