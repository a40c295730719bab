"""Our defaults for what MLflow reads from the environment. Nothing here imports MLflow: they are set before it is."""

import os

DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # patient data are near: no usage is reported
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # one line of our own names the run
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
}


def set_mlflow_defaults() -> None:
    """Set the variables that are not set; MLflow reads telemetry's when it is imported, the others when it needs them."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
