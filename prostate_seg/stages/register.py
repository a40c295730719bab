"""Stage register: register the networks of an evaluation as a model version, and promote a version that passes the gate."""

import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from prostate_seg.common.errors import InputError, listed
from prostate_seg.common.files import md5_of, md5_of_text, read_json, write_json, write_text
from prostate_seg.common.settings import plain
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.data.dataset import read_dataset
from prostate_seg.data.folds import Fold
from prostate_seg.data.leak_gate import Fingerprint
from prostate_seg.data.lineage import CHECK, LINEAGE, THUMBNAILS, Ancestor
from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.imaging.image_io import write_volume
from prostate_seg.reporting.comparison.results import parse_results
from prostate_seg.reporting.evaluation.tables import zones_of
from prostate_seg.reporting.pages.model_card import render_model_card
from prostate_seg.reporting.pages.report_tables import subgroup_dice
from prostate_seg.reporting.promotion import EvaluatedVersion, check_promotion
from prostate_seg.segmentation.inference.settings import Usage
from prostate_seg.segmentation.networks import model_folder
from prostate_seg.segmentation.networks.model_folder import Model, network_folders
from prostate_seg.segmentation.networks.storage import RECIPE, WEIGHTS
from prostate_seg.steps.leak_gate import ancestors_in, known_fingerprints, not_duplicates, pass_ancestor_gate
from prostate_seg.steps.report_data import STRESS, load_report_data, stress_of
from prostate_seg.steps.results import settings_of
from prostate_seg.tracking import registry
from prostate_seg.tracking.recorded_runs import open_tree, repeats_of
from prostate_seg.tracking.registry import CHALLENGER, CHAMPION, NETWORKS, Evaluated, Version
from prostate_seg.tracking.store.run_tree import RunTree

log = logging.getLogger(__name__)

