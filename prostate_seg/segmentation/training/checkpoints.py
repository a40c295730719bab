"""Checkpoints of an unfinished training: one safetensors file per epoch, written atomically; the two newest are kept.

File name and metadata contain the identity of the training, and the metadata a checksum of the tensors: a damaged checkpoint
is detected and set aside, and the one before is used.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """Everything the next epoch depends on."""

    tensors: Mapping[str, torch.Tensor]
    """Network, EMA weights, optimiser and best weights, by dotted name."""
    facts: Mapping[str, Any]
    """JSON values: history and number of steps."""

    def part(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors below a dotted prefix, without the prefix."""
        start = f"{name}."
        return {key.removeprefix(start): value for key, value in self.tensors.items() if key.startswith(start)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """The checkpoints of one training in a folder."""

    folder: Path
    identity: str
    """Hash of everything that determines the training; checkpoints of another training are neither used nor removed."""

    def save(self, state: TrainingState, *, epoch: int) -> None:
        """Write the state after an epoch, and remove all but the newest checkpoints.

        Raises:
            InputError: If the file cannot be written, as on a full disk; the previous checkpoint stays intact.
        """
        # clone: DynUNet registers some layers under two names, and safetensors refuses tensors that share memory.
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.tensors.items()}
        metadata = {"identity": self.identity, "facts": json.dumps(state.facts), "md5": _md5(tensors)}
        path = self.folder / f"epoch{epoch:06d}_{self.identity[:8]}.safetensors"
        try:
            with atomic_path(path) as temporary:
                save_file(tensors, temporary, metadata=metadata)
        except (OSError, SafetensorError) as error:
            megabytes = sum(value.nbytes for value in tensors.values()) / 1e6
            raise InputError(
                f"{path} cannot be written: {error}\n"
                f"Free some space (each takes {megabytes:.1f} MB) or fix the disk, then give the same command again: "
                f"training goes on after epoch {epoch - 1}."
            ) from error
        for path in self._files()[:-NUM_KEPT]:
            path.unlink()

    def newest(self) -> TrainingState | None:
        """Return the newest readable state of this training; damaged files are renamed to *.damaged."""
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
                    raise ValueError("checksum mismatch")
                return TrainingState(tensors=tensors, facts=json.loads(metadata["facts"]))
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                aside = path.with_name(f"{path.name}.damaged")
                path.replace(aside)
                log.warning("%s is damaged (%s): set aside as %s; the one before is used", path, error, aside.name)
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"epoch*_{self.identity[:8]}.safetensors"))


def _md5(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the md5 of names and bytes; the view as uint8 covers types that NumPy lacks, such as bfloat16."""
    digest = hashlib.md5(usedforsecurity=False)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
