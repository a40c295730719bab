"""Documentation: links exist, commands compose and parse, the reference is current."""

import hashlib
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import click
import mlflow.cli
import pytest
import torch.distributed.run
from dvc.cli.parser import get_main_parser
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from prostate_seg import stages
from prostate_seg.cli import config_folder, hydra_word
from prostate_seg.config import schema as config
from scripts.update_reference import REFERENCE, reference_text
from tests.conftest import ROOT, composed

PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")),
    *sorted((ROOT / "docs").glob("**/*.md")),
]
COMMAND = re.compile(r"(?:python|torchrun)[^`\n]* -m prostate_seg\b([^`\n]*)")
NO_COMMAND = ("stage=NAME",)
"""Placeholders."""


def commands() -> list[tuple[str, str]]:
    """Return every command on every page, in blocks of any language and in lines, with the page's name."""
    texts = [(page.name, page.read_text(encoding="utf-8").replace("\\\n", " ")) for page in PAGES]
    found = [(name, match.group(1).strip()) for name, text in texts for match in COMMAND.finditer(text)]
    return sorted({one for one in found if one[1] and not any(word in one[1] for word in NO_COMMAND)})


def first_of_each_sweep(overrides: list[str]) -> list[str]:
    """Return the overrides of one job of a multirun, without those of Hydra and of the sweep."""
    with initialize_config_dir(config_dir=str(config_folder())):
        loader = GlobalHydra.instance().config_loader()  # expands glob(...)
    kept = []
    for override in OverridesParser.create(loader).parse_overrides(overrides):
        key = override.get_key_element()
        if re.match(r"\+?(sweep|hydra)\b", key):
            continue
        if override.is_discrete_sweep():
            kept.append(f"{key}={next(iter(override.sweep_string_iterator()))}")
        elif override.is_sweep_override():
            kept.append(f"{key}={override.value().start}")  # type: ignore[union-attr]
        else:
            kept.append(str(override.input_line))
    return kept


@pytest.mark.parametrize(("page", "arguments"), commands(), ids=lambda one: str(one)[:70])
def test_every_command_of_the_docs_composes_and_parses(page: str, arguments: str) -> None:
    words = [
        word
        for word in shlex.split(arguments, comments=True)
        if not word.startswith("-") and word not in ("job", "all")
    ]
    overrides = [hydra_word(word, is_multirun="-m" in arguments.split()) for word in words if "=" in word]
    cfg = config.parse(composed(*first_of_each_sweep(overrides)))
    if cfg.stage is not None:
        stages.require_stage(cfg.stage)


def test_commands_are_extracted_from_the_pages() -> None:
    assert len(commands()) > 40
    assert {page for page, _ in commands()} >= {"README.md", "dvc.md", "scaling.md", "tracking.md", "report.md"}


def without_code(page: Path) -> str:
    return re.sub(r"(?s)```.*?```", "", page.read_text(encoding="utf-8"))


def lines_of(*programs: str) -> list[tuple[str, str]]:
    """Return every command line of the pages that starts with one of these programs, with the name of the page."""
    found = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = re.findall(r"(?ms)^ *```\w*\n(.*?)^ *```", text)
        typed = [line.strip() for block in blocks for line in block.splitlines()]
        typed += re.findall(r"`([^`\n]+ [^`\n]+)`", without_code(page))
        parts = [part.strip() for line in typed for part in re.split(r"&&|;", re.sub(r"\s#.*", "", line))]
        found |= {(page.name, part) for part in parts if part.split(" ")[0] in programs and "..." not in part}
    return sorted(found)


@pytest.mark.parametrize(("page", "line"), lines_of("make"))
def test_every_target_of_make_in_the_docs_exists(page: str, line: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in line.split()[1:]:
        name, is_setting, _ = word.partition("=")
        assert re.search(rf"\$\({name}\)|or \$\({name}|\b{name}\b" if is_setting else rf"(?m)^{name}:", makefile), line


@pytest.mark.parametrize(("page", "line"), lines_of(".venv/bin/python", "python"))
def test_every_script_in_the_docs_exists_and_has_the_options(page: str, line: str) -> None:
    words = shlex.split(line)[1:]
    if words[:2] == ["-m", "prostate_seg"]:
        return  # composed above
    if words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[2:] if not word.startswith("-")), line
        return
    script, options = (words[1].replace(".", "/") + ".py", words[2:]) if words[0] == "-m" else (words[0], words[1:])
    text = (ROOT / script).read_text(encoding="utf-8")
    for option in (option for option in options if option.startswith("--")):
        assert f'"{option}"' in text, f"{script} has no {option}"


