"""Stage export: write the science settings to params.yaml, which DVC reads and git tracks."""

import logging
from pathlib import Path
from typing import Any

import yaml

from prostate_seg.common.errors import InputError, first_line
from prostate_seg.common.files import write_text
from prostate_seg.common.settings import flat
from prostate_seg.config.schema import Config, science_of
from prostate_seg.config.workspace import Workspace
from prostate_seg.operations.job import command_line

log = logging.getLogger(__name__)

PARAMS = Path("params.yaml")
"""In the current folder, beside dvc.yaml."""


def run(cfg: Config, workspace: Workspace) -> None:
    """Write params.yaml, or with export.check compare it with the composed settings."""
    settings = science_of(cfg)
    if not cfg.export.check:
        write_text(PARAMS, params_text(settings, command=command_line()))
        log.info("wrote %s; run it with dvc repro", PARAMS)
        return
    if not PARAMS.is_file():
        raise InputError(f"{PARAMS} is absent: write it with stage=export and the same overrides")
    there, composed = read_params(), flat(settings)
    different = [
        f"  {key}: {there.get(key, 'absent')} in {PARAMS}, {composed.get(key, 'absent')} in the config"
        for key in sorted(there.keys() | composed.keys())
        if there.get(key) != composed.get(key)
    ]
    if different:
        listing = "\n".join(different)
        raise InputError(f"{PARAMS} is not what this command composes:\n{listing}\nWrite it again with stage=export.")
    log.info("%s is what this command composes", PARAMS)


def read_params() -> dict[str, str]:
    """Return the settings in params.yaml, flat.

    Raises:
        InputError: If its content is no YAML of settings.
    """
    try:
        return flat(yaml.safe_load(PARAMS.read_text(encoding="utf-8")) or {})
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{PARAMS} must be a mapping of settings in YAML, and cannot be read: {first_line(error)}\n"
            "Write it again with stage=export and the same overrides."
        ) from error


def params_text(settings: dict[str, Any], *, command: str) -> str:
    """Return the text of params.yaml: the command in a comment, then the settings, sorted."""
    header = f"# The settings that decide results. Made by, and not to be edited but by:\n#   {command}\n"
    return header + yaml.safe_dump(settings, sort_keys=True, default_flow_style=None, width=120)
