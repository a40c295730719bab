"""Write into dvc.yaml which source files each stage is made of. `make dvc-deps` runs it; a test says when it must be run."""

from pathlib import Path

from ruamel.yaml import YAML

from prostate_seg.provenance.record import code_key
from prostate_seg.provenance.source_files import PACKAGE, source_files
from prostate_seg.stages import STAGES

DVC_YAML = Path(__file__).parents[1] / "dvc.yaml"


def main() -> None:
    """Replace the code among the dependencies of every stage; all else stays as it is."""
    yaml = YAML()
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    pipeline = yaml.load(DVC_YAML.read_text(encoding="utf-8"))
    for name, stage in pipeline["stages"].items():
        if name not in STAGES:  # check_data, which writes nothing that a result comes from
            continue
        others = [dep for dep in stage["deps"] if not dep.startswith(f"{PACKAGE.name}/")]
        stage["deps"] = others + [code_key(path) for path in source_files(name)]
    with DVC_YAML.open("w", encoding="utf-8") as stream:
        yaml.dump(pipeline, stream)


if __name__ == "__main__":
    main()
