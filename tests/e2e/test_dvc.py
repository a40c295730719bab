"""DVC: which stages rerun, what is tracked, and links between commits, experiments and runs."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from prostate_seg.tracking.store.paths import fix_paths
from tests.conftest import ROOT
from tests.fork_server import python_folder
from tests.project_helpers import free_port, only_in_hard_use, until

EXPERIMENT = """# @package _global_
# Choose in a test.
data: {phantom: {num_patients: 4, num_second_studies: 0, field_of_view_mm: 100, gland_volume_range_ml: [25, 50]}}
preprocess: {spacing_mm: [3, 0.8, 0.8], image_size: 96}
fold: {num_folds: 2}
model: {channels: [8, 16], strides: [[2, 2]]}
train: {steps_per_epoch: 2, max_epochs: 2}
evaluate: {num_bootstrap: 100}
"""
NOTHING_RAN = "Data and pipelines are up to date."


@dataclass(frozen=True)
class Clone:
    """A clone of the project with its own data, settings and commits."""

    folder: Path

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("MLFLOW", "DVC", "PYTHONPATH", "GIT"))
        }
        env = kept | {
            "PATH": f"{python_folder()}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DVC_NO_ANALYTICS": "1",
            "DVC_SITE_CACHE_DIR": str(self.folder / "site"),
            "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@example.org",
            "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@example.org",
        }  # fmt: skip
        done = subprocess.run(
            command, cwd=self.folder, env=env | environment, capture_output=True, text=True, timeout=500, check=False
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def stage(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("python", "-m", "prostate_seg", *arguments, check=check)

    def commit(self, message: str) -> str:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", message)
        return self.run("git", "rev-parse", "HEAD").stdout.strip()

    def runs(self, **tags: str) -> list[Run]:
        client = MlflowClient(tracking_uri=f"sqlite:///{self.folder}/mlflow.db")
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        experiment = client.get_experiment_by_name("prostate_seg")
        assert experiment is not None
        return list(client.search_runs([experiment.experiment_id], query, order_by=["attributes.start_time ASC"]))

    def lock(self) -> dict[str, dict[str, list[dict[str, str]]]]:
        stages: dict[str, dict[str, list[dict[str, str]]]] = yaml.safe_load((self.folder / "dvc.lock").read_text())[
            "stages"
        ]
        return stages

    def dice(self) -> float:
        return float(json.loads((self.folder / "evaluation" / "summary.json").read_text())["test"]["dice"])

    def learning_rate(self) -> float:
        return float(yaml.safe_load((self.folder / "params.yaml").read_text())["train"]["learning_rate"])


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A DVC remote."""

    url: str
    options: dict[str, str]
    environment: dict[str, str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """The pipeline, run once by `dvc repro` and committed."""
    clone = Clone(tmp_path_factory.mktemp("dvc") / "clone")
    clone.folder.mkdir()
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in files:
        if not name.startswith(("tests/", "docs/")) and (ROOT / name).is_file():
            (clone.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone.folder / name)
    (clone.folder / "configs" / "experiment" / "small.yaml").write_text(EXPERIMENT)
    with (clone.folder / ".gitignore").open("a") as ignored:
        ignored.write("/site/\n")
    clone.run("git", "init", "--quiet", "--initial-branch", "main")
    clone.commit("The code")
    before_data = clone.run("dvc", "repro", check=False)
    assert before_data.returncode != 0
    assert "  python -m prostate_seg --config-name from_params stage=fetch\n" in before_data.stdout + before_data.stderr
    clone.stage("stage=fetch", "experiment=small")
    clone.run("dvc", "add", "--quiet", "data")
    clone.stage("stage=export", "experiment=small")
    clone.commit("Data and settings")
    clone.run("scripts/install_hooks.sh", str(python_folder() / "python"))
    clone.run("dvc", "repro")
    clone.commit("Results")
    return clone


@pytest.fixture
def clone(finished: Clone, tmp_path: Path) -> Clone:
    shutil.copytree(finished.folder, tmp_path / "clone", symlinks=True)
    assert fix_paths(tmp_path / "clone" / "mlflow.db", experiment="prostate_seg") is not None
    return Clone(tmp_path / "clone")


def test_second_repro_and_edits_of_messages_and_colours_rerun_no_stage(clone: Clone) -> None:
    assert NOTHING_RAN in clone.run("dvc", "repro").stdout
    for name in ("configs/machine/default.yaml", "README.md"):
        with (clone.folder / name).open("a") as file:
            file.write("\n# a remark\n")
    assert NOTHING_RAN in clone.run("dvc", "repro").stdout
    edit(clone, "prostate_seg/config/schema.py", '"""\n', ' In other words."""\n')  # the first sentence below a setting
    edit(clone, "prostate_seg/stages/evaluate.py", 'log.info("', 'log.info("Now: ')
    edit(clone, "prostate_seg/segmentation/metrics.py", "\n\n\n", "\n\n\n# a remark\n")
    edit(clone, "prostate_seg/reporting/figures/plots.py", "\n\n\n", '\n\nLINE_COLOUR = "#ff0000"\n\n\n')
    assert set(stages_run(clone)) == {"code"}


def test_code_that_decides_numbers_reruns_its_stage_and_later_ones(clone: Clone) -> None:
    edit(clone, "prostate_seg/segmentation/metrics.py", "\n\n\n", "\n\nMAX_DISTANCE_MM = 100.0\n\n\n")
    assert stages_run(clone) == ["code", "evaluate", "report"]
    edit(clone, "prostate_seg/stages/prepare.py", "\n\n\n", "\n\nNUM_TRIES = 1\n\n\n")
    assert stages_run(clone) == ["code", "prepare"]


def edit(clone: Clone, name: str, old: str, new: str) -> None:
    """Replace the first occurrence of a text in a file."""
    text = (clone.folder / name).read_text()
    assert old in text, name
    (clone.folder / name).write_text(text.replace(old, new, 1))


def stages_run(clone: Clone) -> list[str]:
    """Return the stages that `dvc repro` runs."""
    return re.findall(r"^Running stage '(\w+)'", clone.run("dvc", "repro").stdout, re.MULTILINE)


def test_hashes_in_the_runs_equal_dvc_lock_line_by_line(finished: Clone) -> None:
    num_lines = 0
    for stage, lines in finished.lock().items():
        if stage in ("check_data", "code"):  # record no run
            continue
        (run,) = finished.runs(stage=stage, level="stage")
        for kind, deps in (("inputs", lines["deps"]), ("outputs", lines["outs"])):
            for line in deps:
                if line["path"] == ".cache/data_checked":
                    continue
                is_code = line["path"] == f".cache/code/{stage}.txt"
                tag = "md5.code" if is_code else f"md5.{kind}/{line['path']}"
                assert run.data.tags[tag] == line["md5"], (stage, line["path"])
                num_lines += 1
    assert num_lines > 20


def test_runs_are_found_by_commit_and_commits_by_run(finished: Clone) -> None:
    head = finished.run("git", "rev-parse", "HEAD").stdout.strip()
    for stage in ("preprocess", "prepare", "train", "evaluate"):
        (run,) = finished.runs(stage=stage, level="stage")
        assert run.data.tags["committed_in"] == head  # by the hook
        found = finished.stage("stage=find", "find.commit=main").stdout
        assert f"{stage:<11} {run.info.run_id}  FINISHED  baseline" in found.splitlines()
    shown = finished.stage("stage=find", f"find.run={run.info.run_id}").stdout
    assert f"committed in  {head}" in shown
    assert f"git checkout {head} && dvc checkout && dvc repro --force --single-item evaluate" in shown
    refused = finished.stage("stage=find", "find.commit=no-such-thing", check=False)
    assert refused.returncode == 1
    assert "no-such-thing: is the name of no commit in git, and of no experiment in DVC" in refused.stderr
    assert "has no dvc.lock" in finished.stage("stage=find", "find.commit=main~2", check=False).stderr


def test_export_check_and_settings_of_the_machine(clone: Clone) -> None:
    assert clone.stage("stage=export", "experiment=small", "export.check=true").returncode == 0
    refused = clone.stage(
        "stage=export", "experiment=small", "export.check=true", "train.learning_rate=0.1", check=False
    )
    assert refused.returncode == 1
    assert "  train.learning_rate: 0.003 in params.yaml, 0.1 in the config" in refused.stderr
    before = (clone.folder / "params.yaml").read_text()
    clone.stage("stage=export", "experiment=small", "mlflow.name=other", "machine.num_workers=1", "paths.cache=/tmp/x")
    text = (clone.folder / "params.yaml").read_text()
    assert [line for line in text.splitlines() if line[0] != "#"] == [
        line for line in before.splitlines() if line[0] != "#"
    ]
    assert NOTHING_RAN in clone.run("dvc", "repro").stdout
    refused = clone.stage("stage=export", "data.root=${oc.env:HOME}", check=False)
    assert refused.returncode == 2
    assert "data.root: must be a plain value to be exported, is ${oc.env:HOME}" in refused.stderr


@pytest.mark.slow
def test_forced_and_single_stages_supersede_their_runs(clone: Clone) -> None:
    before = clone.lock()
    clone.run("dvc", "repro", "--force")
    after = clone.lock()
    assert after["report"]["deps"] == before["report"]["deps"]  # its pages contain the ids of new runs
    assert after.keys() == before.keys()
    assert not [stage for stage in after if stage != "report" and after[stage] != before[stage]]  # bit-identical
    for stage in ("preprocess", "prepare", "train", "evaluate"):
        assert len(clone.runs(stage=stage, level="stage")) == 1
    clone.stage("stage=export", "experiment=small", "train.learning_rate=0.001")
    clone.run("dvc", "repro", "--single-item", "train")
    (run,) = clone.runs(stage="train", level="stage")
    assert run.data.params["train.learning_rate"] == "0.001"
    assert "train:" not in clone.run("dvc", "status").stdout
    assert "evaluate:" in clone.run("dvc", "status").stdout


@pytest.mark.slow
def test_experiments_keep_files_params_and_runs_separate(clone: Clone) -> None:
    baseline, dice = clone.run("git", "rev-parse", "HEAD").stdout.strip(), clone.dice()
    small = ["-S", "experiment=small"]
    clone.run("dvc", "exp", "run", "--temp", "-n", "tempered", *small, "-S", "train.learning_rate=1e-3")
    assert clone.dice() == dice
    assert clone.learning_rate() == 0.003
    (train,) = clone.runs(pipeline="tempered", stage="train", level="stage")
    assert train.data.tags["dvc.experiment"] == "tempered"
    assert train.data.tags["dvc.baseline"] == baseline
    assert [run.data.tags["reused_from"] for run in clone.runs(pipeline="tempered", stage="preprocess")]
    assert clone.runs(pipeline="baseline", stage="train", level="stage")  # not superseded
    shown = clone.stage("stage=find", "find.commit=tempered").stdout
    assert f"train       {train.info.run_id}  FINISHED  tempered" in shown
    clone.stage("stage=link", "link.commit=tempered")
    (train,) = clone.runs(pipeline="tempered", stage="train", level="stage")
    assert train.data.tags["dvc.experiment_commit"]

    direct = ["-S", "model=attention_unet", "-S", "train.learning_rate=1e-3"]
    clone.run("dvc", "exp", "run", "-n", "direct", *small, *direct)
    assert clone.learning_rate() == 0.001
    (train,) = clone.runs(pipeline="direct", stage="train", level="stage")
    assert train.data.params["model.name"] == "attention_unet"
    assert train.data.tags["dvc.baseline"] == baseline
    clone.run("git", "checkout", "--quiet", ".")
    clone.run("dvc", "checkout", "--quiet")

    failed = clone.run(
        "dvc", "exp", "run", "-n", "doomed", *small, "-S", "fold.num_folds=9", check=False
    )  # fmt: skip
    assert failed.returncode != 0
    (prepare,) = clone.runs(pipeline="doomed", stage="prepare")
    assert prepare.info.status == "FAILED"
    clone.run("git", "checkout", "--quiet", ".")
    clone.run("dvc", "checkout", "--quiet")
    assert NOTHING_RAN in clone.run("dvc", "repro").stdout

    clone.run("dvc", "exp", "apply", "tempered")
    assert clone.learning_rate() == 0.001
    assert NOTHING_RAN in clone.run("dvc", "repro").stdout
    assert clone.dice() != dice
    clone.commit("The tempered one")
    clone.run("git", "checkout", "--quiet", baseline)
    clone.run("dvc", "checkout", "--quiet")
    assert clone.dice() == dice
    assert clone.learning_rate() == 0.003


@pytest.mark.slow
@only_in_hard_use
def test_experiment_without_hydra_keeps_the_settings_of_params_yaml(clone: Clone) -> None:
    clone.run("dvc", "exp", "run", "--no-hydra", "-n", "kept", "-S", "fold.val_fraction=0.4", "prepare")
    settings = yaml.safe_load((clone.folder / "params.yaml").read_text())
    assert settings["fold"]["val_fraction"] == 0.4
    assert settings["train"]["steps_per_epoch"] == 2  # of experiment=small; DVC would compose the default, 50
    assert clone.runs(pipeline="kept", stage="prepare")


@pytest.mark.slow
@only_in_hard_use
def test_queued_experiments_run_in_parallel(clone: Clone) -> None:
    small = ["-S", "experiment=small"]
    clone.run("dvc", "exp", "run", "--queue", "-n", "one", *small, "-S", "model=attention_unet")
    clone.run("dvc", "exp", "run", "--queue", "-n", "two", *small, "-S", "train.learning_rate=1e-3")
    clone.run("dvc", "queue", "start", "-j", "2")
    end = time.monotonic() + 240
    while "Running" in (status := clone.run("dvc", "queue", "status").stdout) or "Queued" in status:
        assert time.monotonic() < end, status
        time.sleep(2)
    assert status.count("Success") == 2, status + clone.run("dvc", "queue", "logs", "one", check=False).stdout
    for name, model in (("one", "attention_unet"), ("two", "unet")):
        (run,) = clone.runs(pipeline=name, stage="evaluate", level="stage")
        assert run.info.status == "FINISHED"
        assert run.data.params["model.name"] == model
    table = clone.run("dvc", "exp", "show", "--json").stdout
    assert {"one", "two"} <= {exp["name"] for row in json.loads(table) for exp in row["experiments"] or []}
    assert clone.learning_rate() == 0.003


@pytest.mark.slow
def test_dvc_metrics_and_plots_work_without_options(clone: Clone) -> None:
    clone.stage("stage=export", "experiment=small", "train.learning_rate=0.001")
    clone.run("dvc", "repro")
    difference = json.loads(clone.run("dvc", "metrics", "diff", "--json").stdout)
    assert set(difference["evaluation/summary.json"]) >= {"test.dice", "test.hd95_mm"}
    out = clone.run("dvc", "plots", "diff", "-o", "site/plots")
    page = (clone.folder / "site" / "plots" / "index.html").read_text()
    assert "val Dice of fold 0" in page, out.stderr
    assert "Dice of each case" in page


def test_recorded_stage_is_reproduced_bit_for_bit(finished: Clone) -> None:
    (prepare,) = finished.runs(stage="prepare", level="stage")
    done = finished.stage("stage=reproduce", f"reproduce.run={prepare.info.run_id}")
    assert "bit-identical: every output has the recorded hash" in done.stdout


@pytest.mark.slow
def test_reproduction_is_bit_identical_or_reports_the_differences(clone: Clone) -> None:
    clone.run("dvc", "repro", "--force", "--single-item", "train")  # a run whose artifacts only this test uses
    (train,) = clone.runs(stage="train", level="stage")
    shutil.rmtree(clone.folder / "preprocess")  # is then restored from DVC's cache
    with (clone.folder / "prostate_seg" / "segmentation" / "training" / "losses.py").open("a") as file:
        file.write("\n# a remark that is in no commit\n")
    done = clone.stage("stage=reproduce", f"reproduce.run={train.info.run_id}")
    assert "the code of commit" in done.stdout
    assert "bit-identical: every output has the recorded hash" in done.stdout
    assert clone.run("git", "worktree", "list").stdout.count("\n") == 1
    assert not (clone.folder / "preprocess").exists()

    client = MlflowClient(tracking_uri=f"sqlite:///{clone.folder}/mlflow.db")
    path = clone.folder / "provenance.json"
    record = json.loads(Path(client.download_artifacts(train.info.run_id, "provenance.json")).read_text())
    record["outputs"]["model"] = "0" * 32 + ".dir"
    path.write_text(json.dumps(record))
    client.log_artifact(train.info.run_id, str(path))
    done = clone.stage("stage=reproduce", f"reproduce.run={train.info.run_id}")
    assert "different model" in done.stdout
    assert "reproduced: outputs differ, every metric agrees within 1.00%" in done.stdout
    record["metrics"]["val/best_dice"] = 0.9
    path.write_text(json.dumps(record))
    client.log_artifact(train.info.run_id, str(path))
    done = clone.stage("stage=reproduce", f"reproduce.run={train.info.run_id}", check=False)
    assert done.returncode == 1
    assert "not reproduced" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("folder", marks=only_in_hard_use), "s3"])
