"""MLflow: journal and its replication, sweeps, what runs have recorded, registry and bundles; in store/ the store itself.

Hashes and lineage are in provenance/, processes and locks in operations/. No other folder imports mlflow.
"""

import os

MLFLOW_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # near patient data no usage is reported
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # our log has one line with the run
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
}


def set_mlflow_defaults() -> None:
    """Set the environment variables that the user has not set; before MLflow is imported, which reads some of them."""
    for name, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(name, value)
