"""All preprocessed studies in one memory-mapped file, so that a batch is a few pages and not a few files.

images.raw and masks.raw are [slices of all studies, Y, X], studies one after the other; index.json says where each begins.
They are mapped copy-on-write, because torch warns of arrays that it could not write to.
The folder is made once per preprocessing and shared by all folds.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from prostate_seg.common.files import atomic_folder, read_json, write_json
from prostate_seg.segmentation.inference.intensity import Intensity, measure_intensity

ReadCase = Callable[[str], tuple[np.ndarray, np.ndarray]]
"""Returns image and 0/1 mask of a case, both [Z, Y, X]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedCase:
    """Where a study lies in the packed arrays."""

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
    """[slices, Y, X], uint8 0 or 1."""
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
                index.append(
                    PackedCase(
                        case_id=case_id,
                        first_slice=first,
                        num_slices=len(image),
                        intensity=measure_intensity(image, clip=zscore),
                    )
                )
                images.write(np.ascontiguousarray(image).tobytes())
                masks.write(np.ascontiguousarray(mask, dtype=np.uint8).tobytes())
        write_json(
            fresh / "index.json",
            {
                "dtype": str(image.dtype),
                "shape_yx": list(image.shape[1:]),
                "cases": [asdict(case) for case in index],
            },
        )
    return open_packed(folder)


def open_packed(folder: Path) -> PackedSet:
    """Map a packed set into memory."""
    index = read_json(folder / "index.json")
    cases = list(_cases(index["cases"]))
    shape = (cases[-1].last_slice + 1, *index["shape_yx"])
    return PackedSet(
        images=np.memmap(folder / "images.raw", dtype=index["dtype"], mode="c", shape=shape),
        masks=np.memmap(folder / "masks.raw", dtype=np.uint8, mode="c", shape=shape),
        cases={case.case_id: case for case in cases},
    )


def is_packed(folder: Path) -> bool:
    """Return whether a complete packed set is there."""
    return (folder / "index.json").is_file()


def _cases(rows: Iterable[dict]) -> Iterable[PackedCase]:
    for row in rows:
        yield PackedCase(**{**row, "intensity": Intensity(**row["intensity"])})
