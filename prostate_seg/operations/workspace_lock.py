"""Who works in a workspace: a stage that would replace what another one reads or writes is refused while that one runs.

Each running stage holds a lock of the operating system on a file of its own in the cache, which ends with its process, also
with kill -9. Trainings do not exclude each other: they take turns fold by fold.
"""

import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import read_json, write_json
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.operations.process import now_text, user_name

SECONDS_TO_LOOK = 60
"""Looking who else is there takes milliseconds; a process that hangs meanwhile must not keep all others out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupation:
    """The files that say that a stage runs."""

    note: Path
    lock: BaseFileLock

    def end(self) -> None:
        """Say that it runs no more."""
        self.note.unlink(missing_ok=True)
        self.lock.release()
        Path(self.lock.lock_file).unlink(missing_ok=True)


def touches(cfg: Config, workspace: Workspace) -> bool:
    """Return whether a stage reads or replaces what another one does."""
    return any(_touched(cfg, workspace))


def occupy(cfg: Config, workspace: Workspace) -> Occupation:
    """Say in the workspace's cache that a stage runs, what it reads and what it replaces.

    Raises:
        InputError: If another stage that runs there reads what this one would replace, or the other way round.
    """
    folder = workspace.cache / "running"
    folder.mkdir(parents=True, exist_ok=True)
    own = _note_of(cfg, workspace)
    with FileLock(folder / "look.lock", timeout=SECONDS_TO_LOOK):
        for other in _running(folder):
            _require_apart(own, other)
        name = f"{cfg.stage}-{uuid.uuid4().hex}"
        lock = FileLock(folder / f"{name}.lock")
        lock.acquire()
        write_json(folder / f"{name}.json", own)
    return Occupation(note=folder / f"{name}.json", lock=lock)


def _note_of(cfg: Config, workspace: Workspace) -> dict[str, Any]:
    read, replaced = _touched(cfg, workspace)
    return {
        "stage": cfg.stage,
        "reads": [str(path.absolute()) for path in read],
        "replaces": [str(path.absolute()) for path in replaced],
        "who": f"process {os.getpid()} of {user_name()} on {socket.gethostname()}, since {now_text()}",
    }


def _touched(cfg: Config, workspace: Workspace) -> tuple[list[Path], list[Path]]:
    """Return what a stage reads, and what it replaces."""
    one, is_external = workspace, cfg.evaluate.external_root is not None
    evaluation = one.external_evaluation if is_external else one.evaluation
    made = [one.data, one.preprocess, one.kfold_json]
    may_note = os.access(one.root, os.W_OK)  # the networks may be somebody else's
    own_model = [one.model] if cfg.predict.model is None and may_note else []
    return {
        "inspect": (made[:1], [one.inspection]),
        "predict": (own_model, []),  # several may share a folder of predictions
        "fetch": ([], [one.data]),
        "preprocess": (made[:1], [one.preprocess]),
        "prepare": (made[:2], [one.kfold_json]),
        "train": (made, [one.model]),
        "evaluate": ([*made, one.model], [evaluation]),
        "report": ([*made, one.model, evaluation], [one.external_report if is_external else one.report]),
        "register": ([*made, one.model, evaluation], []),
    }.get(str(cfg.stage), ([], []))


def _running(folder: Path) -> list[dict[str, Any]]:
    """Return the notes of the stages that run, and remove those that killed ones have left."""
    found = []
    for note in sorted(folder.glob("*.json")):
        lock = FileLock(note.with_suffix(".lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            found.append(read_json(note))
            continue
        Occupation(note=note, lock=lock).end()
    return found


def _require_apart(own: dict[str, Any], other: dict[str, Any]) -> None:
    if own["stage"] == other["stage"] == "train":
        return
    replaced = sorted({*own["replaces"]} & {*other["reads"], *other["replaces"]})
    read = sorted({*own["reads"]} & {*other["replaces"]})
    if replaced or read:
        what = f"would replace {replaced[0]}, with which" if replaced else f"reads {read[0]}, which"
        does = "works" if replaced else "is about to replace"
        raise InputError(
            f"{own['stage']} {what} stage={other['stage']} {does} ({other['who']})\n"
            "Wait until it has ended, or use a folder of your own: paths.root=DIR"
        )
