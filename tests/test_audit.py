"""Exit codes of `make audit` for reports of pip-audit, including reports that pip-audit itself accepts."""

import json
import os
from pathlib import Path
from typing import Any

import audit
import pytest

GOOD = {"name": "numpy", "version": "2.4.6", "vulns": []}
BAD = {"name": "pillow", "version": "1.0", "vulns": [{"id": "PYSEC-2023-1", "fix_versions": ["1.1"]}]}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited"}


@pytest.mark.parametrize(
    ("packages", "code", "words"),
    [
        ([GOOD], 0, "1 packages looked up, none is known to be vulnerable"),
        ([GOOD, BAD], 1, "pillow 1.0: PYSEC-2023-1; fixed in 1.1"),
        ([GOOD, BAD, UNKNOWN], 1, "1 of 3 packages are known to be vulnerable"),
        ([GOOD, UNKNOWN], 3, "NOT CHECKED: 1 of 2 packages, such as torch"),
        ([], 3, "NOT CHECKED: no database of vulnerabilities answered"),
    ],
)
def test_report_gives_exit_code_and_message(packages: list[dict[str, Any]], code: int, words: str) -> None:
    given, text = audit.judge({"dependencies": packages})
    assert given == code
    assert words in text


@pytest.fixture
def pip_audit(tmp_path: Path) -> Path:
    """A program with the output of pip-audit, from one file per service."""
    if os.name == "nt":
        pytest.skip("a program of two lines is none here")
    program = tmp_path / "pip-audit"
    folder = tmp_path / "answers"
    folder.mkdir()
    program.write_text(
        f'#!/bin/sh\nfor one in "$@"; do case $one in --vulnerability-service=*) s=${{one#*=}};; esac; done\ncat {folder}/$s\n'
    )
    program.chmod(0o755)
    return program


def test_second_service_is_used_if_the_first_does_not_answer(
    pip_audit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = pip_audit.parent / "answers"
    (answers / "pypi").write_text(json.dumps({"dependencies": [UNKNOWN]}))
    assert audit.judge_with(pip_audit, audit.LOCK) == 3
    assert "on a machine that reaches the services" in capsys.readouterr().out
    (answers / "osv").write_text(json.dumps({"dependencies": [GOOD]}))
    assert audit.judge_with(pip_audit, audit.LOCK) == 0
    (answers / "pypi").write_text(json.dumps({"dependencies": [BAD]}))
    assert audit.judge_with(pip_audit, audit.LOCK) == 1
