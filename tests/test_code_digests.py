"""Digests of source code change with code that decides numbers, and with nothing else."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from prostate_seg.provenance import code_digests, source_files
from prostate_seg.provenance.code_digests import code_listing, digest_of_source, is_neutral
from prostate_seg.provenance.source_files import PACKAGE

SOURCE = '''"""Metrics."""
import logging
from typing import TYPE_CHECKING

import numpy as np
from prostate_seg.common.errors import InputError
if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)
LIMIT: float = 0.5
"""Share of overlap."""

def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Return Dice."""
    if one.shape != other.shape:
        raise InputError(_problem(one))
    log.info("measured")
    findings = ["the mask is on another grid"]
    return map_cases(2 * np.sum(one & other), label="measuring") # twice

def _problem(one) -> str:
    return f"{one} differs"
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# twice", "# two times"),
        ("Return Dice.", "Return the Dice coefficient."),
        ("Share of overlap.", "Least overlap."),
        ("import logging", "import logging\n\n\n\n"),
        ("one: np.ndarray", "one"),
        ("LIMIT: float", "LIMIT: int"),
        ("raise InputError(_problem(one))", 'raise InputError("shapes differ") from None'),
        ("{one} differs", "{one} is another"),
        ('log.info("measured")', 'log.warning("%s was measured", one)'),
        ("is on another grid", "and the image are on different grids"),
        ('label="measuring"', 'label="metrics"'),
        ("from pathlib import Path", "from os import PathLike"),
        ("import numpy as np", "import os\nimport numpy as np"),
    ],
)
def test_messages_and_annotations_do_not_change_the_digest(old: str, new: str) -> None:
    assert old in SOURCE
    assert digest_of_source(SOURCE.replace(old, new)) == digest_of_source(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2 * np", "3 * np"),
        ("LIMIT: float = 0.5", "LIMIT: float = 0.6"),
        ("one & other", "one | other"),
        ("import numpy as np", "import cupy as np"),
        ("one.shape != other.shape", "one.size != other.size"),
        ("raise InputError(_problem(one))", "return 0.0"),
        ('["the mask is on another grid"]', "[]"),
        ("from prostate_seg.common.errors", "from elsewhere"),
    ],
)
def test_what_decides_numbers_changes_the_digest(old: str, new: str) -> None:
    assert old in SOURCE
    assert digest_of_source(SOURCE.replace(old, new)) != digest_of_source(SOURCE)


def test_column_names_change_the_digest_and_sentences_do_not() -> None:
    assert digest_of_source("x = header['space directions']") != digest_of_source("x = header['space origin']")
    assert digest_of_source("x = 'a,b,c,d,e'") != digest_of_source("x = 'a,b,c,d'")
    assert digest_of_source("x = 'the mask marks no voxel'") == digest_of_source("x = 'this mask is empty here'")


def test_digest_does_not_depend_on_the_version_of_python() -> None:
    source = (
        "def f(a, *b, c=1, **d):\n    return [f'{x!r:>{a}}' 'y' for x in b if x] or {**d, 'c': (c, -1.5, b'z', ...)}\n"
    )
    assert digest_of_source(source) == "6624169b4fb0a3997bc9b9d7828427e8"


def test_a_stage_has_the_modules_that_decide_its_numbers() -> None:
    train = set(code_digests.code_digests("train"))
    assert {"prostate_seg/stages/train.py", "prostate_seg/segmentation/training/losses.py"} <= train
    assert not [name for name in train if "/config/" in name or "plots" in name]
    assert "prostate_seg/segmentation/metrics.py" not in train
    evaluate, report = code_digests.code_digests("evaluate"), code_digests.code_digests("report")
    assert "prostate_seg/segmentation/metrics.py" in evaluate
    assert "prostate_seg/reporting/pages/templates/report.html.j2" in report
    assert all(len(digest) == 32 for digest in report.values())


def test_modules_that_draw_and_settings_are_neutral() -> None:
    neutral = (
        "config/workspace.py",
        "common/errors.py",
        "reporting/figures/plots.py",
        "reporting/pages/templates/report.css",
    )
    assert all(is_neutral(PACKAGE / name) for name in neutral)
    assert not any(is_neutral(PACKAGE / name) for name in ("common/files.py", "segmentation/metrics.py"))


def test_unchanged_listings_are_not_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["code_digests", "prepare"])
    code_digests.main()
    path = tmp_path / ".cache" / "code" / "prepare.txt"
    assert path.read_text() == code_listing(code_digests.code_digests("prepare"))
    written = path.stat().st_mtime_ns
    code_digests.main()
    assert path.stat().st_mtime_ns == written


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the package, whose digests the functions under test compute."""
    copy = tmp_path / "project" / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code_digests, "PACKAGE", copy)
    monkeypatch.setattr(source_files, "PACKAGE", copy)
    return copy


def test_digests_of_an_unchanged_package_come_from_the_cache(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = code_digests.stage_code("prepare", cache_folder=tmp_path)
    assert first.digests == code_digests.code_digests("prepare")
    assert [package.parent / key for key in first.files] == source_files.source_files("prepare")
    monkeypatch.setattr(code_digests, "code_digests", lambda _: pytest.fail("computed again"))
    assert code_digests.stage_code("prepare", cache_folder=tmp_path) == first


def test_an_edit_that_keeps_size_and_time_changes_the_cached_digest(package: Path, tmp_path: Path) -> None:
    file = package / "data" / "folds.py"
    before = code_digests.stage_code("prepare", cache_folder=tmp_path)
    old = file.stat()
    file.write_text(file.read_text().replace("len(patients) < needed", "len(patients) > needed"))
    os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (old.st_size, old.st_mtime_ns)
    after = code_digests.stage_code("prepare", cache_folder=tmp_path)
    changed = {key for key, digest in after.digests.items() if before.digests[key] != digest}
    assert changed == {"prostate_seg/data/folds.py"}


def test_a_new_import_adds_its_module_to_the_cached_code(package: Path, tmp_path: Path) -> None:
    before = code_digests.stage_code("prepare", cache_folder=tmp_path)
    with (package / "data" / "folds.py").open("a") as stream:
        stream.write("from prostate_seg.segmentation import metrics\n")
    after = code_digests.stage_code("prepare", cache_folder=tmp_path)
    assert "prostate_seg/segmentation/metrics.py" in set(after.digests) - set(before.digests)
    assert "prostate_seg/segmentation/metrics.py" in set(after.files) - set(before.files)


def test_an_edit_while_digests_are_computed_is_not_cached(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, file = code_digests.code_digests, package / "data" / "folds.py"
    text = file.read_text()

    def edited_first(stage: str) -> dict[str, str]:
        file.write_text(text + "LIMIT = 3\n")
        return compute(stage)

    with monkeypatch.context() as patch:
        patch.setattr(code_digests, "code_digests", edited_first)
        code_digests.stage_code("prepare", cache_folder=tmp_path)
    file.write_text(text)
    assert code_digests.stage_code("prepare", cache_folder=tmp_path).digests == compute("prepare")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"package_md5": "0"}'])
def test_damaged_cache_is_computed_again(package: Path, tmp_path: Path, text: str) -> None:
    first = code_digests.stage_code("prepare", cache_folder=tmp_path)
    path = tmp_path / "stage_code" / "prepare.json"
    path.write_text(text)
    assert code_digests.stage_code("prepare", cache_folder=tmp_path) == first
    assert json.loads(path.read_text())["digests"] == first.digests
