"""Where a pipeline stands: of each stage whether it has run, and whether it would do the same again.

Everything comes from DS_VERSION.json and the files themselves; a file that has not changed since it was hashed costs a stat.
A package's version may be another without making a stage stale: stage=verify says which is.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

from prostate_seg.config.schema import STAGE_SETTINGS
from prostate_seg.config.workspace import Workspace
from prostate_seg.provenance.ds_version import read_entries
from prostate_seg.provenance.verification import Item, Verdict, compare

KEY_METRICS = {
    "fetch": "fetch/num_images",
    "preprocess": "preprocess/num_cases",
    "prepare": "prepare/num_folds",
    "train": "val/best_dice",
    "evaluate": "test/dice",
}
"""The number by which a stage's result is known."""

MAX_REASONS = 3
"""Reasons that the table names; the JSON has all."""


class State(Enum):
    """What became of a stage."""

    current = "current"
    stale = "stale"
    missing = "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageState:
    """Where one stage stands."""

    stage: str
    """Its entry in DS_VERSION.json: a stage, or train.fold0."""
    state: State
    reasons: Sequence[str] = ()
    """Why it is stale, or what is known of a missing one."""
    finished_at: str = ""
    seconds: float | None = None
    run_id: str | None = None
    pipeline: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    other_settings: Sequence[str] = ()
    """Settings that the run had otherwise; a part of the reasons."""

    @property
    def key_metric(self) -> str:
        """Return the stage's most telling number in words, or nothing."""
        name = KEY_METRICS.get(self.stage.split(".")[0], "")
        value = self.metrics.get(name)
        return "" if value is None else f"{name.rpartition('/')[2].replace('num_', '')} {value:.4g}"


def pipeline_states(workspace: Workspace, *, settings: Mapping[str, Any]) -> list[StageState]:
    """Return the state of each stage, in the order of the pipeline; folds that were trained alone stand in train's place.

    Args:
        workspace: Where the files lie.
        settings: The settings in force now, nested, redacted like the recorded ones.

    Raises:
        InputError: If DS_VERSION.json cannot be read.
    """
    entries = known_entries(workspace)
    states: dict[str, StageState] = {}
    for stage in STAGE_SETTINGS:
        names = [name for name in entries if name.split(".")[0] == stage]
        if not names and not (stage == "fetch" and settings["data"]["source"] == "folder"):  # one's own need no fetch
            states[stage] = _missing(stage, workspace)
        for name in names:
            states[name] = _state_of(name, entries[name], states, settings=settings, workspace=workspace)
    return list(states.values())


def known_entries(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """Return the entries of DS_VERSION.json; networks that lie elsewhere (paths.trained) have their own."""
    return read_entries(workspace) | read_entries(replace(workspace, root=workspace.model.parent))


def command_of_newest(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return stage=status with what the newest run's command line set; DVC's runs take theirs from params.yaml."""
    newest = max(entries.values(), key=lambda entry: str(entry["finished_at"]))
    given = [override for override in newest["overrides"] if not override.startswith(("stage=", "fold.index="))]
    named = re.findall(r"--config-name[ =]\S+", str(newest["command"]))
    return shlex.join(["python", "-m", "prostate_seg", *" ".join(named).split(), "stage=status", *given])


def as_json(states: Sequence[StageState]) -> str:
    """Return all that is known as a JSON list."""
    rows = [{**asdict(one), "state": one.state.value, "key_metric": one.key_metric} for one in states]
    return json.dumps(rows, indent=1)


def as_rows(states: Sequence[StageState]) -> list[list[str]]:
    """Return the cells of a table: stage, state, last run, time, number, why."""
    return [
        [
            one.stage,
            one.state.value,
            one.finished_at.replace("T", " ").replace("+00:00", ""),
            "" if one.seconds is None else f"{one.seconds:.0f} s",
            one.key_metric,
            "; ".join(one.reasons[:MAX_REASONS])
            + (f"; and {len(one.reasons) - MAX_REASONS} more" if len(one.reasons) > MAX_REASONS else ""),
        ]
        for one in states
    ]


def _missing(stage: str, workspace: Workspace) -> StageState:
    is_stopped = stage == "train" and workspace.training.is_dir()
    return StageState(
        stage=stage,
        state=State.missing,
        reasons=["was stopped; the same command goes on"] if is_stopped else [],
    )


def _state_of(
    name: str,
    entry: Mapping[str, Any],
    before: Mapping[str, StageState],
    *,
    settings: Mapping[str, Any],
    workspace: Workspace,
) -> StageState:
    items = compare(name, entry, settings=_settings_of(name, settings), workspace=workspace, deciding_only=True)
    different = [item for item in items if item.verdict is not Verdict.same]
    upstream = [one for one in before if one in entry["upstream"] and before[one].state is not State.current]
    reasons = [*_in_words(different), *(f"{one} is {before[one].state.value}" for one in upstream[:1])]
    return StageState(
        stage=name,
        state=State.stale if reasons else State.current,
        reasons=reasons,
        finished_at=entry["finished_at"],
        seconds=entry["seconds"],
        run_id=entry["run_id"],
        pipeline=entry["pipeline"],
        metrics=entry["metrics"],
        other_settings=[item.name for item in different if item.kind == "config"],
    )


def _settings_of(name: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings in force; a fold that was trained alone is asked about with its own index."""
    fold = name.partition(".fold")[2]
    return {**settings, "fold": {**settings["fold"], "index": int(fold)}} if fold else settings


def _in_words(different: Sequence[Item]) -> list[str]:
    """Say what differs; of source files only how many."""
    code = [item for item in different if item.kind == "code"]
    files = [f"{item.name} {_became(item)}" for item in different if item.kind in ("inputs", "outputs")]
    other = [f"{item.name} {item.recorded} -> {item.now or 'absent'}" for item in different if item.kind == "config"]
    return [*dict.fromkeys(files), *other, *([f"{len(code)} source files changed"] if code else [])]


def _became(item: Item) -> str:
    return "is missing" if item.verdict is Verdict.missing else "changed"