EVALUATION = "evaluation"
"""Folder in the folder of networks with the results of their evaluation."""
MODEL_CARD = "model_card.md"
MAX_ANCESTORS = 20
"""Ancestors in the tag of a version; the model card has all."""


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Register the networks as challenger, unless they are registered already; with register.promote move champion."""
    tree = open_tree(cfg.mlflow, cache=workspace.cache)
    evaluated = registry.evaluated_run(tree, cfg.register.run, pipeline=cfg.mlflow.name)
    folders = (workspace.evaluation, workspace.external_evaluation)
    unchanged = [path for path in folders if registry.is_what_was_recorded(path, evaluated, cache=workspace.cache)]
    with tempfile.TemporaryDirectory(prefix="prostate_seg-") as name:
        tested = registry.tested_networks(evaluated, workspace, otherwise=Path(name) / "model")
        model = gather(cfg, workspace, evaluated, tested, unchanged, folder=Path(name) / NETWORKS)
        version = registered_version(cfg, workspace, tree, evaluated, model, scratch=Path(name))
    if cfg.register.promote:
        promote(cfg, workspace, tree, version)
    log.info("predict with it: stage=predict predict.model=models:/%s/%s", version.name, version.number)
    return StageResult(
        inputs=[path for path in (tested, *unchanged) if path.is_relative_to(workspace.root)],
        tags={"registered_model": version.name, "registered_version": version.number},
    )


def gather(
    cfg: Config, workspace: Workspace, evaluated: Evaluated, tested: Path, unchanged: Sequence[Path], *, folder: Path
) -> Model:
    """Write the folder to register: the tested networks, their usage, the results of the evaluation, and a model card.

    `unchanged` has the folders of this evaluation in the workspace, if they hold what was recorded.
    """
    networks, ancestors = tested_folders(cfg, evaluated, tested)
    refuse_seen_cases(cfg, workspace, evaluated, ancestors)
    for network in networks:
        (folder / network.name).mkdir(parents=True)
        for file in (WEIGHTS, RECIPE, LINEAGE, THUMBNAILS):
            if (network / file).is_file() or file in (WEIGHTS, RECIPE):  # earlier versions wrote no lineage
                shutil.copyfile(network / file, folder / network.name / file)
    usage = usage_of(evaluated, cfg)
    write_json(folder / model_folder.USAGE, plain(usage))
    for name, text in evaluated.tables.items():
        write_text(folder / EVALUATION / name, text)
    if stress_of(workspace, folder) is not None:
        shutil.copyfile(workspace.stress / STRESS, folder / EVALUATION / STRESS)
    if trust := evaluated.summary.get("trust"):
        write_json(folder / model_folder.TRUST, stored_trust(trust))
    model = model_folder.load_model(folder, fold_index=None, usage=usage, device=torch.device("cpu"))
    write_json(folder / "origin.json", {"evaluation_run": evaluated.run_id, "record": dict(evaluated.record)})

    # the card describes the whole workspace if it is unchanged since the evaluation, else the evaluation alone
    alone = replace(workspace, root=folder, trained=None)
    data = load_report_data(cfg, workspace if unchanged else alone, unchanged[0] if unchanged else folder / EVALUATION)
    data = replace(data, is_external="ensemble" in data.summary["folds"], ancestors=ancestors)
    write_text(folder / MODEL_CARD, render_model_card(data, subgroups=subgroup_dice(data)))
    return model


def tested_folders(
    cfg: Config, evaluated: Evaluated, tested: Path
) -> tuple[list[Path], dict[str, tuple[Ancestor, ...]]]:
    """Return the folders of the networks to register, and the ancestors of each by its name; refuse untested ones."""
    networks, folds = network_folders(tested, fold_index=cfg.fold.index), evaluated.summary["folds"]
    untested = [path.name for path in networks if "ensemble" not in folds and path.name not in folds]
    if untested:  # an external test is one of the ensemble of all networks
        raise InputError(
            f"{', '.join(untested)} were trained but not tested by this evaluation, which has {', '.join(folds)}: "
            "run stage=evaluate for all folds, or register one with fold.index"
        )
    return networks, {network.name: ancestors_in(network) for network in networks}


def usage_of(evaluated: Evaluated, cfg: Config) -> Usage:
    """Return the inference settings of an evaluation, with which prediction uses its networks."""
    settings = evaluated.record["settings"]
    values = {name: settings["evaluate"][name] for name in ("threshold", "largest_component", "tta")}
    return Usage(**values, precision=settings["train"].get("precision", cfg.train.precision))


def refuse_seen_cases(
    cfg: Config, workspace: Workspace, evaluated: Evaluated, ancestors: Mapping[str, Sequence[Ancestor]]
) -> None:
    """Refuse networks that were tested on cases which their ancestors have seen, or were not compared with."""
    if not any(ancestors.values()):
        return
    verdict = evaluated.summary.get("leak_gate", {})
    if CHECK not in verdict.get("checks", {}):
        raise InputError(
            f"evaluation {evaluated.run_id} did not compare its test cases with the {CHECK} of its networks, which train.init "
            "gave them\nRun stage=evaluate again, then stage=register."
        )
    table = pd.read_csv(StringIO(evaluated.tables["cases.csv"]), dtype=str, keep_default_na=False)
    tested = {name: sorted(set(table["case_id"][table["fold"].isin([name, "ensemble"])])) for name in ancestors}
    folds = {name: (Fold(train=[], val=[], test=case_ids), ancestors[name]) for name, case_ids in tested.items()}
    pairs = not_duplicates(cfg, recorded=evaluated.record["settings"]["fold"].get("not_duplicates", ()))
    pass_ancestor_gate(folds, verdict, fingerprints=tested_fingerprints(table, workspace), not_duplicates=pairs)


def tested_fingerprints(table: pd.DataFrame, workspace: Workspace) -> dict[str, Fingerprint]:
    """Return the fingerprints of the cases in a cases.csv, with voxels and thumbnails where the workspace has the image."""
    known, found = {}, {}
    if workspace.dataset_csv.is_file():
        known = known_fingerprints(workspace, read_dataset(workspace.dataset_csv))
    for row in table.to_dict("records"):
        hashed = Fingerprint(patient_id=row["patient_id"], image_md5=row["image_md5"], mask_md5=row["mask_md5"])
        here = known.get(row["case_id"], hashed)
        found[str(row["case_id"])] = here if here.image_md5 == hashed.image_md5 else hashed
    return found


def stored_trust(trust: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of trust.json: what an evaluation found for single masks, and a temperature per region."""
    kept = {name: trust[name] for name in ("expected_dice", "no_expected_dice") if name in trust}
    return {**kept, "temperature": {region: one["temperature"] for region, one in trust["calibration"].items()}}


