"""Settings of the group `model`. No torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from prostate_seg.common.settings import Range, Rule, Settings

ModelName = Literal["unet", "attention_unet", "resunet_a", "dynunet", "segresnet", "unet3d"]
Backend = Literal["torch", "onnx"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Settings):
    """Network architecture."""

    name: ModelName
    """Network in segmentation/networks/networks.py."""
    num_slices: Annotated[int, Range(ge=1)]
    """Slices per input: 1 in 2-D, neighbours as channels in 2.5-D, depth of the patch in 3-D."""
    channels: list[int]
    """Feature channels per level, finest first."""
    strides: list[list[int]]
    """Strides between levels, (y, x) or (z, y, x) each; one entry fewer than channels."""
    num_res_units: Annotated[int, Range(ge=0, le=8)]
    """Residual units per level; 0 for plain convolutions. For dynunet 0 or 1 (off or on); for segresnet at least 1."""
    dilations: list[list[int]] | None
    """Dilations of resunet_a's parallel branches, a list per level, finest first; null for every other network."""
    norm: Literal["instance", "batch"]
    """Normalisation after each convolution."""
    activation: Literal["prelu", "relu", "leakyrelu"]
    """Activation after each normalisation."""
    dropout: Annotated[float, Range(ge=0, lt=1)]
    """Dropout probability."""

    def _rules(self) -> list[Rule]:
        dims = 3 if self.name == "unet3d" else 2
        suffix = f" for model.name={self.name}"
        own = [(key, is_allowed, rule + suffix) for key, is_allowed, rule in self._rules_of_network()]
        is_dilated = self.name == "resunet_a"
        return [
            ("num_slices", dims == 3 or self.num_slices % 2 == 1, "must be odd: a slice and as many on both sides"),
            ("channels", len(self.channels) >= 2 and min(self.channels) >= 1, "must be two or more numbers above 0"),
            ("strides", len(self.strides) == len(self.channels) - 1, "must have one entry fewer than model.channels"),
            (
                "strides",
                all(len(level) == dims and min(level) >= 1 for level in self.strides),
                f"must have {dims} numbers above 0 per level{suffix}",
            ),
            *own,
            ("dilations", is_dilated or self.dilations is None, f"must be null{suffix}"),
        ]

    def _rules_of_network(self) -> list[Rule]:
        if self.name == "attention_unet":
            return [
                ("num_res_units", self.num_res_units == 0, "must be 0"),
                ("norm", self.norm == "batch", "must be batch"),
                ("activation", self.activation == "relu", "must be relu"),
            ]
        if self.name == "resunet_a":
            dilations = self.dilations or []
            has_all_levels = len(dilations) == len(self.channels)
            return [
                ("num_res_units", self.num_res_units == 0, "must be 0 (each dilation is a residual branch)"),
                (
                    "dilations",
                    has_all_levels and all(level and min(level) >= 1 for level in dilations),
                    "must be a list of numbers above 0 for each of model.channels",
                ),
            ]
        if self.name == "dynunet":
            return [
                ("num_res_units", self.num_res_units <= 1, "must be 0 or 1"),
                ("channels", len(self.channels) >= 3, "must be three or more numbers"),
            ]
        if self.name == "segresnet":
            doubled = [self.channels[0] * 2**level for level in range(len(self.channels))] if self.channels else []
            return [
                ("num_res_units", self.num_res_units >= 1, "must be at least 1"),
                ("channels", self.channels == doubled, "must double from level to level"),
                ("strides", all(set(level) == {2} for level in self.strides), "must all be 2"),
            ]
        return []
