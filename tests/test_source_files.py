"""The source files of a stage are those that it imports, directly or indirectly."""

import subprocess
import sys

import pytest

from prostate_seg.provenance.source_files import PACKAGE, files_behind, source_files
from tests.conftest import ROOT


@pytest.mark.parametrize("stage", ["fetch", "preprocess", "prepare", "train", "evaluate", "report"])
def test_source_files_are_those_that_python_loads(stage: str) -> None:
    code = (
        f"import sys; import prostate_seg.stages.{stage};"
        "print(*sorted(m.__file__ for n, m in list(sys.modules.items()) if n.split('.')[0] == 'prostate_seg'))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    table, tracking = PACKAGE / "stages" / "__init__.py", PACKAGE / "tracking"
    expected = set(loaded.split()) - {str(table)}
    assert expected <= {str(path) for path in source_files(stage)}
    # train and report import tracking when a setting names a run or a registered model.
    eager = files_behind(
        PACKAGE / "stages" / f"{stage}.py", is_left_out=lambda path: path == table or tracking in path.parents
    )
    assert {str(path) for path in eager if path.suffix == ".py"} == expected


def test_templates_belong_to_the_stage_that_fills_them() -> None:
    templates = {"report.html.j2", "review.html.j2", "report.css", "report.js", "model_card.md.j2"}
    assert {path.name for path in source_files("report") if path.suffix != ".py"} == templates
    assert all(path.suffix == ".py" for path in source_files("train"))


def test_no_stage_imports_another() -> None:
    prepare = {path.relative_to(PACKAGE).as_posix() for path in source_files("prepare")}
    assert "data/folds.py" in prepare
    assert "segmentation/training/training.py" not in prepare
    assert not [name for name in prepare if name.startswith("tracking/")]
