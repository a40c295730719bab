"""Run the launcher with a fault built in: `python faulty.py FAULT PLACE ARGUMENTS...`.

FAULT is raise, exit0, exit3 or hang, which makes the file `hanging` and waits for a signal. PLACE is preprocess, fold1 (the
second fold of a training) or close, where results are logged.
"""

import sys
import time
from pathlib import Path
from typing import Any

from prostate_seg.__main__ import main


def misbehave(fault: str) -> None:
    if fault == "raise":
        raise RuntimeError("built-in fault")
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

        fit = train.fit
        folds: list[Any] = []

        def fit_once(*arguments: Any, **keywords: Any) -> Any:
            folds.append(arguments)
            return fit(*arguments, **keywords) if len(folds) == 1 else misbehave(fault)

        train.fit = fit_once
    elif place == "close":
        from prostate_seg.tracking.branch import Branch

        Branch._log_results = lambda *_: misbehave(fault)  # type: ignore[method-assign,assignment,return-value]


if __name__ == "__main__":
    fault, place = sys.argv[1:3]
    del sys.argv[1:3]
    build_in(fault, place)
    main()
