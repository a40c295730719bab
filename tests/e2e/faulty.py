"""Run the launcher with a fault built in: `python faulty.py FAULT PLACE ARGUMENTS...`.

FAULT is raise, nan, oom, exit0, exit3, kill (as kill -9), or hang, which makes the file `hanging` and waits for a signal. PLACE
is preprocess, fold1 (the second fold of a training), close, where results are logged, trainings (at the end of each, so that
ok,raise lets the second fail), claim, where a sweep has just claimed a trial, told, where it records the objective of its
second, delivery, where a store is sent something (ok,ok,kill lets the third end it), or tables, in the midst of creating those
of a new store. FAULT none with PLACE impatient waits for a store that fails at the end of a stage for two seconds instead of
half a minute.
"""

import os
import signal
import sys
import time
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from prostate_seg.__main__ import main


def misbehave(fault: str) -> None:
    if fault == "raise":
        raise RuntimeError("built-in fault")
    if fault == "oom":
        import torch

        raise torch.OutOfMemoryError("built-in fault")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        Path("hanging").touch()
        time.sleep(120)
    sys.exit(int(fault.removeprefix("exit")))


def build_in(fault: str, place: str) -> None:
    if place == "preprocess":
        from prostate_seg.stages import preprocess

        preprocess.discover_cases = lambda *_, **__: misbehave(fault)  # type: ignore[assignment,return-value]
    elif place == "fold1":
        from prostate_seg.stages import train

        train.fit = in_turn(train.fit, ["ok", fault])
    elif place == "trainings":
        from prostate_seg.stages import train

        train.collect_folds = in_turn(train.collect_folds, fault.split(","))
    elif place == "claim":
        from prostate_seg.sweeping.study import SharedStudy

        SharedStudy.suggest = lambda *_: misbehave(fault)  # type: ignore[method-assign,assignment,return-value]
    elif place == "told":
        from prostate_seg.sweeping.study import SharedStudy

        tell, complete = SharedStudy.tell, in_turn(SharedStudy.tell, ["ok", fault])

        def faulty_tell(study: Any, trial: Any, state: Any, *values: Any) -> Any:
            return (complete if state.name == "COMPLETE" else tell)(study, trial, state, *values)

        SharedStudy.tell = faulty_tell  # type: ignore[method-assign]
    elif place == "delivery":
        from prostate_seg.tracking.replication import Replicator

        Replicator._apply = in_turn(Replicator._apply, fault.split(","))  # type: ignore[method-assign]
    elif place == "tables":
        from sqlalchemy import Engine, event

        event.listen(Engine, "before_cursor_execute", in_turn(lambda *_: None, ["ok"] * 200 + [fault]))
    elif place == "impatient":
        from prostate_seg.tracking import tracked_run

        tracked_run.SECONDS_TO_CLOSE = 2.0
    elif place == "close":
        from prostate_seg.tracking.tracked_run import TrackedRun

        TrackedRun._log_results = lambda *_: misbehave(fault)  # type: ignore[method-assign,assignment,return-value]


def in_turn(function: Any, faults: list[str]) -> Any:
    """Return the function, whose first calls have these faults."""
    waiting = chain(faults, repeat("ok"))

    def faulty(*arguments: Any, **keywords: Any) -> Any:
        fault = next(waiting)
        if fault == "nan":
            return {0: float("nan")}
        return function(*arguments, **keywords) if fault == "ok" else misbehave(fault)

    return faulty


if __name__ == "__main__":
    fault, place = sys.argv[1:3]
    del sys.argv[1:3]
    build_in(fault, place)
    main()
