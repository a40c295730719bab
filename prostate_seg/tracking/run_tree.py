"""The tree of runs: pipeline > stage > fold, and pipeline > sweep > trial > fold.

Every run carries the tags level, pipeline, stage, fold and sweep, so that a flat search finds what the tree shows. Parents
are found or made, and statuses of parents changed, only while the store's lock is held. A pipeline is RUNNING exactly while
one of its stages is; it belongs to no process. Runs of processes that have died are closed as KILLED at the next start.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum

from mlflow.entities import Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException

from prostate_seg.operations.job import Outcome
from prostate_seg.operations.process import is_alive, is_silent, this_process
from prostate_seg.provenance.ds_version import LOCAL_ID
from prostate_seg.tracking import leader_election as agreement
from prostate_seg.tracking.journal import new_local_id
from prostate_seg.tracking.store import Store, restore_command

NAMES_PER_CALL = 100
"""Params or tags that a server takes in one call."""
POINTS_PER_CALL = 500
"""Values of metrics that are sent beside them; a server takes 1,000 of all kinds together."""
NONE = "none"
"""Value of a tag that does not apply: a run outside of a sweep has sweep=none."""
ALL = "all"
"""Value of the tags stage and fold of a run that stands above them."""
KEY = "record.key"
"""Tag with the id that a run had before its store gave it one, by which it is found again; no two runs have the same."""
CLOSED_BY = "closed_by"
"""Tag of a run that another process has closed, because its own had died."""
SUPERSEDED_BY = "superseded_by"
"""Tag of a run in the trash: the later run of its stage that replaced it."""
COPIED_FROM = "bundle.copied_from"
"""Tag of a run that came in a bundle: the store that it was packed in."""
SILENT_ON_ANOTHER_HOST = timedelta(hours=1)
"""A run of another host may be closed after this long without a sign of life, when asked to."""


class Level(Enum):
    """Where a run stands in the tree."""

    pipeline = "pipeline"
    sweep = "sweep"
    stage = "stage"
    trial = "trial"
    fold = "fold"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in the tree a run belongs."""

    level: Level
    pipeline: str
    stage: str = ALL
    fold: str = ALL
    sweep: str = NONE

    def tags(self) -> dict[str, str]:
        """Return the tags that every run carries."""
        return {
            "level": self.level.value,
            "pipeline": self.pipeline,
            "stage": self.stage,
            "fold": self.fold,
            "sweep": self.sweep,
        }


