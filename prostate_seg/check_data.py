"""The first stage of dvc.yaml: check that data/ has something in it, and say which command makes it.

Its output is a file outside DVC's cache: it is made once in each workspace, and a workspace without it asks again.
"""

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from prostate_seg.cli import BAD_COMMAND, FAILED, composition_message, config_folder, leave
from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.common.files import write_text
from prostate_seg.config.schema import parse
from prostate_seg.prerequisites import require_data

CHECKED = Path(".cache/data_checked")
"""In the current folder; preprocess depends on it in dvc.yaml."""


def main() -> None:
    """Check the data folder that params.yaml names, and note that it was there."""
    try:
        with initialize_config_dir(config_dir=str(config_folder())):
            cfg = parse(compose("from_params"))
        require_data(cfg)
        write_text(CHECKED, "data/ was there\n")  # the same for all data: other data rerun preprocess by their own hash
    except (ConfigError, HydraException) as error:
        leave(error, composition_message(error), BAD_COMMAND)
    except InputError as error:
        leave(error, str(error), FAILED)


if __name__ == "__main__":
    main()
