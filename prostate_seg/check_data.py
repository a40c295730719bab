"""First stage of dvc.yaml: checks that data/ is not empty, and prints the command that fills it.

Its output is a file outside DVC's cache, so that each workspace is checked once.
"""

import os
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from prostate_seg.cli import config_folder, leave
from prostate_seg.common.errors import InputError
from prostate_seg.common.files import write_text
from prostate_seg.config.schema import parse
from prostate_seg.config.workspace import workspace_of
from prostate_seg.prerequisites import exists, require_fetchable

CHECKED = Path(".cache/data_checked")
"""In the current folder; preprocess depends on it in dvc.yaml."""


def main() -> None:
    """Check the data folder that params.yaml names, and write the file that marks it as checked."""
    try:
        with initialize_config_dir(config_dir=str(config_folder())):
            cfg = parse(compose("from_params"))
        workspace = workspace_of(cfg)
        if exists(workspace.data):
            write_text(CHECKED, "data/ was there\n")  # equal for all data: others rerun preprocess by their own hash
            return
        if Path(os.environ.get("DVC_ROOT", ".")).resolve() != Path.cwd():
            raise InputError(
                f"{workspace.data} is absent from this temporary workspace, which has what git and DVC track\n"
                "Track it in the project, and start again: dvc add data && git add data.dvc"
            )
        require_fetchable(cfg, workspace)
        raise InputError(
            f"{workspace.data} is absent or empty. Make the data set that params.yaml names:\n"
            "  python -m prostate_seg --config-name from_params stage=fetch\n"
            "Or link your own data to it, with the settings of stage=export data=folder data.root=null."
        )
    except (HydraException, ValueError) as error:
        leave(error)


if __name__ == "__main__":
    main()
