"""Comparing what a run recorded with what is there now: inputs, outputs, code, packages and settings, item by item."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from prostate_seg.config.schema import STAGE_SETTINGS
from prostate_seg.config.workspace import Workspace
from prostate_seg.provenance.environment import packages
from prostate_seg.provenance.hashing import Hashed, hash_paths
from prostate_seg.provenance.record import flat, path_of
from prostate_seg.provenance.source_files import PACKAGE


class Verdict(Enum):
    """What became of a recorded item."""

    same = "same"
    changed = "changed"
    missing = "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One recorded thing and what it is now."""

    stage: str
    kind: str
    """inputs, outputs, code, packages or config."""
    name: str
    recorded: str
    now: str | None
    """None when it is not there."""
    details: tuple[str, ...] = ()
    """Of a changed folder: its files that are changed, missing or new."""

    @property
    def verdict(self) -> Verdict:
        """Compare."""
        if self.now is None:
            return Verdict.missing
        return Verdict.same if self.now == self.recorded else Verdict.changed


def compare(stage: str, record: Mapping[str, Any], *, settings: Mapping[str, Any], workspace: Workspace) -> list[Item]:
    """Compare one recorded stage with the workspace.

    Args:
        stage: The name of its entry: a stage that writes, or train.fold0.
        record: provenance.json of its run, or its entry of DS_VERSION.json.
        settings: The settings in force now, nested, redacted like the recorded ones.
        workspace: Where the files lie.
    """
    listings = record.get("files", {})
    paths = {kind: {key: path_of(key, workspace) for key in record[kind]} for kind in ("inputs", "outputs")}
    paths["code"] = {key: PACKAGE.parent / key for key in record["code"]}
    there = [path for group in paths.values() for path in group.values() if path.exists()]
    hashed = hash_paths(there, cache=workspace.cache)
    items = []
    for kind, group in paths.items():
        for key, path in group.items():
            now = hashed.get(path)
            details = () if now is None else _different_files(listings.get(key, {}), now)
            items.append(_item(stage, kind, key, record[kind][key], None if now is None else now.md5, details))
    installed = packages() if record["packages"] else {}
    items += [_item(stage, "packages", name, old, installed.get(name)) for name, old in record["packages"].items()]
    current = flat(settings)
    items += [_item(stage, "config", key, old, current.get(key)) for key, old in _deciding(stage, record["settings"])]
    return items


def as_table(items: Iterable[Item]) -> list[str]:
    """Return lines that fit a terminal: every input and output, of the rest what differs, and counts."""
    items = list(items)
    shown = [item for item in items if item.kind in ("inputs", "outputs") or item.verdict is not Verdict.same]
    lines = ["stage       kind      verdict  item"]
    for item in shown:
        lines.append(f"{item.stage:<11} {item.kind:<9} {item.verdict.value:<8} {item.name}{_what_changed(item)}")
        lines += [f"{'':31}{detail}" for detail in item.details[:10]]
        lines += [f"{'':31}and {len(item.details) - 10} more"] if len(item.details) > 10 else []
    for kind in ("inputs", "outputs", "code", "packages", "config"):
        verdicts = [item.verdict for item in items if item.kind == kind]
        counts = ", ".join(f"{verdicts.count(verdict)} {verdict.value}" for verdict in Verdict)
        lines.append(f"{kind:<9} {counts}")
    return lines


def as_json(items: Iterable[Item]) -> str:
    """Return all items as a JSON list."""
    rows = [
        {
            "stage": item.stage,
            "kind": item.kind,
            "name": item.name,
            "verdict": item.verdict.value,
            "recorded": item.recorded,
            "now": item.now,
            "files": list(item.details),
        }
        for item in items
    ]
    return json.dumps(rows, indent=1)


def _item(stage: str, kind: str, name: str, recorded: str, now: str | None, details: tuple[str, ...] = ()) -> Item:
    return Item(stage=stage, kind=kind, name=name, recorded=recorded, now=now, details=details)


def _deciding(stage: str, settings: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Return the recorded settings that decide what the stage writes, flat."""
    deciding = STAGE_SETTINGS[stage.split(".")[0]]
    return [
        (key, value)
        for key, value in flat(settings).items()
        if any(key == one or key.startswith(f"{one}.") for one in deciding)
    ]


def _different_files(recorded: Mapping[str, str], now: Hashed) -> tuple[str, ...]:
    if not recorded:
        return ()
    changed = [f"changed {name}" for name, md5 in now.files.items() if recorded.get(name, md5) != md5]
    missing = [f"missing {name}" for name in recorded if name not in now.files]
    new = [f"new {name}" for name in now.files if name not in recorded]
    return tuple(changed + missing + new)


def _what_changed(item: Item) -> str:
    if item.kind in ("packages", "config") and item.verdict is not Verdict.same:
        return f": {item.recorded} -> {'absent' if item.now is None else item.now}"
    return ""
