"""The CI workflow covers three systems, and its paths and commands exist."""

import re

import yaml

from tests.conftest import ROOT, composed
from tests.test_docs import first_of_each_sweep

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def test_workflow_runs_on_three_systems() -> None:
    jobs = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]
    systems = {jobs["linux"]["runs-on"], *jobs["others"]["strategy"]["matrix"]["os"]}
    assert systems == {"ubuntu-latest", "macos-latest", "windows-latest"}


def test_paths_and_commands_of_the_workflow_exist() -> None:
    text = WORKFLOW.read_text(encoding="utf-8")
    for path in re.findall(r"(?:tests/\S+|\.ci/run|requirements\.lock)", text):
        assert (ROOT / path.rstrip("}")).exists(), path
    (command,) = re.findall(r"python -m prostate_seg -m ([^#]*)", text)
    composed(*first_of_each_sweep(command.split()))


def test_tests_that_fork_are_skipped_without_fork() -> None:
    forking = {
        path.name for path in (ROOT / "tests").glob("*.py") if "os." + "fork(" in path.read_text(encoding="utf-8")
    }
    for name in forking:
        assert 'hasattr(os, "fork")' in (ROOT / "tests" / name).read_text(encoding="utf-8"), name
