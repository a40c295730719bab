"""Records of the journal: each is one idempotent change to the tracking store, as a type of its own.

Names in the file (`do`, `place`, `from`) are those of the first version, so that older journals and bundles stay readable.
"""

import time
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from prostate_seg.operations.job import Outcome

NONE = "none"
"""Value of a tag that does not apply: a run outside of a sweep has sweep=none."""
ALL = "all"
"""Value of the tags stage and fold of a run that is above them in the tree."""

Key = Annotated[str, Field(pattern=r"^[\w\- ]{1,200}$")]
"""Local id of a run: the tag `record.key`, by which replication finds the run again."""


class Strict(BaseModel):
    """Content of a line of JSON that may come from anybody; NaN and infinities are words in it, as JSON has no such numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, ser_json_inf_nan="strings")


class Level(StrEnum):
    """Level of a run in the tree."""

    pipeline = "pipeline"
    sweep = "sweep"
    stage = "stage"
    trial = "trial"
    fold = "fold"


class TreePosition(Strict):
    """Position of a run in the tree, as the five tags that every run carries."""

    level: Level
    pipeline: str
    stage: str = ALL
    fold: str = ALL
    sweep: str = NONE


class MetricPoint(NamedTuple):
    """One point of a curve."""

    name: str
    value: float
    timestamp_ms: int
    step: int


class BeginMultirun(Strict):
    """Create the pipeline and, for a sweep, its run."""

    do: Literal["multirun"] = "multirun"
    pipeline: str
    pipeline_key: Key
    fresh: bool
    stage: str
    folder: Annotated[str | None, Field(alias="place")]
    """Folder of the sweep, or storage and name of its study; None for a multirun over stages only."""
    key: Key
    start_ms: int


class CompleteSweep(Strict):
    """Mark that a study has all of its trials."""

    do: Literal["complete"] = "complete"
    folder: Annotated[str, Field(alias="place")]


class EndMultirun(Strict):
    """Close the run of a sweep with figures of its trials."""

    do: Literal["end_multirun"] = "end_multirun"
    folder: Annotated[str, Field(alias="place")]


class OpenStage(Strict):
    """Find or create the parents of a stage's run, and create the run."""

    do: Literal["stage"] = "stage"
    run: Key
    pipeline: str
    pipeline_key: Key
    fresh: bool
    stage: str
    fold: str
    sweep_key: str | None
    sweep: BeginMultirun | None
    """The begin of the sweep, where that record may still wait in another journal."""
    number: int | None
    cluster_key: str | None
    start_ms: int


class OpenFold(Strict):
    """Create the run of a fold below its stage."""

    do: Literal["fold"] = "fold"
    run: Key
    parent: Key
    fold: str
    start_ms: int


class LogData(Strict):
    """Log params, tags and points of curves."""

    do: Literal["log"] = "log"
    run: Key
    params: dict[str, str] = Field(default_factory=dict)
    tags: dict[str, str] = Field(default_factory=dict)
    metrics: tuple[MetricPoint, ...] = ()


class LogFiles(Strict):
    """Upload a folder of the journal as artifacts."""

    do: Literal["files"] = "files"
    run: Key
    folder: str
    to: str | None = None
    """Folder among the run's artifacts."""


class LogInputs(Strict):
    """Log what a stage read as MLflow datasets: hashes by name."""

    do: Literal["inputs"] = "inputs"
    run: Key
    datasets: dict[str, str]


class EndRun(Strict):
    """Close a run."""

    do: Literal["end"] = "end"
    run: Key
    status: Outcome
    end_ms: int


class SettleRun(Strict):
    """Update the parents of a closed run, replace the earlier runs of its stage, and link the runs that it reuses."""

    do: Literal["place"] = "place"
    run: Key
    pipeline_key: Key
    status: Outcome
    end_ms: int
    trial_state: str
    is_finished: bool = False
    metrics: tuple[MetricPoint, ...] = ()
    upstream: dict[str, dict[str, Any]] = Field(default_factory=dict)
    folds: tuple[str, ...] = ()
    supersedes: bool = False


class CopyRun(Strict):
    """Create the copy of a run that comes in a bundle."""

    do: Literal["copy"] = "copy"
    run: Key
    origin: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    source: Annotated[str, Field(alias="from")]
    """Address of the store that the run was packed in."""
    name: str
    position: Annotated[TreePosition, Field(alias="place")]
    parent: Key | None
    start_ms: int


class EndCopy(Strict):
    """Close the copy of a run, which is then complete."""

    do: Literal["end_copy"] = "end_copy"
    run: Key
    status: Outcome
    end_ms: int | None


MultirunRecord = BeginMultirun | CompleteSweep | EndMultirun
BundleRecord = CopyRun | LogData | LogInputs | LogFiles | EndCopy
Record = MultirunRecord | OpenStage | OpenFold | EndRun | SettleRun | BundleRecord

RECORD: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="do")])
BUNDLE_RECORD: TypeAdapter[BundleRecord] = TypeAdapter(Annotated[BundleRecord, Field(discriminator="do")])


def now_ms() -> int:
    """Return the time in MLflow's unit."""
    return int(time.time() * 1000)


def metric_points(metrics: Mapping[str, float], *, step: int) -> tuple[MetricPoint, ...]:
    """Return metrics as points of the present time."""
    stamp = now_ms()
    return tuple(MetricPoint(name, float(value), stamp, step) for name, value in metrics.items())
