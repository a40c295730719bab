"""Packed set: all preprocessed studies in one memory-mapped file per array, and the training batches drawn from it.

images.raw and masks.raw are [slices of all studies, Y, X], one study after the other; index.json has the first slice of each.
The folder is written once per preprocessing and shared by all folds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import numpy as np
import torch

from prostate_seg.common.files import atomic_folder, read_json, write_json
from prostate_seg.segmentation.inference.network_input import Intensity, measure_intensity, patches
from prostate_seg.segmentation.networks.networks import is_3d
from prostate_seg.segmentation.networks.storage import Recipe
from prostate_seg.segmentation.training.settings import TrainingSlices

ReadCase = Callable[[str], tuple[np.ndarray, np.ndarray]]
"""Returns image and mask of a case, both [Z, Y, X]; regions are the bits of the mask (`imaging.regions`)."""
GPU_FRACTION_FOR_DATA = 0.5
"""Fraction of a GPU's free memory that the packed set may fill; a larger set stays on the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedCase:
    """Position of a study in the packed arrays."""

    case_id: str
    first_slice: int
    num_slices: int
    intensity: Intensity

    @property
    def last_slice(self) -> int:
        """Index of the study's last slice."""
        return self.first_slice + self.num_slices - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedSet:
    """Studies on disk, mapped into memory."""

    images: np.ndarray
    """[slices, Y, X], uint8 or float32."""
    masks: np.ndarray
    """[slices, Y, X], uint8; regions are bits."""
    cases: dict[str, PackedCase]
    """By case id, in packed order."""

    def slices_of(self, case_ids: Sequence[str]) -> np.ndarray:
        """Return the indices of all slices of some cases, int64."""
        ranges = [np.arange(self.cases[i].first_slice, self.cases[i].last_slice + 1) for i in case_ids]
        return np.concatenate(ranges) if ranges else np.empty(0, dtype=np.int64)


def pack(folder: Path, case_ids: Sequence[str], *, read_case: ReadCase, zscore: bool) -> PackedSet:
    """Write the packed set, one study in memory at a time, and open it."""
    with atomic_folder(folder) as fresh:
        index: list[PackedCase] = []
        with (fresh / "images.raw").open("wb") as images, (fresh / "masks.raw").open("wb") as masks:
            for case_id in case_ids:
                image, mask = read_case(case_id)
                first = index[-1].last_slice + 1 if index else 0
                intensity = measure_intensity(image, clip=zscore)
                index.append(PackedCase(case_id=case_id, first_slice=first, num_slices=len(image), intensity=intensity))
                images.write(np.ascontiguousarray(image).tobytes())
                masks.write(np.ascontiguousarray(mask, dtype=np.uint8).tobytes())
        cases = [asdict(case) for case in index]
        write_json(fresh / "index.json", {"dtype": str(image.dtype), "shape_yx": list(image.shape[1:]), "cases": cases})
    return open_packed(folder)


def open_packed(folder: Path) -> PackedSet:
    """Map a packed set into memory, copy-on-write: torch warns about arrays that it could not write to."""
    index = read_json(folder / "index.json")
    cases = [PackedCase(**{**row, "intensity": Intensity(**row["intensity"])}) for row in index["cases"]]
    shape = (cases[-1].last_slice + 1, *index["shape_yx"])
    return PackedSet(
        images=np.memmap(folder / "images.raw", dtype=index["dtype"], mode="c", shape=shape),
        masks=np.memmap(folder / "masks.raw", dtype=np.uint8, mode="c", shape=shape),
        cases={case.case_id: case for case in cases},
    )


def is_packed(folder: Path) -> bool:
    """Return whether a complete packed set exists."""
    return (folder / "index.json").is_file()


class Batches:
    """The training batches of a fold, drawn from the packed set."""

    def __init__(self, packed: PackedSet, recipe: Recipe, *, device: torch.device, kind: TrainingSlices = "all"):
        self.model, self.device = recipe.model, device
        self.num_regions = len(recipe.preprocess.regions)
        self.images, self.masks = torch.from_numpy(packed.images), torch.from_numpy(packed.masks)
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if self.images.nbytes + self.masks.nbytes < GPU_FRACTION_FOR_DATA * free:
                self.images, self.masks = self.images.to(device), self.masks.to(device)
        # For every slice of the set: first and last slice of its study, and [4, slices] low, high, mean and SD.
        cases = list(packed.cases.values())
        rows = [(case.first_slice, case.last_slice) for case in cases]
        values = [astuple(case.intensity) for case in cases]
        repeats = [case.num_slices for case in cases]
        self.ends = torch.from_numpy(np.repeat(rows, repeats, axis=0).T).to(self.images.device)
        intensity = np.repeat(values, repeats, axis=0).T
        self.intensity = torch.tensor(intensity, dtype=torch.float32, device=self.images.device)
        self.slices = packed.slices_of(recipe.train_ids)
        if kind == "gland":
            self.slices = self.slices[packed.masks[self.slices].any(axis=(1, 2))]

    def order(self, batch_size: int, *, num_batches: int, rng: np.random.Generator) -> np.ndarray:
        """Return [num_batches, batch_size] slice indices; each slice is drawn once before any is drawn again."""
        num_passes = math.ceil(num_batches * batch_size / len(self.slices))
        order = np.concatenate([rng.permutation(self.slices) for _ in range(num_passes)])
        return order[: num_batches * batch_size].reshape(num_batches, batch_size)

    def load(self, slices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return standardised images [B, C, Y, X] and masks [B, D, Y, X] with regions as bits, both float, on the device.

        `slices` are the indices of the central slices, int64 [B], where the packed set is.
        """
        (first, last), depth = self.ends[:, slices], self.model.num_slices
        rows = patches(slices - depth // 2, depth=depth, first=first, last=last)
        target_rows = rows if is_3d(self.model) else slices[:, None]
        low, high, mean, sd = self.intensity[:, slices, None, None, None].to(self.device)
        images = self.images[rows].to(self.device, torch.float32)
        masks = self.masks[target_rows].to(self.device, torch.float32)
        return images.clamp_(low, high).sub_(mean).div_(sd), masks

    def regions_of(self, masks: torch.Tensor) -> torch.Tensor:
        """Return 0/1 masks [B, regions * D, Y, X] of those of `load`."""
        if self.num_regions == 1:
            return masks
        bits = masks.to(torch.uint8)
        return torch.cat([bits >> number & 1 for number in range(self.num_regions)], dim=1).to(torch.float32)
