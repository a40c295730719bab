"""The documentation is true: links lead somewhere, commands compose and parse, the reference is that of the code."""

import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from prostate_seg import config, stages
from prostate_seg.__main__ import _as_text, config_folder
from scripts.update_reference import REFERENCE, reference_text
from tests.conftest import ROOT, composed

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("**/*.md"))]
COMMAND = re.compile(r"python -m prostate_seg\b([^`\n]*)")
NO_COMMAND = ("stage=NAME",)
"""Arguments that stand for others."""


def commands() -> list[tuple[str, str]]:
    """Return every command on every page, in blocks of any language and in lines, with the page's name."""
    texts = [(page.name, page.read_text(encoding="utf-8").replace("\\\n", " ")) for page in PAGES]
    found = [(name, match.group(1).strip()) for name, text in texts for match in COMMAND.finditer(text)]
    return sorted({one for one in found if one[1] and not any(word in one[1] for word in NO_COMMAND)})


def first_of_each_sweep(overrides: list[str]) -> list[str]:
    """Return overrides of one job of a multirun; what only chooses how jobs are run is left out."""
    kept = []
    for override in OverridesParser.create().parse_overrides(overrides):
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
    overrides = [_as_text(word) for word in words if "=" in word]
    cfg = config.parse(composed(*first_of_each_sweep(overrides)))
    if cfg.stage is not None:
        stages.require_stage(cfg.stage)


def test_commands_are_found_on_every_page_that_has_some() -> None:
    assert len(commands()) > 40
    assert {page for page, _ in commands()} >= {"README.md", "dvc.md", "scaling.md", "tracking.md", "report.md"}


def anchors(page: Path) -> set[str]:
    """Return the names that GitHub gives the headings of a page."""
    headings = re.findall(r"(?m)^#+ +(.+?)\s*$", without_code(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_code(page: Path) -> str:
    return re.sub(r"(?s)```.*?```", "", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", without_code(page))
    for link in re.findall(r"\]\(\s*<?([^)>\s]+)>?[^)]*\)", text) + re.findall(r"(?:href|src)=\"([^\"]+)\"", text):
        if re.match(r"https?://|mailto:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file) if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.resolve().is_relative_to(ROOT), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        links = [page.parent / link for link in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text(encoding="utf-8"))]
        waiting += [link.resolve() for link in links if link.exists() and link.resolve() not in reached]
    assert reached == set(PAGES)


def test_paths_that_the_docs_name_exist() -> None:
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
    for key in config.known_keys():
        assert f"| `{key}` |" in text or f"\n## {key}\n" in text, key
    groups = {path.parent for path in config_folder().glob("*/*.yaml")} - {
        config_folder() / "sweep",
        config_folder() / "experiment",
    }
    for path in (path for group in groups for path in group.glob("*.yaml") if len(list(group.iterdir())) > 1):
        assert f"- `{path.parent.name}={path.stem}`" in text
