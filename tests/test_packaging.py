"""First steps of a new user: commands of the README, help of the Makefile, the installed wheel."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import prostate_seg
from prostate_seg.provenance.source_files import source_files
from tests.conftest import ROOT, Launch

PAGES = [ROOT / "README.md", ROOT / "docs" / "tutorial.md"]
"""Pages whose commands are run in a process each; test_docs.py composes the commands of all pages."""


def readme_commands() -> list[str]:
    """Return every distinct command of these pages and of the last lines of the demo."""
    blocks = [block for page in PAGES for block in re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL)]
    echoed = re.findall(r'echo "(.*)"', (ROOT / "scripts" / "demo.sh").read_text())
    blocks.append("\n".join(echoed).replace("\\\\", "\\"))
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [re.sub(r"\s+(#|&&).*", "", line) for line in lines if line.startswith("python -m prostate_seg ")]
    return list(dict.fromkeys(commands))


@pytest.mark.parametrize("command", readme_commands())
def test_readme_command_composes_and_is_accepted(launch: Launch, command: str) -> None:
    arguments = [part for part in shlex.split(command, comments=True)[3:] if part != "-m"]
    first_of_a_sweep = r"=(?:tag\(log, )?(?:(?:interval|choice|range)\()?([^\[(]*?),.*"
    arguments = [re.sub(first_of_a_sweep, r"=\1", part) for part in arguments]
    result = launch(*arguments, *([] if "--cfg" in arguments else ["--cfg", "job"]))
    assert result.returncode == 0, result.stderr


def test_readme_has_commands_and_its_links_exist() -> None:
    assert len(readme_commands()) >= 6
    for page in PAGES:
        for link in re.findall(r"\]\((?!https:)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_make_help_lists_every_target() -> None:
    if shutil.which("make") is None:
        pytest.skip("no make here")
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    for target in phony.group(1).split():
        assert f"make {target}" in text


@pytest.mark.slow
def test_wheel_contains_the_configs_and_runs_outside_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "prostate_seg/configs/config.yaml" in names
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    templates = {str(path.relative_to(ROOT)) for path in source_files("report")}
    assert {f"prostate_seg/{name}" for name in shipped} | templates <= set(names)

    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    (site / "others.pth").write_text(next(path for path in sys.path if path.endswith("site-packages")) + "\n")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [tmp_path / "venv/bin/python", "-c", "from prostate_seg.__main__ import main; main()", "--cfg", "job"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "num_folds: 5" in result.stdout


def test_sdist_has_every_file_of_the_repository(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("no git repository here")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert set(listed.stdout.split()) <= packed


def test_version_of_the_citation_is_that_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == prostate_seg.__version__


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("citation-file-format", ["CITATION.cff"]),
        ("github-issue-forms", [".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/question.yml"]),
        ("github-issue-config", [".github/ISSUE_TEMPLATE/config.yml"]),
        ("github-workflows", [".github/workflows/ci.yml"]),
    ],
)
def test_files_of_the_code_host_have_their_schema(schema: str, files: list[str]) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *files]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_hooks_run_the_checks_of_ci() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for hook in hooks[:3]:
        assert hook["entry"].replace(".venv/bin/python", "$(RUN)") in makefile


def test_console_script_is_installed_with_the_project(tmp_path: Path) -> None:
    script = shutil.which("prostate-seg", path=Path(sys.executable).parent)  # prostate-seg.exe on Windows
    assert script is not None
    result = subprocess.run([script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2
    assert "Choose a stage" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_lock_pins_every_dependency_exactly() -> None:
    lock = (ROOT / "requirements.lock").read_text().lower().replace("_", "-")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"] + project["optional-dependencies"]["dev"]:
        name = re.match(r"[A-Za-z0-9_.-]+", requirement).group()  # type: ignore[union-attr]
        assert re.search(rf"^{re.escape(name.lower().replace('_', '-'))}==", lock, re.MULTILINE), name
    assert "torch==2.13.0\n" in lock
    assert not re.search(r"^nvidia|\+cpu|://", lock, re.MULTILINE)
