"""Settings that several parts of segmentation share. No torch."""

from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
"""Device of tensors; `auto` takes a GPU if one is available."""
Precision = Literal["auto", "bf16", "fp32"]
"""Number format of the forward pass; `auto` takes bfloat16 if the processor computes in it, and in training on a GPU what is
faster there."""
