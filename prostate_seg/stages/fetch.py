"""Stage fetch: make the phantom data set."""

import logging
from dataclasses import asdict
from typing import Any

from prostate_seg.config import Config
from prostate_seg.data.phantom import PhantomSettings, write_phantom
from prostate_seg.errors import InputError
from prostate_seg.progress import progress
from prostate_seg.workspace import StageResult, Workspace

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Write data/images, data/masks, data/phantom.csv and data/cases.csv."""
    if cfg.data.phantom is None:
        raise InputError("data=folder: there is nothing to fetch, the data are yours; go on with stage=preprocess")
    if (workspace.data / "images").exists() and not (workspace.data / "phantom.csv").is_file():
        raise InputError(
            f"{workspace.data} holds images that are not a phantom, and they are not overwritten\n"
            "Name another data.root or paths.root, or use them: data=folder data.root=" + str(workspace.data)
        )
    try:
        settings = PhantomSettings(**_tuples(asdict(cfg.data.phantom)))
    except ValueError as error:  # rules between settings, such as a gland that the field of view cannot hold
        raise InputError(f"data.phantom: {error}") from error
    with progress("fetch", total=settings.num_patients + settings.num_second_studies) as advance:
        images = write_phantom(
            workspace.data, settings=settings, seed=cfg.seed, on_progress=lambda _done, _of: advance()
        )
    log.info("made %d phantom studies of %d patients in %s", len(images), settings.num_patients, workspace.data)
    return StageResult(outputs=[workspace.data])


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Turn YAML's lists into the tuples of the phantom's frozen settings."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
