"""The run tree in a sqlite store: runs are found or created once, closed with the right status, superseded without loss."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout
from mlflow.entities import Run, ViewType
from mlflow.store.entities import PagedList

from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import MlflowConfig
from prostate_seg.operations.job import Outcome
from prostate_seg.operations.process import process_tags
from prostate_seg.tracking import sweeps
from prostate_seg.tracking.records import BeginMultirun, Level, TreePosition, now_ms
from prostate_seg.tracking.store import leader_election
from prostate_seg.tracking.store.connection import open_store
from prostate_seg.tracking.store.run_tree import DESCRIPTION, RunTree

SETTINGS = MlflowConfig(
    tracking_uri=None,
    experiment="one",
    name="baseline",
    on_rerun="supersede",
    on_unreachable="fail",
    fresh=False,
    skip_finished=False,
    system_metrics=False,
)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "mlflow.db"


@pytest.fixture
def tree(database: Path, request: pytest.FixtureRequest) -> RunTree:
    """A tree in a new experiment."""
    settings = replace(SETTINGS, tracking_uri=f"sqlite:///{database}", experiment=request.node.name)
    return RunTree(open_store(settings, cache=database.parent))


def stage(tree: RunTree, pipeline: Run, name: str = "train") -> Run:
    return tree.create(name, TreePosition(level=Level.stage, pipeline="p", stage=name), parent_id=pipeline.info.run_id)


def status(tree: RunTree, run: Run) -> str:
    return str(tree.client.get_run(run.info.run_id).info.status)


def test_all_trials_of_a_sweep_are_found(tree: RunTree, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stage(tree, tree.pipeline("p", fresh=False))
    pages = {None: PagedList([run] * 1000, "second"), "second": PagedList([run] * 5, None)}
    monkeypatch.setattr(tree.client, "search_runs", lambda *arguments: pages[arguments[-1]])
    assert len(tree.children("a sweep", level="trial")) == 1005


def test_pipeline_is_created_once_and_found_again(tree: RunTree) -> None:
    first = tree.pipeline("p", fresh=False)
    assert tree.pipeline("p", fresh=False).info.run_id == first.info.run_id
    assert tree.pipeline("other", fresh=False).info.run_id != first.info.run_id
    assert status(tree, first) == "FINISHED"


def test_fresh_pipeline_is_found_from_then_on(tree: RunTree) -> None:
    first = tree.pipeline("p", fresh=False)
    time.sleep(0.002)
    fresh = tree.pipeline("p", fresh=True)
    assert fresh.info.run_id != first.info.run_id
    assert tree.pipeline("p", fresh=False).info.run_id == fresh.info.run_id


def on_server(tree: RunTree) -> RunTree:
    """Return a tree whose store counts as a server, which other processes use without the same lock."""
    return RunTree(replace(tree.store, is_server=True))


@pytest.mark.parametrize("theirs_is", ["created before", "created after, and claimed"])
def test_concurrently_created_pipelines_become_one_by_leader_election(
    tree: RunTree, theirs_is: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes search a server, find no pipeline, and create one each; they share no lock."""
    monkeypatch.setattr(leader_election, "SECONDS_TO_ELECT", 0.0)
    here, elsewhere = on_server(tree), on_server(tree)
    theirs: list[Run] = []
    search = here.search

    def search_while_the_other_creates(*tags: Any, **asked: Any) -> list[Run]:
        found = search(*tags, **asked)
        if not theirs:
            start_ms = now_ms() + (30_000 if "after" in theirs_is else -30_000)
            theirs.append(elsewhere.pipeline("p", fresh=False, start_ms=start_ms))
        return found

    monkeypatch.setattr(here, "search", search_while_the_other_creates)
    mine = here.pipeline("p", fresh=False)
    assert mine.info.run_id == theirs[0].info.run_id
    assert [run.info.run_id for run in tree.search({"level": Level.pipeline})] == [mine.info.run_id]


