"""MLflow: journal, records, replication, run tree, sweeps, registry and bundles.

Hashes and lineage are in provenance/, processes and locks in operations/. No other folder imports mlflow.
"""
