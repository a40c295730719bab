"""Run the launcher with a clock that is set back by a day just before the stage starts: clock_back.py ARGUMENTS."""

import time
from typing import Any

from prostate_seg import stages
from prostate_seg.__main__ import main

SECONDS_BACK = 86_400.0

_time, _load = time.time, stages.load_stage


def load_stage(name: str | None) -> Any:
    """Return the stage function and set the clock back."""
    stage = _load(name)
    time.time = lambda: _time() - SECONDS_BACK
    return stage


if __name__ == "__main__":
    stages.load_stage = load_stage
    main()
