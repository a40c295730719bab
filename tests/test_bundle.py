"""Bundles: a pipeline is packed into a file and imported into another store completely and once; harmful files are refused."""

import errno
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import Config, parse
from prostate_seg.config.workspace import workspace_of
from prostate_seg.provenance.redaction import Redactor
from prostate_seg.tracking.bundle import Unpacked, pack, unpack
from prostate_seg.tracking.journal import journal_folders
from prostate_seg.tracking.recorded_runs import open_tree
from prostate_seg.tracking.records import Level, TreePosition
from prostate_seg.tracking.store.run_tree import RunTree
from tests.conftest import composed
from tests.test_replication import files, train

SECRET = "planted-secret-0123456789"
Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Config of a store with a pipeline of two stages."""
    folder = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cfg = parse(composed("stage=train", f"mlflow.tracking_uri=sqlite:///{folder}/mlflow.db"))
        train(cfg, name="prepare")
        train(cfg)
        tree = tree_of(cfg)
        (stage,) = tree.search({"stage": "train", "level": "stage"})
        tree.client.log_text(stage.info.run_id, f"written by hand, with {SECRET}", "notes/more/note.txt")
        tree.client.set_tag(stage.info.run_id, "note", f"the password is {SECRET}")
        shutil.copy(folder / "mlflow.db", folder / "empty.db")  # creating the tables takes seconds
    return replace(cfg, paths=replace(cfg.paths, journal=str(folder / ".spool"), cache=str(folder / ".cache")))


@pytest.fixture(scope="module")
def bundle(cfg: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("bundle") / "runs.zip"
    assert packed(cfg, tree_of(cfg).pipeline("baseline", fresh=False).info.run_id, target, MY_TOKEN=SECRET) == 5
    return target


def elsewhere(cfg: Config, experiment: str) -> Config:
    """Return the same config with an empty store."""
    file = Path(str(cfg.mlflow.tracking_uri).removeprefix("sqlite:///")).with_name(f"{experiment}.db")
    shutil.copy(file.with_name("empty.db"), file)
    client = MlflowClient(f"sqlite:///{file}")
    for run in client.search_runs(["1"]):
        client.delete_run(run.info.run_id)
    settings = replace(cfg.mlflow, tracking_uri=f"sqlite:///{file}", experiment=experiment)
    return replace(cfg, mlflow=settings)


def tree_of(cfg: Config) -> RunTree:
    return open_tree(cfg.mlflow, cache=workspace_of(cfg).cache)


def packed(cfg: Config, run_id: str, target: Path, **environment: str) -> int:
    redactor = Redactor(environment=environment)
    return pack(run_id, target, cfg.mlflow, cache=workspace_of(cfg).cache, redactor=redactor)


def put(source: Path, cfg: Config) -> Unpacked:
    return unpack(source, cfg.mlflow, journal_root=Path(cfg.paths.journal), cache=workspace_of(cfg).cache)


def by_name(tree: RunTree) -> dict[str, Run]:
    return {f"{run.data.tags['stage']} {run.info.run_name}": run for run in tree.search()}


def held(tree: RunTree, run: Run) -> dict[str, Any]:
    client, run_id = tree.client, run.info.run_id
    return {
        "status": (run.info.status, run.info.start_time, run.info.end_time),
        "params": run.data.params,
        "curves": {
            name: [(point.step, point.timestamp, str(point.value)) for point in client.get_metric_history(run_id, name)]
            for name in run.data.metrics
        },
        "inputs": sorted((one.dataset.name, one.dataset.digest) for one in run.inputs.dataset_inputs),
        "artifacts": sorted(files(client, run)),
        "md5": {key: value for key, value in run.data.tags.items() if key.startswith(("md5", "git", "package"))},
    }


def test_bundle_is_imported_completely_with_its_lineage(cfg: Config, bundle: Path) -> None:
    there = elsewhere(cfg, "whole")
    done = put(bundle, there)
    assert (done.num_runs, done.num_new, done.num_refused) == (5, 5, 0)
    old, new = by_name(tree_of(cfg)), by_name(tree_of(there))
    assert set(old) == set(new)
    for name, run in old.items():
        assert held(tree_of(there), new[name]) == held(tree_of(cfg), run), name
        assert new[name].info.run_id != run.info.run_id
    ids = {run.info.run_id: new[name].info.run_id for name, run in old.items()}
    for name, run in old.items():
        for tag in ("mlflow.parentRunId", "previous_run_id.prepare"):
            assert new[name].data.tags.get(tag) == ids.get(run.data.tags.get(tag, "")), (name, tag)
    provenance = tree_of(there).client.download_artifacts(new["train train"].info.run_id, "provenance.json")
    record = json.loads(Path(provenance).read_text())
    assert record["run_id"] == new["train train"].info.run_id
    assert record["upstream"]["prepare"]["run_id"] == new["prepare prepare"].info.run_id
    assert journal_folders(Path(cfg.paths.journal)) == []


def test_second_import_and_import_into_its_own_store_add_nothing(
    cfg: Config, bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there = elsewhere(cfg, "twice")
    assert put(bundle, there).num_new == 5
    before = len(tree_of(there).search())
    assert put(bundle, there).num_new == 0
    assert put(bundle, cfg).num_new == 0
    assert "was deleted" not in caplog.text
    assert (len(tree_of(there).search()), len(tree_of(cfg).search())) == (before, 5)
    gone = by_name(tree_of(there))["train train"].info.run_id
    tree_of(there).client.delete_run(gone)
    assert put(bundle, there).num_new == 0
    assert f"run {gone} (train) was deleted\nRestore it on the MLflow page (Deleted), or with" in caplog.text


def test_import_that_was_killed_is_completed_by_the_next(
    cfg: Config, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = elsewhere(cfg, "killed")
    with monkeypatch.context() as faulty:
        faulty.setattr(MlflowClient, "log_inputs", lambda *_: pytest.exit("killed"))
        with pytest.raises(pytest.exit.Exception):
            put(bundle, there)
    assert len(journal_folders(Path(cfg.paths.journal))) == 1
    assert put(bundle, there).num_new == 5
    new = by_name(tree_of(there))
    assert held(tree_of(there), new["train train"]) == held(tree_of(cfg), by_name(tree_of(cfg))["train train"])
    shutil.rmtree(cfg.paths.journal)


def test_later_stages_join_their_own_pipeline_and_not_an_imported_one(cfg: Config, bundle: Path) -> None:
    there = elsewhere(cfg, "apart")
    put(bundle, there)
    tree = tree_of(there)
    unpacked = {run.info.run_id for run in tree.search()}
    assert tree.pipeline("baseline", fresh=False).info.run_id not in unpacked


def test_no_planted_secret_is_packed(bundle: Path) -> None:
    with zipfile.ZipFile(bundle) as archive:
        texts = {name: archive.read(name).decode("utf-8", errors="replace") for name in archive.namelist()}
    assert any("written by hand, with [redacted]" in text for text in texts.values())
    assert not [name for name, text in texts.items() if SECRET in text]


def test_only_a_complete_pipeline_that_has_ended_is_packed(cfg: Config, tmp_path: Path) -> None:
    tree = tree_of(cfg)
    stage = by_name(tree)["train train"]
    with pytest.raises(InputError, match=r"\(train\) is a part of the pipeline baseline\n.*the id of the pipeline"):
        packed(cfg, stage.info.run_id, tmp_path / "b.zip")
    with pytest.raises(InputError, match="there is no run 0123"):
        packed(cfg, "0123", tmp_path / "b.zip")
    other = tree.create("busy", TreePosition(level=Level.pipeline, pipeline="busy"), parent_id=None)
    with pytest.raises(InputError, match="busy of busy still runs"):
        packed(cfg, other.info.run_id, tmp_path / "b.zip")
    tree.client.delete_run(other.info.run_id)
    assert list(tmp_path.iterdir()) == []


def test_bundle_that_the_disk_does_not_take_is_refused(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = tree_of(cfg).pipeline("baseline", fresh=False).info.run_id
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"bundle.output: .*folder cannot be written \(Is a directory\)"):
        packed(cfg, pipeline, tmp_path / "folder")

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("prostate_seg.tracking.journal.os.write", full)
    with pytest.raises(InputError, match="is full: free some space there, or set TMPDIR"):
        packed(cfg, pipeline, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def changed(
    bundle: Path, target: Path, change: Callable[[Records], object], *, extra: dict[str, bytes] | None = None
) -> Path:
    """Write a bundle with changed records and additional files."""
    with zipfile.ZipFile(bundle) as source, zipfile.ZipFile(target, "w") as archive:
        records = [json.loads(line) for line in source.read("records.jsonl").splitlines()]
        change(records)
        archive.writestr("records.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        for name, content in (extra or {}).items():
            archive.writestr(name, content)
    return target


def first(records: Records, do: str) -> dict[str, Any]:
    return next(record for record in records if record.get("do") == do)


HARMFUL: dict[str, Callable[[Records], object]] = {
    "type of a record is 'place'": lambda records: records.append({"do": "place", "run": records[1]["run"]}),
    "type of a record is None": lambda records: records.append({}),
    "a run that it did not bring": lambda records: first(records, "log").update(run="0" * 32),
    "run of a record 'log' is": lambda records: first(records, "log").update(run="' or 1=1"),
    "folder of a record 'files' is '../../etc'": lambda records: first(records, "files").update(folder="../../etc"),
    "folder of a record 'files' is '/etc'": lambda records: first(records, "files").update(folder="/etc"),
    "to of a record 'files' is '..'": lambda records: first(records, "files").update(to=".."),
    "tags of a record 'log' hold 'process.pid'": lambda records: first(records, "log")["tags"].update(
        {"process.pid": "1"}
    ),
    "params of a record 'log' is": lambda records: first(records, "log").update(params={"a": 1}),
    "metrics of a record 'log' is": lambda records: first(records, "log").update(metrics=[["a", "b", 1, 1]]),
    "place of a record 'copy' is": lambda records: records[1]["place"].update(level="king"),
    "status of a record 'end_copy' is 'RUNNING'": lambda records: first(records, "end_copy").update(status="RUNNING"),
    "format of its first line is '7'": lambda records: records[0].update(format=7),
    "it holds no run": lambda records: records.__delitem__(slice(1, None)),
}


@pytest.mark.parametrize("message", HARMFUL)
def test_bundle_that_changes_other_runs_is_refused(cfg: Config, bundle: Path, tmp_path: Path, message: str) -> None:
    source = changed(bundle, tmp_path / "b.zip", HARMFUL[message])
    before = len(tree_of(cfg).search())
    with pytest.raises(InputError, match="is no bundle of this program") as caught:
        put(source, cfg)
    assert message in str(caught.value)
    assert len(tree_of(cfg).search()) == before
    assert journal_folders(Path(cfg.paths.journal)) == []


@pytest.mark.parametrize(
    "name", ["../evil", "/evil", "files/../../evil", "files/a/../../../evil", "evil", "files/a\\..\\b/c"]
)
def test_bundle_with_files_outside_of_the_journal_is_refused(
    cfg: Config, bundle: Path, tmp_path: Path, name: str
) -> None:
    source = changed(bundle, tmp_path / "b.zip", lambda _: None, extra={name: b"x"})
    with pytest.raises(InputError, match=r"holds '.*', which a bundle may not; nothing was unpacked"):
        put(source, cfg)
    assert journal_folders(Path(cfg.paths.journal)) == []
    assert not list(Path(cfg.paths.journal).parent.rglob("evil"))


def test_bundle_with_a_link_or_more_than_the_disk_holds_is_refused(
    cfg: Config, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = zipfile.ZipInfo("files/a/link")
    link.external_attr = 0o120777 << 16
    content = io.BytesIO(bundle.read_bytes())
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    (tmp_path / "link.zip").write_bytes(content.getvalue())
    with pytest.raises(InputError, match="holds 'files/a/link', which a bundle may not"):
        put(tmp_path / "link.zip", cfg)
    monkeypatch.setattr("prostate_seg.tracking.bundle.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"unpacks to .* GiB, and .* has 0.0 GiB free"):
        put(bundle, cfg)


def test_file_that_is_not_an_archive_is_refused_with_a_message(cfg: Config, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("notes")
    (tmp_path / "half").write_bytes(bundle.read_bytes()[: bundle.stat().st_size // 2])
    for name in ("notes", "half"):
        with pytest.raises(InputError, match=f"{name}: cannot be read as a bundle"):
            put(tmp_path / name, cfg)
    with pytest.raises(InputError, match="absent: there is no such file"):
        put(tmp_path / "absent", cfg)
    for member in ("records.jsonl", "files/"):  # read before, and after the journal is created
        with zipfile.ZipFile(bundle) as archive:
            info = next(one for one in archive.infolist() if one.filename.startswith(member) and one.compress_size > 9)
        damaged = bytearray(bundle.read_bytes())
        damaged[info.header_offset + 30 + len(info.filename)] = 0xFF  # a type of block that does not exist
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(InputError, match=r"damaged: cannot be read as a bundle \(.*\); copy it again"):
            put(tmp_path / "damaged", cfg)
        assert journal_folders(Path(cfg.paths.journal)) == []


def test_bundle_that_cannot_be_written_is_no_damaged_one(
    cfg: Config, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("prostate_seg.tracking.bundle.shutil.copyfileobj", full)
    with pytest.raises(
        InputError, match=r"cannot be unpacked \(.*No space left on device\)\n.* write to paths.journal"
    ):
        put(bundle, cfg)
    assert journal_folders(Path(cfg.paths.journal)) == []