def registered_version(
    cfg: Config, workspace: Workspace, tree: RunTree, evaluated: Evaluated, model: Model, *, scratch: Path
) -> Version:
    """Return the version of these networks with this evaluation: an existing one, or a new one as challenger."""
    assert workspace.run_id is not None  # there is a store, and so a run
    stress = scratch / NETWORKS / EVALUATION / STRESS
    content = [model.md5, evaluated.run_id, str(cfg.register.onnx), *([md5_of(stress)] if stress.is_file() else [])]
    digest = md5_of_text(" ".join(content))
    known = registry.find_version(tree, cfg.register.name, digest=digest)
    if known is not None:
        log.info("%s has these networks and this evaluation already", known)
        return known
    folder, predictor = scratch / NETWORKS, model.predictor
    if cfg.register.onnx:
        from prostate_seg.segmentation.networks.onnx_network import export_onnx  # an optional extra

        size = predictor.recipe.preprocess.image_size
        for path, network in zip(network_folders(folder, fold_index=None), predictor.networks, strict=True):
            difference = export_onnx(path / model_folder.ONNX, network, model=predictor.recipe.model, image_size=size)
            log.info("%s as ONNX: at most %.1e from torch in probability", path.name, difference)
    version = registry.add_version(
        tree,
        cfg.register.name,
        folder,
        run_id=workspace.run_id,
        example=example_file(scratch),
        description=_description(evaluated, model),
        tags={"digest": digest, **_tags(evaluated, model, folder)},
    )
    log.info("registered as %s", version)
    why = cfg.register.reason or f"registered from evaluation {evaluated.run_id}"
    registry.move_alias(tree, version.name, CHALLENGER, to=version.number, why=why)
    return version


