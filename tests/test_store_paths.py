"""A moved or copied store is detected, and its paths are replaced on demand, all or none."""

import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import Config, parse
from prostate_seg.config.workspace import Workspace, workspace_of
from prostate_seg.operations.health import Check, Severity
from prostate_seg.tracking.registry import _point_mlflow_to, fetch_networks
from prostate_seg.tracking.store import paths
from prostate_seg.tracking.store.connection import Store, open_store
from prostate_seg.tracking.store.health import check_store
from prostate_seg.tracking.store.paths import fix_paths, previous_folders
from prostate_seg.tracking.store.run_tree import RunTree
from tests.conftest import composed
from tests.test_run_tree import SETTINGS

NAME = "old place, 50% é"
"""A name that needs quoting in an address."""


def opened(folder: Path, experiment: str = "one") -> Store:
    settings = replace(SETTINGS, tracking_uri=f"sqlite:///{folder}/mlflow.db", experiment=experiment)
    return open_store(settings, cache=folder / ".cache")


def fill(store: Store) -> None:
    """Add a run with an artifact, a registered champion, and the location of a trace."""
    client = store.client
    _point_mlflow_to(RunTree(store))  # the model is searched there
    run_id = client.create_run(store.experiment_id, run_name="kept").info.run_id
    client.log_text(run_id, "before", "note.txt")
    model = client.create_logged_model(store.experiment_id, source_run_id=run_id)
    client.log_model_artifacts(model.model_id, str(networks(Path(store.address.removeprefix("sqlite:///")).parent)))
    client.finalize_logged_model(model.model_id, "READY")
    client.create_registered_model("gland")
    client.create_model_version("gland", f"models:/{model.model_id}", run_id=run_id, model_id=model.model_id)
    client.create_model_version("gland", model.artifact_location, run_id=run_id)
    client.set_registered_model_alias("gland", "champion", "1")


def networks(folder: Path) -> Path:
    (folder / "model" / "data" / "networks").mkdir(parents=True)
    (folder / "model" / "data" / "networks" / "weights").write_text("w")
    (folder / "model" / "MLmodel").write_text("flavors: {}\n")
    return folder / "model"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / NAME
    folder.mkdir()
    fill(opened(folder))
    return folder


@pytest.fixture
def copied(original: Path, tmp_path: Path) -> Path:
    """A copy; the original still exists."""
    shutil.copytree(original, tmp_path / "new place")
    return tmp_path / "new place"


@pytest.fixture
def moved(copied: Path, original: Path, tmp_path: Path) -> Path:
    """A copy whose paths contain a folder that does not exist."""
    replaced = {"old": str(original), "new": str(tmp_path / "gone"), "uri": original.as_uri()}
    replaced["new_uri"] = Path(replaced["new"]).as_uri()
    with closing(sqlite3.connect(copied / "mlflow.db")) as connection:
        for table, column, _ in paths.PATHS:
            connection.execute(
                f"UPDATE {table} SET {column} = replace(replace({column}, :uri, :new_uri), :old, :new)", replaced
            )
        connection.commit()
    return copied


def config(folder: Path, *overrides: str) -> Config:
    uri = f"mlflow.tracking_uri='sqlite:///{folder}/mlflow.db'"
    return parse(composed("stage=doctor", uri, "mlflow.experiment=one", *overrides))


def doctor(folder: Path, *overrides: str) -> dict[str, Check]:
    cfg = config(folder, *overrides)
    workspace = replace(workspace_of(cfg), cache=folder / ".cache")
    return {finding.name: finding for finding in check_store(cfg, workspace)}


def dump(file: Path) -> str:
    with closing(sqlite3.connect(file)) as connection:
        return "\n".join(connection.iterdump())


def test_moved_store_is_refused_with_the_command_that_fixes_it(moved: Path, tmp_path: Path) -> None:
    before = dump(moved / "mlflow.db")
    with pytest.raises(InputError) as caught:
        opened(moved)
    assert "was moved or copied" in str(caught.value)
    assert f"{tmp_path / 'gone'} is no longer there" in str(caught.value)
    assert "stage=doctor doctor.fix_paths=true" in str(caught.value)
    assert dump(moved / "mlflow.db") == before


