"""What several tests of whole projects begin with."""

import pytest

from tests.project_helpers import Project


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose folds can be trained; tests work on copies."""
    project = Project(tmp_path_factory.mktemp("prepared"))
    done = project.run("-m", "stage=fetch,preprocess,prepare", "mlflow=off")
    assert done.returncode == 0, done.stdout + done.stderr
    return project