def test_data_and_model_round_trip_through_a_remote(clone: Clone, tmp_path: Path, kind: str) -> None:
    with s3_remote(tmp_path) if kind == "s3" else folder_remote(tmp_path) as remote:
        clone.run("dvc", "remote", "add", "--default", "store", remote.url)
        for name, value in remote.options.items():
            clone.run("dvc", "remote", "modify", "store", name, value)
        clone.run("dvc", "push", **remote.environment)
        weights = (clone.folder / "model" / "fold0" / "weights.safetensors").read_bytes()
        for name in ("data", "model", "preprocess", ".dvc/cache", "site"):
            shutil.rmtree(clone.folder / name)
        clone.run("dvc", "pull", **remote.environment)
        assert (clone.folder / "model" / "fold0" / "weights.safetensors").read_bytes() == weights
        assert NOTHING_RAN in clone.run("dvc", "repro").stdout
        if kind == "folder":  # an input that is neither in the workspace nor in the cache is pulled from the remote
            for name in ("preprocess", ".dvc/cache", "site"):
                shutil.rmtree(clone.folder / name)
            (prepare,) = clone.runs(stage="prepare", level="stage")
            done = clone.stage("stage=reproduce", f"reproduce.run={prepare.info.run_id}")
            assert "bit-identical" in done.stdout


@contextlib.contextmanager
def folder_remote(folder: Path) -> Iterator[Remote]:
    """A folder as a remote."""
    yield Remote(url=str(folder / "remote"), options={}, environment={})


@contextlib.contextmanager
def s3_remote(folder: Path) -> Iterator[Remote]:
    """An S3 server on a free port, with a bucket."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}

    def bucket_is_made() -> bool:
        try:
            return urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT")).status == 200
        except OSError:
            return False

    try:
        until(bucket_is_made, 60)
        yield Remote(url="s3://bucket/dvc", options={"endpointurl": address}, environment=keys)
    finally:
        process.terminate()
        process.wait(20)
