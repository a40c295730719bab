"""What a result was made of: hashes, source files, git, packages, lineage, DS_VERSION.json, verification, redaction.

DVC is imported here alone, for its hashes and its cache. Nothing here needs MLflow: runs are the subject of tracking/.
"""
