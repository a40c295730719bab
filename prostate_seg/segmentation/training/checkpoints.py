"""The state of an unfinished training on disk, from which it goes on as if it had never stopped.

One safetensors file an epoch, written beside and renamed; the two newest of a training are kept. Its name and content carry the
training's identity, and its content a checksum, so that a damaged one is noticed, set aside, and the one before is used.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import atomic_path

log = logging.getLogger(__name__)

NUM_KEPT = 2
"""Newest checkpoints that stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """All that the next epoch depends on."""

    tensors: Mapping[str, torch.Tensor]
    """Network, running mean, optimiser and best weights, by dotted name."""
    facts: Mapping[str, Any]
    """Plain JSON: history and number of steps."""

    def part(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors below a name, without it."""
        start = f"{name}."
        return {key.removeprefix(start): value for key, value in self.tensors.items() if key.startswith(start)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """The checkpoints of one training in a folder."""

    folder: Path
    identity: str
    """Hash of all that decides the training; a checkpoint of another one is neither used nor removed."""

    def save(self, state: TrainingState, *, epoch: int) -> None:
        """Write the state after an epoch, and remove all but the newest.

        Raises:
            InputError: If it cannot be written, as on a full disk; the checkpoint before is whole.
        """
        # Copies: DynUNet knows some of its layers by two names, and safetensors takes no memory twice.
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.tensors.items()}
        metadata = {"identity": self.identity, "facts": json.dumps(state.facts), "md5": _md5(tensors)}
        path = self.folder / f"epoch{epoch:06d}{self._suffix}"
        try:
            with atomic_path(path) as temporary:
                save_file(tensors, temporary, metadata=metadata)
        except (OSError, SafetensorError) as error:
            megabytes = sum(value.nbytes for value in tensors.values()) / 1e6
            raise InputError(
                f"{path} cannot be written: {error}\n"
                f"Make room (each takes {megabytes:.1f} MB) or mend the disk, then give the same command again: "
                f"training goes on after epoch {epoch - 1}."
            ) from error
        for path in self._files()[:-NUM_KEPT]:
            path.unlink()

    def newest(self) -> TrainingState | None:
        """Return the newest state of this training that can be read; damaged files are renamed to *.damaged."""
        if not self._files() and any(self.folder.glob("epoch*.safetensors")):
            log.info(
                "training starts at epoch 1: the checkpoints in %s belong to another training (other settings, seed or data, "
                "or another version of prostate_seg)",
                self.folder,
            )
        for path in reversed(self._files()):
            try:
                with safe_open(path, framework="pt") as file:
                    metadata = file.metadata() or {}
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                if metadata["identity"] != self.identity:
                    raise ValueError(f"it belongs to the training {metadata['identity']}")
                if metadata["md5"] != _md5(tensors):
                    raise ValueError("its checksum is another")
                return TrainingState(tensors=tensors, facts=json.loads(metadata["facts"]))
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                aside = path.with_name(f"{path.name}.damaged")
                path.replace(aside)
                log.warning("%s is damaged (%s): set aside as %s; the one before is used", path, error, aside.name)
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"epoch*{self._suffix}"))

    @property
    def _suffix(self) -> str:
        return f"_{self.identity[:8]}.safetensors"


def _md5(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the md5 of names and values; the bytes of a tensor do not depend on its type being known to numpy."""
    digest = hashlib.md5(usedforsecurity=False)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