class RunTree:
    """Finds, makes and closes runs in one experiment. Nothing here knows what a stage does."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.client = store.client

    def pipeline(self, name: str, *, fresh: bool, key: str | None = None, start_ms: int | None = None) -> Run:
        """Return the newest pipeline of that name that was begun here, or a new one. Call with the lock held."""

        def look() -> list[Run]:
            found = self.search(level=Level.pipeline, pipeline=name, newest_first=True, limit=50)
            return [run for run in found if COPIED_FROM not in run.data.tags]

        def make() -> Run:
            place = Place(level=Level.pipeline, pipeline=name)
            run = self.create(name, place, parent_id=None, key=key, start_ms=start_ms)
            self.client.set_terminated(run.info.run_id, Outcome.finished.value)  # RUNNING only while a stage is
            return run

        return self.found_or_made(look, make, fresh=fresh)

    def found_or_made(self, look: Callable[[], list[Run]], make: Callable[[], Run], *, fresh: bool = False) -> Run:
        """Return the newest run of some, or a new one: the same for all who ask at one moment. Call with the lock held."""
        begun = [] if fresh else look()
        mine = None if begun else make()
        if not self.store.is_server:
            return begun[0] if mine is None else mine
        if fresh and mine is not None:
            agreement.decide(self.client, mine, agreement.YES)
            return mine
        agreed = agreement.agree(self.client, begun, mine, look)
        return self.found_or_made(look, make, fresh=True) if agreed is None else agreed

    def sweep(self, key: str) -> Run | None:
        """Return the sweep of this key, if it has been made."""
        return agreement.preferred(self.sweeps(key))

    def sweeps(self, key: str) -> list[Run]:
        """Return the sweeps of this key, newest first; there are several only while processes agree on one."""
        return self.search(level=Level.sweep, filters={"sweep.key": key}, newest_first=True, limit=50)

    def create(
        self,
        name: str,
        place: Place,
        *,
        parent_id: str | None,
        tags: Mapping[str, str] | None = None,
        start_ms: int | None = None,
        key: str | None = None,
    ) -> Run:
        """Make a RUNNING run; below the pipeline level it belongs to this process. Of the runs of a key there is one."""
        made = None if key is None else self.find(key)
        if made is not None:
            return made
        owner = {} if place.level is Level.pipeline else this_process().as_tags()
        parent = {} if parent_id is None else {"mlflow.parentRunId": parent_id}
        return self.client.create_run(
            self.store.experiment_id,
            run_name=name,
            start_time=start_ms or now_ms(),
            tags={**place.tags(), **owner, **parent, **(tags or {}), KEY: key or new_local_id()},
        )

    def find(self, key: str) -> Run | None:
        """Return the run that was made with this key, deleted or not."""
        query, view = f"tags.`{KEY}` = '{key}'", ViewType.ALL
        return next(iter(self.client.search_runs([self.store.experiment_id], query, view, max_results=1)), None)

    def link(self, source: Run, name: str, place: Place, *, parent_id: str) -> Run:
        """Make a closed run that stands for `source` in another place, with its numbers and hashes."""
        tags = {
            key: value
            for key, value in source.data.tags.items()
            if not key.startswith(("mlflow.", "process.")) and key not in (*place.tags(), KEY)
        }
        tags["reused_from"] = source.data.tags.get("reused_from", source.info.run_id)
        tags["reused_pipeline"] = source.data.tags.get("pipeline", NONE)
        key = f"link of {source.info.run_id} in {parent_id}"
        link = self.create(name, place, parent_id=parent_id, tags=tags, start_ms=source.info.start_time, key=key)
        self.log(link.info.run_id, params=source.data.params, metrics=source.data.metrics)
        self.client.set_terminated(link.info.run_id, source.info.status, source.info.end_time)
        return link

    def log(
        self,
        run_id: str,
        *,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        metrics: Mapping[str, float] | None = None,
        points: Sequence[Metric] = (),
    ) -> None:
        """Log params, tags, last metrics and points of curves, in as few calls as a server takes."""
        stamp = now_ms()
        all_params = [Param(key, value) for key, value in (params or {}).items()]
        all_tags = [RunTag(key, value) for key, value in (tags or {}).items()]
        all_points = [*points, *(Metric(key, value, stamp, 0) for key, value in (metrics or {}).items())]
        calls = max(
            math.ceil(max(len(all_params), len(all_tags)) / NAMES_PER_CALL),
            math.ceil(len(all_points) / POINTS_PER_CALL),
        )
        for call in range(calls):
            names = slice(call * NAMES_PER_CALL, (call + 1) * NAMES_PER_CALL)
            some = all_points[call * POINTS_PER_CALL : (call + 1) * POINTS_PER_CALL]
            self.client.log_batch(run_id, params=all_params[names], tags=all_tags[names], metrics=some)

    def reopen(self, run: Run) -> None:
        """Show a run as RUNNING again: a parent while something below it runs. Call with the lock held."""
        self.client.update_run(run.info.run_id, status="RUNNING")

    def take_over(self, run: Run, tags: Mapping[str, str] | None = None) -> None:
        """Go on in a run that another process has begun. Call with the lock held."""
        self.log(run.info.run_id, tags={**this_process().as_tags(), **(tags or {})})
        self.reopen(run)

    def settle(self, run_id: str, outcome: Outcome, *, ended_ms: int | None = None) -> None:
        """Close a pipeline with the outcome of what ended last, unless something below still runs. Lock held."""
        if self.search(filters={"mlflow.parentRunId": run_id}, status="RUNNING", limit=1):
            return
        if ended_ms is not None:  # what is sent late may not be the last
            later = [run for run in self.children(run_id) if (run.info.end_time or 0) > ended_ms]
            for run in sorted(
                (run for run in later if "reused_from" not in run.data.tags), key=lambda run: run.info.end_time
            ):
                outcome, ended_ms = Outcome(run.info.status), run.info.end_time
        self.client.set_terminated(run_id, outcome.value, ended_ms)

    def children(self, run_id: str, **place: str) -> list[Run]:
        """Return the runs directly below one, oldest first."""
        return self.search(filters={"mlflow.parentRunId": run_id, **place})

    def delete_with_folds(self, run: Run, *, replaced_by: str) -> None:
        """Move a run and those below it to MLflow's trash, from which they can be restored."""
        for child in self.children(run.info.run_id):
            self.client.delete_run(child.info.run_id)
        self.client.set_tag(run.info.run_id, SUPERSEDED_BY, replaced_by)
        self.client.delete_run(run.info.run_id)

    def deleted_by_hand(self, **wanted: str) -> list[Run]:
        """Return the deleted runs with these tags that no later run has replaced, newest first."""
        found = self.search(filters=wanted, newest_first=True, deleted=True, limit=50)
        return [run for run in found if SUPERSEDED_BY not in run.data.tags]

    def how_to_restore(self, run: Run) -> str:
        """Say that a run is in MLflow's trash, why, and how to take it out."""
        info, later = run.info, run.data.tags.get(SUPERSEDED_BY)
        why = f"was replaced by run {later}" if later else "was deleted"
        command = restore_command(self.store.address, "runs", info.run_id)
        return (
            f"run {info.run_id} ({info.run_name}) {why}\nRestore it on the MLflow page (Deleted), or with\n  {command}"
        )

    def close_orphans(self, *, close_silent: bool = False) -> list[Run]:
        """Close the RUNNING runs whose process has died, and settle their pipelines. Call with the lock held.

        Args:
            close_silent: Whether runs of other hosts that gave no sign of life for an hour count as dead.

        Returns:
            The closed runs.
        """
        running = self.search(status="RUNNING")
        owned = [run for run in running if run.data.tags.get("level") != Level.pipeline.value]
        dead = [run for run in owned if _is_dead(run, close_silent=close_silent)]
        for run in dead:
            self.client.set_tag(run.info.run_id, CLOSED_BY, "a later start: its process had ended without closing it")
            self.client.set_terminated(run.info.run_id, Outcome.killed.value)
        for run in running:
            if run.data.tags.get("level") == Level.pipeline.value:
                self.settle(run.info.run_id, Outcome.killed)
        return dead

    def get(self, run_id: str, *, or_deleted: bool = False) -> Run | None:
        """Return a run, or None if there is none of that id or it is deleted. An id from before its delivery serves too."""
        try:
            run = self.find(run_id) if LOCAL_ID.fullmatch(run_id) else self.client.get_run(run_id)
        except MlflowException:
            return None
        return run if run is not None and (or_deleted or run.info.lifecycle_stage == "active") else None

    def search(
        self,
        *,
        level: Level | None = None,
        pipeline: str | None = None,
        filters: Mapping[str, str] | None = None,
        status: str | None = None,
        newest_first: bool = False,
        limit: int = 1000,
        deleted: bool = False,
    ) -> list[Run]:
        """Return runs that are not deleted, or only those that are, oldest first unless asked otherwise."""
        wanted = {"level": level.value if level else None, "pipeline": pipeline, **(filters or {})}
        terms = [f"tags.`{key}` = '{value}'" for key, value in wanted.items() if value is not None]
        terms += [f"attributes.status = '{status}'"] if status else []
        order = f"attributes.start_time {'DESC' if newest_first else 'ASC'}"
        return _pages(
            lambda token, size: self.client.search_runs(
                [self.store.experiment_id],
                " and ".join(terms),
                ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY,
                max_results=size,
                order_by=[order, "attributes.run_id ASC"],
                page_token=token,
            ),
            limit,
        )


def now_ms() -> int:
    """Return the time as MLflow counts it."""
    return int(time.time() * 1000)


def _is_dead(run: Run, *, close_silent: bool) -> bool:
    alive = is_alive(run.data.tags)
    if alive is None:
        return close_silent and is_silent(run.data.tags, since=SILENT_ON_ANOTHER_HOST)
    return not alive


def _pages(ask: Callable[[str | None, int], Sequence[Run]], limit: int) -> list[Run]:
    found: list[Run] = []
    token = None
    while len(found) < limit:
        page = ask(token, min(limit - len(found), 1000))
        found += page
        token = getattr(page, "token", None)
        if not token:
            break
    return found
