"""Results of the evaluations that a setting names by run or folder, and of the trials of a sweep by setting and seed.

MLflow is imported once a run is named; folders do not need it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prostate_seg.common.address import RUN_ID
from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.reporting.comparison.results import Repeats, Results, parse_results

if TYPE_CHECKING:
    from prostate_seg.tracking.recorded_runs import RecordedTrial
    from prostate_seg.tracking.store.run_tree import RunTree


def is_run(text: str) -> bool:
    """Return whether a text is the id of a run, and no folder here."""
    return RUN_ID.fullmatch(text) is not None and not Path(text).is_dir()


def tree_of_runs(texts: Sequence[str], cfg: Config, workspace: Workspace) -> "RunTree | None":
    """Open the tracking store if some of the texts is the id of a run; return None otherwise."""
    if not any(map(is_run, texts)):
        return None
    from prostate_seg.tracking.recorded_runs import open_tree

    return open_tree(cfg.mlflow, cache=workspace.cache)


def load_result(text: str, *, setting: str, tree: "RunTree | None") -> Results:
    """Read cases.csv of a run or folder that a setting names, with the `tree_of_runs`; refuse what is neither or has none."""
    folder = Path(text)
    if folder.is_dir():
        if not (folder / "cases.csv").is_file():
            raise InputError(f"{folder} has no cases.csv: name a folder that stage=evaluate wrote, such as evaluation")
        content = (folder / "cases.csv").read_text(encoding="utf-8")
        return parse_results(content, name=text, source=str(folder.resolve()))
    if tree is not None and is_run(text):
        from prostate_seg.tracking.recorded_runs import recorded_cases

        run_id, name, content = recorded_cases(tree, text)
        return parse_results(content, name=name, source=run_id)
    raise InputError(
        f"{setting}: {text} is neither a folder here nor the id of a run (32 digits and letters a to f)\n"
        "MLflow's page and stage=find show the ids of runs."
    )


def settings_of(trials: Sequence["RecordedTrial"], *, name: str, source: str) -> list[Repeats]:
    """Group the trials of a sweep by setting and seed; those of one seed tested different folds and are joined."""
    groups: dict[str, dict[int, list[RecordedTrial]]] = {}
    for trial in trials:
        groups.setdefault(json.dumps(trial.settings), {}).setdefault(trial.seed, []).append(trial)
    sides = []
    for key, by_seed in groups.items():
        label = next(iter(by_seed.values()))[0].label
        side = f"{name} {label}".strip()
        _require_own_networks(by_seed, name=side)
        parsed: dict[int | None, Results] = {
            seed: parse_results(joined([one.text for one in by_seed[seed]]), name=f"{side} seed {seed}", source=source)
            for seed in sorted(by_seed)
        }
        place = source if len(groups) == 1 else f"{source} {key}"
        sides.append(Repeats(name=side, source=place, by_seed=parsed, settings=json.loads(key)))
    return sides


def _require_own_networks(by_seed: Mapping[int, Sequence["RecordedTrial"]], *, name: str) -> None:
    tested: dict[str, int] = {}
    for seed, trials in by_seed.items():
        for md5 in {trial.networks_md5 for trial in trials}:
            if md5 in tested:
                raise InputError(
                    f"{name}: seeds {tested[md5]} and {seed} tested the same networks (md5 {md5}), which are no repeats\n"
                    "Train and evaluate each seed: -m stage=train,evaluate seed=1,2,3"
                )
            tested[md5] = seed


def joined(texts: Sequence[str]) -> str:
    """Return tables of one seed as one: a sweep over fold.index has a trial per fold."""
    header = texts[0].partition("\n")[0]
    rows = [text.removeprefix(header + "\n") for text in texts]
    return "".join([header, "\n", *rows])