def test_copied_store_is_refused_and_the_original_not_changed(copied: Path, original: Path) -> None:
    before = dump(copied / "mlflow.db")
    with pytest.raises(InputError, match="is still there: this is a copy"):
        opened(copied)
    with pytest.raises(InputError, match="this is a copy"):
        opened(copied, experiment="another, that would be new")
    finding = doctor(copied)["tracking"]
    assert finding.severity is Severity.bad
    assert "doctor.fix_paths=true" in finding.fix
    assert dump(copied / "mlflow.db") == before
    assert previous_folders(original / "mlflow.db", experiment="one") == []


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_after_the_fix_artifacts_are_read_from_and_written_to_the_new_folder(
    how: str, original: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(how)
    files_there = sorted(original.rglob("*"))
    left = original if how == "copied" else folder.parent / "gone"
    finding = doctor(folder, "doctor.fix_paths=true")["paths"]
    assert finding.severity is Severity.good
    assert str(left) in finding.text
    for form in (str(left), left.as_uri()):
        assert form not in dump(folder / "mlflow.db")
    store = opened(folder)
    (run,) = RunTree(store).client.search_runs([store.experiment_id], "attributes.run_name = 'kept'")
    assert run.info.artifact_uri.startswith(folder.as_uri())
    assert Path(store.client.download_artifacts(run.info.run_id, "note.txt")).read_text() == "before"
    workspace = Workspace(root=folder, data=folder, cache=folder / "fresh cache")
    found, *_ = fetch_networks("models:/gland@champion", config(folder).mlflow, workspace, setting="predict.model")
    assert (found / "weights").read_text() == "w"
    new = store.client.create_run(store.experiment_id)
    store.client.log_text(new.info.run_id, "after", "note.txt")
    assert (folder / "mlruns" / "one" / new.info.run_id / "artifacts" / "note.txt").read_text() == "after"
    assert sorted(original.rglob("*")) == files_there
    (backup,) = folder.glob("mlflow.db.*.backup")
    assert left.as_uri() in dump(backup)
    assert doctor(folder, "doctor.fix_paths=true")["paths"].text.startswith("nothing to fix")


def test_fix_that_fails_half_way_changes_nothing(moved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dump(moved / "mlflow.db")
    monkeypatch.setattr(paths, "PATHS", (*paths.PATHS, ("nosuch", "column", "1")))
    with pytest.raises(sqlite3.OperationalError):
        fix_paths(moved / "mlflow.db", experiment="one")
    assert dump(moved / "mlflow.db") == before


def test_store_behind_a_symbolic_link_is_not_moved(original: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(original, target_is_directory=True)
    assert previous_folders(tmp_path / "link" / "mlflow.db", experiment="one") == []
    opened(tmp_path / "link")


def test_artifacts_in_another_location_are_not_changed(original: Path, tmp_path: Path) -> None:
    store = opened(original)
    elsewhere = tmp_path / "big disk" / "mlruns" / "two"
    elsewhere.mkdir(parents=True)
    store.client.create_experiment("two", artifact_location=elsewhere.as_uri())
    store.client.create_experiment("three", artifact_location="s3://bucket/mlruns/three")
    assert opened(original, "two").experiment_id != store.experiment_id
    assert opened(original, "three").experiment_id != store.experiment_id
    assert fix_paths(original / "mlflow.db", experiment="two").startswith("nothing to fix")


def test_every_column_of_the_installed_mlflow_that_holds_a_local_path_is_known(original: Path) -> None:
    known = {(table, column) for table, column, _ in paths.PATHS}
    with closing(sqlite3.connect(original / "mlflow.db")) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        found = {
            (table, column)
            for table in tables
            for _, column, kind, *_ in connection.execute(f"PRAGMA table_info({table})").fetchall()
            for form in (str(original), original.as_uri())
            if connection.execute(f'SELECT 1 FROM {table} WHERE instr("{column}", ?) LIMIT 1', [form]).fetchone()
        }
    assert found <= known
    assert {("experiments", "artifact_location"), ("runs", "artifact_uri"), ("model_versions", "source")} <= found


def test_location_of_a_trace_is_replaced(moved: Path) -> None:
    with closing(sqlite3.connect(moved / "mlflow.db")) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        place = (moved.parent / "gone" / "mlruns" / "one" / "traces" / "t").as_uri()
        for key, value in (("mlflow.artifactLocation", place), ("note", place)):
            connection.execute("INSERT INTO trace_tags (key, value, request_id) VALUES (?, ?, 't')", [key, value])
        connection.commit()
    fix_paths(moved / "mlflow.db", experiment="one")
    with closing(sqlite3.connect(moved / "mlflow.db")) as connection:
        values = dict(connection.execute("SELECT key, value FROM trace_tags"))
    assert values == {"mlflow.artifactLocation": (moved / "mlruns" / "one" / "traces" / "t").as_uri(), "note": place}