def test_pipeline_withdrawn_by_another_process_is_not_used(tree: RunTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third process finds both before the creator of one has deleted it."""
    monkeypatch.setattr(leader_election, "SECONDS_TO_ELECT", 0.0)
    one, other = (tree.pipeline("p", fresh=True) for _ in range(2))
    assert leader_election.claim(tree.client, one, leader_election.NO)
    assert on_server(tree).pipeline("p", fresh=False).info.run_id == other.info.run_id
    assert leader_election.claim(tree.client, tree.client.get_run(other.info.run_id), leader_election.YES)
    assert not leader_election.claim(tree.client, other, leader_election.NO)
    tree.client.delete_run(other.info.run_id)
    third = on_server(tree).pipeline("p", fresh=False)
    assert third.info.run_id not in {one.info.run_id, other.info.run_id}


def test_no_claimed_pipeline_is_deleted_however_many_processes_start_together(
    tree: RunTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the waiting time several pipelines can exist, but no claimed one is deleted."""
    monkeypatch.setattr(leader_election, "SECONDS_TO_ELECT", 0.0)
    with ThreadPoolExecutor(8) as pool:
        for number in range(5):
            name = f"p{number}"
            taken = list(pool.map(lambda own, name=name: own.pipeline(name, fresh=False), [on_server(tree)] * 8))
            there = {run.info.run_id for run in tree.search({"level": Level.pipeline, "pipeline": name})}
            assert {run.info.run_id for run in taken} == there
            assert on_server(tree).pipeline(name, fresh=False).info.run_id in there


def test_workers_of_one_study_on_several_machines_share_one_sweep(tree: RunTree) -> None:
    """Each process has the lock of its own workspace, and all search before the first one creates the sweep."""
    barrier = threading.Barrier(4)

    def begin(number: int) -> Run | None:
        here = on_server(tree)
        search = here.sweeps

        def search_together(key: str) -> list[Run]:
            found = search(key)
            with suppress(threading.BrokenBarrierError):
                barrier.wait(0.5)
            return found

        setattr(here, "sweeps", search_together)  # noqa: B010 - a method
        key, pipeline_key = f"local-{number:032d}", f"local-{number + 100:032d}"
        record = BeginMultirun(
            pipeline="p",
            pipeline_key=pipeline_key,
            fresh=False,
            stage="train",
            folder="db/study",
            key=key,
            start_ms=now_ms(),
        )
        return sweeps.begin(here, record)

    with ThreadPoolExecutor(4) as pool:
        begun = {run.info.run_id for run in pool.map(begin, range(4)) if run is not None}
    (sweep,) = tree.search({"level": Level.sweep})
    assert begun == {sweep.info.run_id}
    assert status(tree, sweep) == "RUNNING"
    assert len(tree.search({"level": Level.pipeline})) == 1


def test_newest_pipeline_of_an_earlier_version_is_found_on_a_server(tree: RunTree) -> None:
    long_ago = now_ms() - 2 * leader_election.LEASE_MS
    _, newest = (tree.pipeline("p", fresh=True, start_ms=long_ago + number) for number in range(2))
    assert on_server(tree).pipeline("p", fresh=False).info.run_id == newest.info.run_id


def test_every_run_has_the_five_tags(tree: RunTree) -> None:
    pipeline = tree.pipeline("p", fresh=False)
    run = stage(tree, pipeline)
    for one in (pipeline, run):
        assert {"level", "pipeline", "stage", "fold", "sweep"} <= set(one.data.tags)
    assert run.data.tags["mlflow.parentRunId"] == pipeline.info.run_id


def test_pipeline_runs_while_a_stage_runs_and_ends_as_the_last_one_ended(tree: RunTree) -> None:
    pipeline = tree.pipeline("p", fresh=False)
    one, two = stage(tree, pipeline, "prepare"), stage(tree, pipeline, "train")
    tree.reopen(pipeline)
    tree.client.set_terminated(one.info.run_id, "FINISHED")
    tree.settle(pipeline.info.run_id, Outcome.finished)
    assert status(tree, pipeline) == "RUNNING"
    tree.client.set_terminated(two.info.run_id, "FAILED")
    tree.settle(pipeline.info.run_id, Outcome.failed)
    assert status(tree, pipeline) == "FAILED"


def test_pipeline_has_the_description_of_the_stage_that_ended_last_unless_edited(tree: RunTree) -> None:
    pipeline = tree.pipeline("p", fresh=False)
    described = [
        ("evaluate", 2_000, "Dice 0.9"),
        ("train", 1_000, "val Dice 0.8"),
        ("report", 3_000, "Dice 0.9, report"),
    ]
    found = []
    for name, end_ms, text in described:  # train is replicated late
        run = stage(tree, pipeline, name)
        tree.client.set_tag(run.info.run_id, DESCRIPTION, text)
        tree.client.set_terminated(run.info.run_id, end_time=end_ms)
        tree.describe(pipeline.info.run_id)
        found.append(tree.client.get_run(pipeline.info.run_id).data.tags[DESCRIPTION])
    assert found == ["Dice 0.9", "Dice 0.9", "Dice 0.9, report"]
    run = tree.client.get_run(run.info.run_id)
    link = tree.link(run, "report", TreePosition(level=Level.stage, pipeline="q"), parent_id=pipeline.info.run_id)
    assert tree.client.get_run(link.info.run_id).data.tags[DESCRIPTION] == "Dice 0.9, report"
    tree.client.set_tag(pipeline.info.run_id, DESCRIPTION, "for the paper")
    tree.describe(pipeline.info.run_id)
    assert tree.client.get_run(pipeline.info.run_id).data.tags[DESCRIPTION] == "for the paper"


def test_orphan_is_closed_with_its_pipeline_and_a_live_run_is_not(tree: RunTree) -> None:
    pipeline, busy = tree.pipeline("p", fresh=False), tree.pipeline("busy", fresh=False)
    orphan = stage(tree, pipeline)
    tree.client.set_tag(orphan.info.run_id, "process.process_started", "1.00")
    alive = stage(tree, busy)
    for parent in (pipeline, busy):
        tree.reopen(parent)
    closed = tree.close_orphans()
    assert [run.info.run_id for run in closed] == [orphan.info.run_id]
    assert [status(tree, run) for run in (orphan, pipeline, alive, busy)] == ["KILLED", "KILLED", "RUNNING", "RUNNING"]


def test_silent_run_of_another_host_is_closed_only_when_asked(tree: RunTree) -> None:
    elsewhere = stage(tree, tree.pipeline("p", fresh=False))
    tree.client.set_tag(elsewhere.info.run_id, "process.host", "elsewhere")
    assert tree.close_orphans(close_silent=True) == []  # a recent heartbeat
    tree.client.set_tag(elsewhere.info.run_id, "process.heartbeat", "2020-01-01T00:00:00+00:00")
    assert tree.close_orphans() == []
    assert len(tree.close_orphans(close_silent=True)) == 1


def test_deleted_run_can_be_restored_with_its_folds(tree: RunTree) -> None:
    run = stage(tree, tree.pipeline("p", fresh=False))
    fold = tree.create(
        "fold0", TreePosition(level=Level.fold, pipeline="p", stage="train", fold="0"), parent_id=run.info.run_id
    )
    tree.delete_with_folds(run, replaced_by="other")
    assert tree.get(run.info.run_id) is None
    trash = tree.client.search_runs([tree.store.experiment_id], run_view_type=ViewType.DELETED_ONLY)
    assert {one.info.run_id for one in trash} == {run.info.run_id, fold.info.run_id}
    tree.client.restore_run(run.info.run_id)
    assert tree.client.get_run(run.info.run_id).data.tags["superseded_by"] == "other"


def test_more_names_than_fit_into_one_call_are_all_logged(tree: RunTree) -> None:
    run = stage(tree, tree.pipeline("p", fresh=False))
    params = {f"p{i}": str(i) for i in range(250)}
    tree.log(run.info.run_id, params=params, tags={f"t{i}": "x" for i in range(120)}, metrics={"m": 1.5})
    data = tree.client.get_run(run.info.run_id).data
    assert data.params == params
    assert sum(key.startswith("t") for key in data.tags) == 120
    assert data.metrics == {"m": 1.5}


def test_owner_tags_identify_this_process(tree: RunTree) -> None:
    run = stage(tree, tree.pipeline("p", fresh=False))
    tags = process_tags()
    assert {key: run.data.tags[key] for key in tags if key != "process.heartbeat"} == {
        key: value for key, value in tags.items() if key != "process.heartbeat"
    }


def test_locked_call_holds_the_lock_and_releases_it_if_the_store_fails(tree: RunTree) -> None:
    another = FileLock(tree.store.lock.lock_file, timeout=0)

    def failing_call() -> None:
        with pytest.raises(Timeout):
            another.acquire()
        raise ConnectionError("it went away")

    with pytest.raises(InputError, match=r"the tracking store .*mlflow.db cannot be used: it went away"):
        tree.store.call(failing_call, locked=True)
    with another:
        assert another.is_locked


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("sqlite:////absent/folder/mlflow.db", "the folder /absent/folder does not exist"),
        ("http://ann:hunter2@127.0.0.1:9/", r"http://127.0.0.1:9/ cannot be used: .*refused"),
        ("http://no-such-host.invalid:5000", "cannot be used"),
        ("mlruns", "a folder cannot be a store"),
    ],
)
def test_unusable_store_is_reported_without_its_password(uri: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_store(replace(SETTINGS, tracking_uri=uri), cache=tmp_path)
    assert "hunter2" not in str(caught.value)
    assert "mlflow=off" in str(caught.value)


def test_file_that_is_not_a_database_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("these are my notes, not a database, and I need them")
    with pytest.raises(InputError, match="not a database"):
        open_store(replace(SETTINGS, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"), cache=tmp_path)
    assert (tmp_path / "mlflow.db").read_text().startswith("these are my notes")


def test_deleted_experiment_is_refused_with_the_restore_command(database: Path) -> None:
    settings = replace(SETTINGS, tracking_uri=f"sqlite:///{database}", experiment="gone")
    store = open_store(settings, cache=database.parent)
    store.client.delete_experiment(store.experiment_id)
    with pytest.raises(InputError, match="mlflow experiments restore"):
        open_store(settings, cache=database.parent)
