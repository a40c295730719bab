"""Run the launcher with an injected fault: `python faulty.py FAULT PLACE ARGUMENTS...`.

FAULT is raise, nan, oom, exit0, exit3, kill (as kill -9), or hang, which creates the file `hanging` and sleeps. PLACE
is preprocess; fold1, the second fold of a training; close, where results are logged; trainings, at the end of each (so that
ok,raise makes the second fail); claim, where a sweep has just claimed a trial; tell, where it records the objective of its
second trial; replication, where a record is sent (ok,ok,kill kills at the third); or tables, while those of a new store are
created. FAULT none with PLACE short-close waits two seconds instead of half a minute for a store that fails at the end of
a stage.
"""

import os
import signal
import sys
import time
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from prostate_seg.__main__ import main


def inject(fault: str) -> None:
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


def install(fault: str, place: str) -> None:
    if place == "preprocess":
        from prostate_seg.stages import preprocess

        preprocess.discover_cases = lambda *_, **__: inject(fault)  # type: ignore[assignment,return-value]
    elif place == "fold1":
        from prostate_seg.stages import train

        train.fit = in_turn(train.fit, ["ok", fault])
    elif place == "trainings":
        from prostate_seg.stages import train

        train.collect_folds = in_turn(train.collect_folds, fault.split(","))
    elif place == "claim":
        from prostate_seg.sweeping.study import SharedStudy

        SharedStudy.suggest = lambda *_: inject(fault)  # type: ignore[method-assign,assignment,return-value]
    elif place == "tell":
        from prostate_seg.sweeping.study import SharedStudy

        tell, complete = SharedStudy.tell, in_turn(SharedStudy.tell, ["ok", fault])

        def faulty_tell(study: Any, trial: Any, state: Any, *values: Any) -> Any:
            return (complete if state.name == "COMPLETE" else tell)(study, trial, state, *values)

        SharedStudy.tell = faulty_tell  # type: ignore[method-assign]
    elif place == "replication":
        from prostate_seg.tracking.replication import Replicator

        Replicator._apply = in_turn(Replicator._apply, fault.split(","))  # type: ignore[method-assign]
    elif place == "tables":
        from sqlalchemy import Engine, event

        event.listen(Engine, "before_cursor_execute", in_turn(lambda *_: None, ["ok"] * 200 + [fault]))
    elif place == "short-close":
        from prostate_seg.tracking import tracked_run

        tracked_run.SECONDS_TO_CLOSE = 2.0
    elif place == "close":
        from prostate_seg.tracking.tracked_run import TrackedRun

        TrackedRun._log_results = lambda *_: inject(fault)  # type: ignore[method-assign,assignment,return-value]


def in_turn(function: Any, faults: list[str]) -> Any:
    """Return the function with faults in its first calls."""
    waiting = chain(faults, repeat("ok"))

    def faulty(*arguments: Any, **keywords: Any) -> Any:
        fault = next(waiting)
        if fault == "nan":
            return {0: {"val_dice": float("nan")}}
        return function(*arguments, **keywords) if fault == "ok" else inject(fault)

    return faulty


if __name__ == "__main__":
    fault, place = sys.argv[1:3]
    del sys.argv[1:3]
    install(fault, place)
    main()
