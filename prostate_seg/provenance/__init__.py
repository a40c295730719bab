"""Provenance of results: hashes, source files, git, packages, lineage, DS_VERSION.json, verification and redaction.

DVC is imported here alone, for its hashes and its cache. MLflow is not: runs belong to tracking/.
"""
