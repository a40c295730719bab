"""Compares the record of a run with the workspace: inputs, outputs, code, packages and settings, item by item."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from prostate_seg.common.settings import flat
from prostate_seg.config.schema import STAGE_SETTINGS
from prostate_seg.config.workspace import Workspace
from prostate_seg.provenance.code_digests import stage_code
from prostate_seg.provenance.environment import packages
from prostate_seg.provenance.hashing import hash_paths
from prostate_seg.provenance.record import path_of
from prostate_seg.provenance.source_files import PACKAGE

Verdict = Literal["same", "changed", "missing"]
KINDS = ("inputs", "outputs", "code", "packages", "config")
MAX_FILES = 10
"""Files of a changed folder that the table lists; the JSON has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A recorded value and the present one."""

    stage: str
    kind: str
    """One of KINDS."""
    name: str
    recorded: str
    now: str | None
    """None if it is missing."""
    files: tuple[str, ...] = ()
    """Of a folder: its files that are changed, missing or new."""

    @property
    def verdict(self) -> Verdict:
        """Return the result of the comparison."""
        if self.now is None:
            return "missing"
        return "same" if self.now == self.recorded else "changed"


def compare(
    stage: str,
    record: Mapping[str, Any],
    *,
    settings: Mapping[str, Any],
    workspace: Workspace,
    deciding_only: bool = False,
) -> list[Item]:
    """Compare one recorded stage, or a fold trained alone (train.fold0), with the workspace.

    The record is provenance.json of its run, or its entry of DS_VERSION.json; the present settings are nested, and redacted
    like the recorded ones. With `deciding_only`, digests of the code are compared instead of its files (see code_digests.py),
    and packages are not.
    """
    use_digests = deciding_only and "code_digests" in record  # records of earlier versions have none
    items = _compare_files(stage, record, workspace=workspace, with_code=not use_digests)
    stage_name = stage.split(".")[0]
    others: dict[str, tuple[Mapping[str, str], Mapping[str, str]]] = {}
    if use_digests:
        others["code"] = record["code_digests"], stage_code(stage_name, cache_folder=workspace.cache).digests
    if record["packages"] and not deciding_only:
        others["packages"] = record["packages"], packages()
    deciding = tuple(f"{name}." for name in STAGE_SETTINGS[stage_name])
    recorded_settings = {key: old for key, old in flat(record["settings"]).items() if f"{key}.".startswith(deciding)}
    others["config"] = recorded_settings, flat(settings)
    return items + [
        Item(stage=stage, kind=kind, name=key, recorded=old, now=present.get(key))
        for kind, (recorded, present) in others.items()
        for key, old in recorded.items()
    ]


def _compare_files(stage: str, record: Mapping[str, Any], *, workspace: Workspace, with_code: bool) -> list[Item]:
    """Compare inputs and outputs, of folders file by file, and on request the source files."""
    paths = {(kind, key): path_of(key, workspace) for kind in ("inputs", "outputs") for key in record[kind]}
    if with_code:
        paths |= {("code", key): PACKAGE.parent / key for key in record["code"]}
    hashed = hash_paths([path for path in paths.values() if path.exists()], cache=workspace.cache)
    items = []
    for (kind, key), path in paths.items():
        now, recorded = hashed.get(path), record[kind][key]
        listing: Mapping[str, str] = record.get("files", {}).get(key, {})
        files: list[str] = []
        if now is not None and listing:
            files += [f"changed {name}" for name, md5 in now.files.items() if listing.get(name, md5) != md5]
            files += [f"missing {name}" for name in listing if name not in now.files]
            files += [f"new {name}" for name in now.files if name not in listing]
        md5 = None if now is None else now.md5
        items.append(Item(stage=stage, kind=kind, name=key, recorded=recorded, now=md5, files=tuple(files)))
    return items


def as_table(items: Iterable[Item]) -> list[str]:
    """Return lines for a terminal: all inputs and outputs, of the rest what differs, and a count per kind."""
    items = list(items)
    lines = ["stage       kind      verdict  item"]
    for item in items:
        is_same = item.verdict == "same"
        if is_same and item.kind not in ("inputs", "outputs"):
            continue
        has_values = item.kind in ("packages", "config") and not is_same
        change = f": {item.recorded} -> {'absent' if item.now is None else item.now}" if has_values else ""
        lines.append(f"{item.stage:<11} {item.kind:<9} {item.verdict:<8} {item.name}{change}")
        lines += [f"{'':31}{file}" for file in item.files[:MAX_FILES]]
        if len(item.files) > MAX_FILES:
            lines.append(f"{'':31}and {len(item.files) - MAX_FILES} more")
    for kind in KINDS:
        verdicts = [item.verdict for item in items if item.kind == kind]
        counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in get_args(Verdict))
        lines.append(f"{kind:<9} {counts}")
    return lines


def as_json(items: Iterable[Item]) -> str:
    """Return all items as a JSON list."""
    return json.dumps([{**asdict(item), "verdict": item.verdict} for item in items], indent=1)