def example_file(folder: Path) -> bytes:
    """Return a small simulated image file: a bright ellipsoid in noise, 12 x 48 x 48 voxels of 3 x 2 x 2 mm."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in (12, 48, 48)), indexing="ij")
    noise = np.random.default_rng(0).normal(60, 8, size=z.shape)
    image = noise + 80 * ((z / 0.7) ** 2 + (y / 0.4) ** 2 + (x / 0.5) ** 2 < 1)
    geometry = Geometry.from_xyz((48, 48, 12), (2, 2, 3), origin_mm=(-47, -47, -16.5), direction=np.eye(3))
    write_volume(folder / "example.nii.gz", Volume(array=image.clip(0, 255).astype(np.uint8), geometry=geometry))
    return (folder / "example.nii.gz").read_bytes()


def promote(cfg: Config, workspace: Workspace, tree: RunTree, version: Version) -> None:
    """Move the alias champion to a version that passes the gate, or is forced through it."""
    with tree.store.lock:
        champion = registry.version_of(tree, version.name, CHAMPION)
        if champion is not None and champion.number == version.number:
            log.info("%s is champion already", version)
            return
        why = pass_gate(cfg, workspace, tree, version, champion)
        registry.move_alias(tree, version.name, CHAMPION, to=version.number, why=why)
        challenger = registry.version_of(tree, version.name, CHALLENGER)
        if challenger is not None and challenger.number == version.number:
            registry.move_alias(tree, version.name, CHALLENGER, to=None, why="became champion")
    log.info("%s is %s now", version, CHAMPION)


def pass_gate(cfg: Config, workspace: Workspace, tree: RunTree, version: Version, champion: Version | None) -> str:
    """Apply the promotion rules, refuse a version that breaks one, and return the reason recorded with the alias."""
    read = partial(evaluated_version, cfg, workspace, tree)
    outcomes = check_promotion(
        read(version),
        None if champion is None else read(champion),
        rules=cfg.register,
        num_bootstrap=cfg.evaluate.num_bootstrap,
        seed=cfg.seed,
    )
    for outcome in outcomes:
        log.info("%s", outcome)
    refused = [outcome for outcome in outcomes if not outcome.is_passed]
    rules = ", ".join(outcome.rule for outcome in refused)
    if refused and not cfg.register.force:
        raise InputError(
            f"{version} does not become champion: {rules}\n"
            + "\n".join(f"  {outcome.rule}: {outcome.message}" for outcome in refused)
            + "\nIt stays registered. Fix that, or overrule the gate: register.force=true register.reason='...'"
        )
    reason = f"{cfg.register.reason}; " if cfg.register.reason else ""
    return reason + (f"forced although refused by: {rules}" if refused else f"passed the gate; {outcomes[-1].message}")


def evaluated_version(cfg: Config, workspace: Workspace, tree: RunTree, version: Version) -> EvaluatedVersion:
    """Return what the promotion rules read of a version, from its files; the sweep over seed only where a rule needs it."""
    folder, name = registry.fetched(tree, version, cache=workspace.cache) / EVALUATION, str(version)
    trials = [] if cfg.register.max_p_not_better is None else repeats_of(tree, version.tags["evaluation_run_id"])
    return EvaluatedVersion(
        summary=read_json(folder / "metrics.json"),
        results=parse_results((folder / "cases.csv").read_text(encoding="utf-8"), name=name, source=name),
        stress=read_json(folder / STRESS) if (folder / STRESS).is_file() else None,
        repeats=next(iter(settings_of(trials, name=name, source=name)), None),
    )


def _tags(evaluated: Evaluated, model: Model, networks: Path) -> dict[str, str]:
    """Return the tags of a version: its results in short, and its provenance."""
    summary, record = evaluated.summary, evaluated.record
    pooled = summary["pooled"]
    # the nearest first; none if all networks began with random weights
    ancestors = [str(one) for path in network_folders(networks, fold_index=None) for one in ancestors_in(path)]
    return {
        "model_md5": model.md5,
        "num_networks": str(len(model.predictor.networks)),
        "evaluation_run_id": evaluated.run_id,
        "training_run_ids": ",".join(registry.training_runs(evaluated)) or "none",
        "pipeline": evaluated.pipeline,
        "git.commit": record["git"]["commit"] or "none",
        "data_md5": next((md5 for key, md5 in record["inputs"].items() if Path(key).name == "preprocess"), "none"),
        "leak_gate": summary.get("leak_gate", {}).get("verdict", "none"),
        "oracle_crop": str(summary["oracle_crop"]).lower(),
        **{f"test.{name}": str(pooled[name]) for name in ("num_cases", "num_patients", "num_failures")},
        "test.dice": f"{pooled['dice']['mean']:.4f}",
        **{f"test.{name}.dice": f"{zone['dice']['mean']:.4f}" for name, zone in zones_of(summary).items()},
        **({"ancestors": listed(list(dict.fromkeys(ancestors)), most=MAX_ANCESTORS)} if ancestors else {}),
    }


def _description(evaluated: Evaluated, model: Model) -> str:
    """Return the description of a version on the MLflow page; model_card.md among its files has the details."""
    summary, num = evaluated.summary, len(model.predictor.networks)
    pooled = summary["pooled"]
    how = "together" if "ensemble" in summary["folds"] else "each on the test patients of its fold"
    oracle = "**ORACLE CROP**: the reference placed the windows of the test cases; the numbers are too good.\n\n"
    zones = "".join(f"; {name} {zone['dice']['mean']:.3f}" for name, zone in zones_of(summary).items())
    return (
        f"{oracle if summary['oracle_crop'] else ''}"
        f"{num} network{'s' if num > 1 else ''} ({model.predictor.recipe.model.name}), tested {how}: Dice "
        f"{pooled['dice']['mean']:.3f}{zones}, {pooled['num_cases']} cases of {pooled['num_patients']} patients, "
        f"{pooled['num_failures']} failed.\n\n"
        f"Pipeline {evaluated.pipeline}, evaluation run {evaluated.run_id}. The model card is `{MODEL_CARD}` in "
        "`data/networks`."
    )
