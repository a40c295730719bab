"""Shared fixtures of end-to-end tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project_helpers import Project, uses_stack

MEASUREMENTS = pytest.StashKey[list[tuple[str, str]]]()
"""Rows of the table that is printed after the tests."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASUREMENTS] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[MEASUREMENTS]
    if rows:
        terminalreporter.section("measured")
        width = max(len(what) for what, _ in rows)
        for what, value in rows:
            terminalreporter.write_line(f"{what:<{width}}  {value}")


@pytest.fixture(autouse=True)
def _stacks_end_with_their_test(request: pytest.FixtureRequest) -> Iterator[None]:
    if not (uses_stack() and "tmp_path" in request.fixturenames):
        yield
        return
    from tests.stack_helpers import stop_stacks_of_projects

    folder = request.getfixturevalue("tmp_path")
    yield
    stop_stacks_of_projects(folder)


@pytest.fixture(autouse=True, scope="session")
def _stacks_end_with_the_tests() -> Iterator[None]:
    yield
    if uses_stack():
        from tests.stack_helpers import stop_stacks_of_projects

        stop_stacks_of_projects(Path("/"))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with prepared folds; tests use copies."""
    project = Project(tmp_path_factory.mktemp("prepared"))
    done = project.run("-m", "stage=fetch,preprocess,prepare", "mlflow=off")
    assert done.returncode == 0, done.stdout + done.stderr
    return project


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A pipeline that was run once, by one command, and recorded; tests change copies only."""
    project = Project(tmp_path_factory.mktemp("finished"))
    done = project.run("-m", "stage=fetch,preprocess,prepare,train,evaluate")
    assert done.returncode == 0, done.stdout + done.stderr
    return project
