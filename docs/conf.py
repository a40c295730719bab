"""Documentation site, built by make docs with Sphinx, MyST and Furo: navigation, pages outside docs/, and checks.

The pages are the Markdown files of the repository, where they are, so that their links hold on the code host and on the site.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the tests read NAVIGATION without Sphinx, which has an environment of its own
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
NAVIGATION = {
    "Start": {
        "docs/README": "Documentation by question",
        "docs/tutorial": "Tutorial",
        "docs/demo": "The tutorial as a notebook",
    },
    "How-to": {
        "docs/prediction": "Register, predict, serve",
        "docs/dvc": "Version results with DVC",
        "docs/scaling": "Sweeps, GPUs, clusters",
        "docs/server": "A server for a group",
        "docs/how-to/fine_tune": "Start from other weights",
        "docs/how-to/is_it_better": "Is it better, or luck?",
        "docs/how-to/own_model": "Add a network",
        "docs/how-to/reproduce_a_number": "Reproduce a number",
        "CONTRIBUTING": "Contribute",
        "SECURITY": "Report a vulnerability",
    },
    "Reference": {
        "docs/coming_from": "What is called what here",
        "docs/commands": "Commands, stages, exit codes",
        "docs/reference": "Settings",
        "docs/data": "Data",
        "docs/quality_checks": "Quality checks, in pictures",
        "docs/report": "Report",
        "docs/terminal": "Terminal",
        "CHANGELOG": "Changelog",
    },
    "Explanation": {
        "docs/science": "Methods and metrics",
        "docs/gallery": "Preprocessing and augmentation, in pictures",
        "docs/tracking": "Experiment tracking",
        "docs/architecture": "Architecture",
        "docs/decisions": "Decisions and experiments",
        "docs/benchmarks": "Speed and memory",
        "docs/reliability": "Reliability",
        "docs/security": "Security",
    },
}
"""Every page but the README, by the four kinds of documentation; tests/test_docs.py checks that none is missing."""

ACCESSIBLE = {
    '<p class="caption" role="heading">': '<p class="caption" role="heading" aria-level="2">',
    '<aside class="sidebar-drawer">': '<aside class="sidebar-drawer" aria-label="Pages">',
    '<aside class="toc-drawer': '<aside aria-label="Sections" class="toc-drawer',
    "<pre>": '<pre tabindex="0">',
    '<div class="table-wrapper': '<div tabindex="0" class="table-wrapper',
    "<th></th>": "<td></td>",
    '<th class="head"><p></p></th>': "<td></td>",
    '<div id="search-results">': '<h1>Search</h1><div id="search-results">',
}
"""What axe-core finds in the theme's pages: no heading or level, regions without a name, scrolling without a keyboard."""

project = "prostate_seg"
author = "The authors of prostate_seg"
version = re.search(r'__version__ = "(.*)"', (ROOT / "prostate_seg" / "__init__.py").read_text()).group(1)  # type: ignore[union-attr]

extensions = ["myst_nb"]
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/**"]
exclude_patterns = ["docs/conf.py", "docs/requirements.lock", "docs/_static", ".*", "build", "data", "demo", "logs"]
nb_execution_mode = "off"  # tests/e2e runs the notebook; its outputs are in the file
myst_heading_anchors = 4
highlight_language = "none"

html_theme = "furo"
html_title = f"prostate_seg {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False


def add_navigation(app: "Sphinx", docname: str, source: list[str]) -> None:
    """Append the navigation to the README, which on the code host needs none."""
    if docname == root_doc:
        for kind, pages in NAVIGATION.items():
            entries = "\n".join(f"{title} <{page}>" for page, title in pages.items())
            source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {kind}\n\n{entries}\n```\n"


def replace_diagrams(app: "Sphinx", docname: str, source: list[str]) -> None:
    """Replace each Mermaid diagram, which the code host draws, by its committed picture: the site loads no scripts."""
    picture = f"figures/{Path(docname).name}.svg"
    source[0] = re.sub(r"(?s)```mermaid\n.*?```", f"[![Diagram]({picture})]({picture})", source[0])


def finish_site(app: "Sphinx", error: Exception | None) -> None:
    """Add the start page, complete what screen readers need, and refuse pages that load anything from another host."""
    if error is not None:
        return
    start = '<!DOCTYPE html><html lang="en"><title>prostate_seg</title>'
    (app.outdir / "index.html").write_text(f'{start}<meta http-equiv="refresh" content="0; url=README.html"></html>\n')
    loads = re.compile(
        r"<(?:script|img|iframe|source)[^>]*\bsrc=\"(https?:)?//|<link[^>]*\bhref=\"(https?:)?//|@import"
    )
    for page in app.outdir.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        if loads.search(html):
            raise RuntimeError(
                f"{page.name} loads something from another host, which closed networks of hospitals refuse."
            )
        for theme, complete in ACCESSIBLE.items():
            html = html.replace(theme, complete)
        page.write_text(html, encoding="utf-8")


def setup(app: "Sphinx") -> None:
    """Connect the functions above to Sphinx's events."""
    app.connect("source-read", add_navigation)
    app.connect("source-read", replace_diagrams)
    app.connect("build-finished", finish_site)
