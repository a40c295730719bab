"""The settings of a run: the schema that composes all groups, parsing, and the paths of the workspace.

The values are in configs/*.yaml. Nothing here reads images, trains or records.
"""
