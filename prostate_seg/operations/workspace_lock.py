"""Workspace lock: a stage that would replace what a running stage reads or writes is refused.

Each running stage holds an operating-system lock on a file in the cache, which is released when its process ends, also by
kill -9. A note beside it lists what the stage reads and replaces. Trainings do not exclude each other: they lock fold by fold.
"""

import os
import socket
import uuid
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import read_json, write_json
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.operations.process import now_text, user_name

TIMEOUT_SECONDS = 60
"""Reading the notes takes milliseconds; a process that hangs meanwhile must not block all others."""


def lock_workspace(cfg: Config, workspace: Workspace) -> ExitStack | None:
    """Lock the workspace for a stage until the stack is closed; None for one that neither reads nor replaces its files.

    Raises:
        InputError: If a running stage reads what this one would replace, or the other way round.
    """
    read, replaced = _read_and_replaced(cfg, workspace)
    if not (read or replaced):
        return None
    folder = workspace.cache / "running"
    folder.mkdir(parents=True, exist_ok=True)
    own = {
        "stage": cfg.stage,
        "reads": [str(path.absolute()) for path in read],
        "replaces": [str(path.absolute()) for path in replaced],
        "who": f"process {os.getpid()} of {user_name()} on {socket.gethostname()}, since {now_text()}",
    }
    with FileLock(folder / "look.lock", timeout=TIMEOUT_SECONDS):
        for note in sorted(folder.glob("*.json")):
            lock = FileLock(note.with_suffix(".lock"), timeout=0)
            try:
                lock.acquire()
            except Timeout:
                with suppress(FileNotFoundError):  # that stage has just ended
                    _require_compatible(own, read_json(note))
            else:  # its process was killed
                _release(lock)
        lock = FileLock(folder / f"{cfg.stage}-{uuid.uuid4().hex}.lock")
        lock.acquire()
        write_json(Path(lock.lock_file).with_suffix(".json"), own)
    held = ExitStack()
    held.callback(_release, lock)
    return held


def _release(lock: BaseFileLock) -> None:
    file = Path(lock.lock_file)
    file.with_suffix(".json").unlink(missing_ok=True)
    lock.release()
    file.unlink(missing_ok=True)


def _read_and_replaced(cfg: Config, workspace: Workspace) -> tuple[list[Path], list[Path]]:
    """Return the paths that a stage reads, and those that it replaces."""
    is_external = cfg.evaluate.external_root is not None
    evaluation = workspace.external_evaluation if is_external else workspace.evaluation
    report = workspace.external_report if is_external else workspace.report
    made = [workspace.data, workspace.preprocess, workspace.kfold_json]
    initial = [Path(cfg.train.init)] if cfg.train.init is not None and Path(cfg.train.init).is_dir() else []
    is_writable = os.access(workspace.root, os.W_OK)  # networks in another user's workspace are read without a lock
    return {
        "inspect": (made[:1], [workspace.inspection]),
        "predict": ([workspace.model] if cfg.predict.model is None and is_writable else [], []),
        "fetch": ([], [workspace.data]),
        "preprocess": (made[:1], [workspace.preprocess]),
        "prepare": (made[:2], [workspace.kfold_json]),
        "train": ([*made, *initial], [workspace.model]),
        "evaluate": ([*made, workspace.model], [evaluation]),
        "stress": ([*made, workspace.model], [workspace.stress]),
        "report": ([*made, workspace.model, evaluation, workspace.stress], [report]),
        "register": ([*made, workspace.model, evaluation, workspace.stress], []),
    }.get(str(cfg.stage), ([], []))


def _require_compatible(own: dict[str, Any], other: dict[str, Any]) -> None:
    if own["stage"] == other["stage"] == "train":
        return
    replaced = sorted({*own["replaces"]} & {*other["reads"], *other["replaces"]})
    read = sorted({*own["reads"]} & {*other["replaces"]})
    if replaced:
        conflict = f"would replace {replaced[0]}, with which stage={other['stage']} works"
    elif read:
        conflict = f"reads {read[0]}, which stage={other['stage']} is about to replace"
    else:
        return
    raise InputError(
        f"{own['stage']} {conflict} ({other['who']})\n"
        "Wait until it has ended, or use a folder of your own: paths.root=DIR"
    )
