"""The report of a small pipeline in a browser: opened from a file, wide and narrow, light and dark."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.project_helpers import Project, copy_of

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CONTRAST = """() => {
  const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = colour => rgb(colour).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = node => { while (node) { const c = getComputedStyle(node).backgroundColor;
    if (c !== 'rgba(0, 0, 0, 0)') return c; node = node.parentElement; } };
  const ratio = node => { const style = getComputedStyle(node), text = node.closest('svg') ? style.fill : style.color;
    const [a, b] = [light(text), light(behind(node))]; return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); };
  const words = [...document.querySelectorAll('h1, h2, p, td, th, a, figcaption, .plots text, .wide text')];
  return Math.min(...words.filter(node => node.getClientRects().length).map(ratio));
}"""


@pytest.fixture(scope="module")
def reported(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = copy_of(finished, tmp_path_factory.mktemp("report") / "project")
    done = project.run("stage=report")
    assert done.returncode == 0, done.stdout + done.stderr
    return project


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def trouble() -> Iterator[list[str]]:
    """Errors and requests of the browser; a test with any of them fails."""
    found: list[str] = []
    yield found
    assert found == []


def opened(browser: Any, project: Project, trouble: list[str], *, width: int = 1440, scheme: str = "light") -> Any:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda one: one.url.startswith(("file:", "data:")) or trouble.append(one.url))
    page.goto((project.folder / "report/report.html").as_uri())
    return page


@pytest.mark.file_store
def test_stage_writes_and_logs_page_card_and_tables(reported: Project) -> None:
    folder = reported.folder / "report"
    tables = {"results", "bland_altman", "subgroups", "learning_curves", "dice_along_gland"}
    tables |= {"expected_dice", "risk_coverage", "reliability"}
    assert {path.name for path in folder.iterdir()} == {
        "report.html",
        "model_card.md",
        *(f"{name}.csv" for name in tables),
    }
    assert (folder / "report.html").stat().st_size < 3e6
    run = reported.only(stage="report", level="stage")
    assert reported.artifacts(run) >= {"report/report.html", "report/model_card.md"}
    assert run.data.tags["previous_run_id.evaluate"] == reported.only(stage="evaluate").info.run_id
    curves = pd.read_csv(folder / "learning_curves.csv")
    assert set(curves["fold"]) == {"fold0", "fold1"}
    html = (folder / "report.html").read_text()
    assert reported.only(stage="train", level="stage").info.run_id in html


@pytest.mark.slow
def test_slider_moves_with_the_arrow_keys(reported: Project, browser: Any, trouble: list[str]) -> None:
    page = opened(browser, reported, trouble)
    slider, words, viewer = page.locator("#case0-slider"), page.locator("#case0-output"), page.locator("#case0 use")
    before = words.inner_text(), viewer.get_attribute("href"), page.locator("#case0").screenshot()
    slider.focus()
    page.keyboard.press("ArrowRight")
    after = words.inner_text(), viewer.get_attribute("href"), page.locator("#case0").screenshot()
    assert all(one != other for one, other in zip(before, after, strict=True))
    z_before, z_after = (int(re.findall(r"z = (\d+)", text)[0]) for text in (before[0], after[0]))
    assert z_after == z_before + 1
    assert slider.get_attribute("aria-valuetext") == after[0]
    assert after[0] in page.locator("#case0").get_attribute("aria-label")


@pytest.mark.slow
def test_contours_can_be_hidden_with_the_keyboard(reported: Project, browser: Any, trouble: list[str]) -> None:
    page = opened(browser, reported, trouble)
    for name in ("reference", "predicted"):
        path = page.locator(f"#case0-1 .{name}")
        assert path.evaluate("path => getComputedStyle(path).visibility") == "visible"
        page.locator(f"[data-hides=no-{name}]").focus()
        page.keyboard.press("Space")
        assert path.evaluate("path => getComputedStyle(path).visibility") == "hidden"


@pytest.mark.slow
def test_first_tab_focuses_the_link_to_the_results(reported: Project, browser: Any, trouble: list[str]) -> None:
    page = opened(browser, reported, trouble)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "results"


@pytest.mark.slow
@pytest.mark.parametrize("width", [375, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_its_width_and_can_be_read(
    reported: Project, browser: Any, trouble: list[str], width: int, scheme: str
) -> None:
    page = opened(browser, reported, trouble, width=width, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(CONTRAST) >= 4.5


@pytest.mark.slow
def test_page_can_be_printed(reported: Project, browser: Any, trouble: list[str], tmp_path: Path) -> None:
    content = opened(browser, reported, trouble).pdf(format="A4")
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", content)) >= 3


def test_report_lists_missing_originals_history_and_record(reported: Project, tmp_path: Path) -> None:
    project = copy_of(reported, tmp_path / "bare")
    for name in ("data", "model", "preprocess", "prepared", "DS_VERSION.json"):
        path = project.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = project.run("stage=report", "mlflow=off")
    assert done.returncode == 0, done.stdout + done.stderr
    html = (project.folder / "report/report.html").read_text()
    for words in ("Not shown: its original image", "training history is not in the workspace", "no DS_VERSION.json"):
        assert words in html


def test_report_without_an_evaluation_is_refused_and_keeps_the_previous_one(reported: Project, tmp_path: Path) -> None:
    project = copy_of(reported, tmp_path / "none")
    before = (project.folder / "report/report.html").read_bytes()
    shutil.rmtree(project.folder / "evaluation")
    done = project.run("stage=report", "mlflow=off")
    assert done.returncode == 1
    assert "evaluation/metrics.json  from stage=evaluate" in done.stdout + done.stderr
    assert (project.folder / "report/report.html").read_bytes() == before