@pytest.mark.parametrize(("page", "line"), lines_of("dvc"))
def test_every_dvc_command_in_the_docs_exists(page: str, line: str) -> None:
    words = shlex.split(line)[1:]
    parsed = get_main_parser().parse_args(words)
    for override in getattr(parsed, "set_param", None) or []:
        config.parse(composed(*first_of_each_sweep([override])))


@pytest.mark.parametrize(("page", "line"), lines_of("mlflow"))
def test_every_mlflow_command_in_the_docs_exists(page: str, line: str) -> None:
    command: click.Command = mlflow.cli.cli
    words = shlex.split(line)[1:]
    while isinstance(command, click.Group) and words:
        command = command.commands[words.pop(0)]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options, line


@pytest.mark.parametrize(("page", "line"), [one for one in lines_of("torchrun") if "-m" in one[1]])
def test_every_torchrun_command_in_the_docs_parses(page: str, line: str) -> None:
    parsed = torch.distributed.run.get_args_parser().parse_args(shlex.split(line)[1:])
    assert (parsed.module, parsed.training_script) == (True, "prostate_seg")


def site_settings() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "conf.py"))


def anchors(page: Path) -> set[str]:
    """Return GitHub's anchors of the headings of a page."""
    headings = re.findall(r"(?m)^#+ +(.+?)\s*$", without_code(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_has_a_target(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", without_code(page))
    for link in re.findall(r"\]\(\s*<?([^)>\s]+)>?[^)]*\)", text) + re.findall(r"(?:href|src)=\"([^\"]+)\"", text):
        if re.match(r"https?://|mailto:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file) if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.resolve().is_relative_to(ROOT), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_linked_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        links = [page.parent / link for link in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text(encoding="utf-8"))]
        waiting += [link.resolve() for link in links if link.exists() and link.resolve() not in reached]
    assert reached == set(PAGES)


def test_navigation_of_the_site_has_every_page_once() -> None:
    listed = [page for pages in site_settings()["NAVIGATION"].values() for page in pages]
    pages = {str(page.relative_to(ROOT).with_suffix("")) for page in [*PAGES, ROOT / "docs" / "demo.ipynb"]}
    assert sorted(listed) == sorted(pages - {"README"})


def test_pictures_of_diagrams_on_the_site_are_current() -> None:
    for page in PAGES:
        for diagram in re.findall(r"(?s)```mermaid\n(.*?)```", page.read_text(encoding="utf-8")):
            picture = (page.parent / "figures" / f"{page.stem}.svg").read_text(encoding="utf-8")
            assert hashlib.sha256(diagram.encode()).hexdigest() in picture, f"draw {page.name}'s diagram again"


def test_paths_in_the_docs_exist() -> None:
    named = {
        (page.name, path)
        for page in PAGES
        for path in re.findall(r"`((?:prostate_seg|scripts|configs|tests)/[\w/.]+)`", without_code(page))
    }
    assert len(named) > 5
    packages = ROOT, ROOT / "prostate_seg"
    for page, path in sorted(named):
        assert any((folder / path).exists() for folder in packages), f"{page}: {path}"


def test_reference_is_current() -> None:
    assert REFERENCE.read_text(encoding="utf-8") == reference_text(), "run make reference"


def test_reference_has_every_key_and_every_option() -> None:
    text = reference_text()
    for key in config.setting_types():
        assert f"| `{key}` |" in text or f"\n## {key}\n" in text, key
    groups = {path.parent for path in config_folder().glob("*/*.yaml")} - {
        config_folder() / "sweep",
        config_folder() / "experiment",
    }
    for path in (path for group in groups for path in group.glob("*.yaml") if len(list(group.iterdir())) > 1):
        assert f"- `{path.parent.name}={path.stem}`" in text
