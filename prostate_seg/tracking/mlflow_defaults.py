"""Defaults for MLflow's environment variables; imports no MLflow, because it reads some of them when it is imported."""

import os

DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # near patient data no usage is reported
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # our log has one line with the run
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
}


def set_mlflow_defaults() -> None:
    """Set the variables that the user has not set."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
