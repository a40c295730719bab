"""Stage train: train a network on each fold and keep the weights of the epoch with the best val score."""

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from filelock import FileLock, Timeout

from prostate_seg.common import torchrun
from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.common.files import atomic_folder, md5_of, md5_of_text, read_json, write_csv, write_json, write_text
from prostate_seg.common.seeds import Stream, seed_sequence, torch_seed
from prostate_seg.config.schema import Config, portable_science_of
from prostate_seg.config.workspace import FoldRecord, StageResult, Workspace, null_fold_record
from prostate_seg.data.dataset import CaseRecord, read_dataset
from prostate_seg.data.folds import Fold, read_folds, with_max_train_cases
from prostate_seg.data.lineage import Ancestor, Lineage, write_lineage
from prostate_seg.imaging.image_io import read_volume
from prostate_seg.reporting.figures.plots import history_figure, save_png
from prostate_seg.segmentation.devices import available_gpus, choose_device
from prostate_seg.segmentation.inference.out_of_distribution import mean_grey, property_ranges
from prostate_seg.segmentation.networks.initial_weights import start_from
from prostate_seg.segmentation.networks.networks import build_network, require_legal_size
from prostate_seg.segmentation.networks.storage import Recipe, load_weights, save_recipe, save_weights
from prostate_seg.segmentation.training import distributed
from prostate_seg.segmentation.training.checkpoints import Checkpoints
from prostate_seg.segmentation.training.distributed import ProcessGroup, ProcessLostError, process_group
from prostate_seg.segmentation.training.history import Epoch, TrainingResult, best_epoch
from prostate_seg.segmentation.training.packing import is_packed, open_packed, pack
from prostate_seg.segmentation.training.settings import ValMetric
from prostate_seg.segmentation.training.training import fit, reproducible
from prostate_seg.steps.dataset import checked_dataset, preprocess_settings
from prostate_seg.steps.fold_processes import train_in_parallel
from prostate_seg.steps.initial_weights import InitialWeights, check_initial_weights, find_initial_weights
from prostate_seg.steps.leak_gate import checked_folds, known_fingerprints, not_duplicates, pass_ancestor_gate

log = logging.getLogger(__name__)

TRAINING_VERSION = 4
"""Increased when the same settings, seed and data begin to give other weights: no training resumes from another version."""


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Write model/fold<i>/ (weights, recipe, history, config) and model/folds.json."""
    _require_distributable(cfg, torchrun.world_size())
    dataset = checked_dataset(cfg, workspace)
    folds, verdict = checked_folds(cfg, workspace, dataset)
    initial = find_initial_weights(cfg, workspace)
    folds = {index: trained_fold(fold, index, cfg) for index, fold in folds.items()}
    require_legal_size(cfg.model, image_size=preprocess_settings(cfg, workspace).image_size)
    if initial is not None:
        verdict = accept_initial_weights(cfg, workspace, initial, folds, dataset, verdict)
    pack_studies(cfg, workspace, dataset)

    seconds = train_folds(cfg, workspace, folds, initial)
    summaries = collect_folds(workspace, list(folds))
    best_dice = {index: summary["val_dice"] for index, summary in summaries.items()}
    mean = float(np.mean(list(best_dice.values())))
    shown = ", ".join(f"fold {index} {dice:.3f}" for index, dice in best_dice.items())
    log.info("best val Dice: %s, mean %.3f; the weights are in %s", shown, mean, workspace.model)
    return StageResult(
        inputs=[workspace.preprocess, workspace.kfold_json, *(initial.folders_of(folds) if initial else [])],
        outputs=[workspace.model] if cfg.fold.index is None else [workspace.fold(cfg.fold.index)],
        metrics={"val/best_dice": mean, **{f"val/best_dice_fold{index}": dice for index, dice in best_dice.items()}},
        tables=[workspace.model / "folds.json"],
        tags={
            "leak_gate": verdict["verdict"],
            "num_processes": str(torchrun.world_size()),
            **_precision_tag(summaries),
            **(initial.tags(folds) if initial else {}),
        },
        description=f"Best val Dice, from validation: {shown}, mean {mean:.3f}. Leak gate: {verdict['verdict']}.",
        objectives={"objective": mean, "seconds": seconds},
    )


def trained_fold(fold: Fold, index: int, cfg: Config) -> Fold:
    """Return a fold with the training cases that fold.max_train_cases leaves; refuse one without train or val studies."""
    for split in ("train", "val"):  # kfold.json may have been edited
        if not fold.subsets()[split]:
            raise InputError(f"fold {index}: kfold.json lists no {split} studies\nRun stage=prepare again.")
    return with_max_train_cases(fold, max_cases=cfg.fold.max_train_cases, seed=cfg.seed, fold_index=index)


def train_folds(cfg: Config, workspace: Workspace, folds: Mapping[int, Fold], initial: InitialWeights | None) -> float:
    """Train the folds one after the other or in processes of their own; return the seconds of all of them."""
    log.info("fold  epoch  train loss  val Dice  learning rate   time")
    train = partial(train_fold, cfg, replace(workspace, open_fold=null_fold_record), folds, initial)
    num_parallel = min(cfg.machine.num_parallel_folds, len(folds))
    if num_parallel > 1:
        gpus = available_gpus(cfg.machine.device)
        train_in_parallel(train, list(folds), num_parallel=num_parallel, open_fold=workspace.open_fold, gpus=gpus)
    else:
        with process_group() as group:
            for index in folds:
                with workspace.open_fold(index) as record:
                    train(index, record, group=group)
            group.broadcast_from_rank0(lambda: None)  # ends `run_worker` on the other ranks
    marks = [_finished_mark(workspace, index) for index in folds]
    seconds = sum(float(read_json(mark)["seconds"]) for mark in marks)
    for mark in marks:
        mark.unlink()  # all folds have finished: the next training starts afresh
    return seconds


def accept_initial_weights(
    cfg: Config,
    workspace: Workspace,
    initial: InitialWeights,
    folds: Mapping[int, Fold],
    dataset: Mapping[str, CaseRecord],
    verdict: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the verdict of the leak gate with that on the initial weights' studies; refuse weights that do not fit."""
    preprocess = preprocess_settings(cfg, workspace)
    wanted = Recipe(model=cfg.model, preprocess=preprocess, zscore=cfg.train.zscore, train_ids=[], val_ids=[])
    check_initial_weights(initial, wanted, fold_indices=folds)
    known = known_fingerprints(workspace, dataset)
    of_folds = {f"fold {index}": (fold, initial.ancestors_of(index)) for index, fold in folds.items()}
    return pass_ancestor_gate(of_folds, verdict, fingerprints=known, not_duplicates=not_duplicates(cfg))


def _require_distributable(cfg: Config, num_processes: int) -> None:
    """Refuse settings that several processes of torchrun cannot train with."""
    if num_processes > 1 and cfg.machine.num_parallel_folds > 1:
        raise ConfigError(
            "machine.num_parallel_folds: must be 1 with torchrun, whose processes train one fold together, "
            f"is {cfg.machine.num_parallel_folds}\nLeave out one of the two."
        )
    if cfg.train.batch_size < num_processes:
        raise ConfigError(
            f"train.batch_size: must be at least the {num_processes} processes of torchrun, each of which trains on a shard of "
            f"every batch, is {cfg.train.batch_size}\nUse --nproc-per-node={cfg.train.batch_size}, or larger batches."
        )


def run_worker() -> None:
    """Run a rank above 0 of torchrun: call what rank 0 broadcasts until it broadcasts None; write nothing."""
    try:
        with process_group() as group:
            while (work := group.broadcast_from_rank0(lambda: None)) is not None:
                work(group=group)
    except ProcessLostError:  # rank 0 reports the reason
        sys.exit(1)


def release_workers() -> None:
    """End `run_worker` on the other ranks when there is nothing to train."""
    with process_group() as group:
        group.broadcast_from_rank0(lambda: None)


def pack_studies(cfg: Config, workspace: Workspace, dataset: dict[str, CaseRecord]) -> None:
    """Write the packed set of this preprocessing unless it exists."""
    images, masks = workspace.preprocess / "images", workspace.preprocess / "masks"

    def read_case(case_id: str) -> tuple[np.ndarray, np.ndarray]:
        name = f"{case_id}.nii.gz"
        return read_volume(images / name).array, read_volume(masks / name).array

    folder = packed_folder(cfg, workspace)
    if not is_packed(folder):
        log.info("pack %d studies into %s", len(dataset), folder)
        pack(folder, list(dataset), read_case=read_case, zscore=cfg.train.zscore)


def packed_folder(cfg: Config, workspace: Workspace) -> Path:
    """Return the folder of the packed set, named by a hash of everything that determines its content."""
    facts = [md5_of(workspace.dataset_csv), md5_of(workspace.contract_json), str(cfg.train.zscore)]
    return workspace.cache / "packed" / md5_of_text(" ".join(facts))


def train_fold(
    cfg: Config,
    workspace: Workspace,
    folds: Mapping[int, Fold],
    initial: InitialWeights | None,
    index: int,
    record: FoldRecord,
    group: ProcessGroup = distributed.SINGLE_PROCESS,
) -> None:
    """Train one fold with checkpoints in .training/, and replace the fold's folder with the result at the end."""
    fold, unfinished, target = folds[index], workspace.training / f"fold{index}", workspace.fold(index)
    data, mark = packed_folder(cfg, workspace), _finished_mark(workspace, index)
    recipe = recipe_of(cfg, workspace, fold)
    ancestors = () if initial is None else initial.ancestors_of(index)
    initial_md5 = ancestors[0].weights_md5 if ancestors else None
    identity = training_identity(cfg, recipe, data=data.name, initial_md5=initial_md5)
    weights = None if initial is None else load_weights(initial.folder_of(index))
    work = partial(fit_fold, cfg, recipe, data, fold_index=index, initial=weights)
    with _only_training_of(workspace, index):
        if cfg.machine.resume == "never":
            shutil.rmtree(unfinished, ignore_errors=True)
        elif _has_finished(mark, target, identity=identity):
            log.info("fold %d had finished before training was stopped, and is kept", index)
            record.finish(_fold_metrics(read_json(target / "summary.json")), [target / "history.png"])
            return
        fit_on_all_ranks = group.broadcast_from_rank0(lambda: work)
        result = fit_on_all_ranks(
            group=group,
            on_epoch_end=partial(_log_epoch, record, index),
            checkpoints=Checkpoints(folder=unfinished / "checkpoints", identity=identity),
        )
        title = f"fold {index}: {len(fold.train)} train, {len(fold.val)} val studies"
        with atomic_folder(target) as folder:
            save_recipe(folder, recipe)
            save_weights(folder, result.weights)
            write_lineage(folder, lineage_of(workspace, fold, ancestors=ancestors))
            write_text(folder / "config.yaml", yaml.safe_dump(portable_science_of(cfg), sort_keys=False))
            summary = _write_history(folder, result, metric=cfg.train.metric, title=title)
        seconds = result.history[-1].seconds
        write_json(mark, {"identity": identity, "md5": md5_of(target), "seconds": seconds})
        shutil.rmtree(unfinished, ignore_errors=True)
        record.finish(_fold_metrics(summary) | {"train/minutes": seconds / 60}, [target / "history.png"])


def recipe_of(cfg: Config, workspace: Workspace, fold: Fold) -> Recipe:
    """Return what inference must repeat of the training of a fold."""
    return Recipe(
        model=cfg.model,
        preprocess=preprocess_settings(cfg, workspace),
        zscore=cfg.train.zscore,
        train_ids=fold.train,
        val_ids=fold.val,
        ranges=training_ranges(read_dataset(workspace.dataset_csv), fold, packed_folder(cfg, workspace)),
    )


def _has_finished(mark: Path, target: Path, *, identity: str) -> bool:
    """Return whether this training of a fold has finished; the hash too, as a checkout may have replaced the folder since."""
    if not mark.is_file() or not target.is_dir():
        return False
    finished = read_json(mark)
    return bool(finished["identity"] == identity and finished["md5"] == md5_of(target))


def _log_epoch(record: FoldRecord, index: int, epoch: Epoch) -> None:
    """Log an epoch of a fold as a line of the table, and send its metrics to the record."""
    dice = "-" if epoch.val_dice is None else f"{epoch.val_dice:.4f}"
    numbers = f"{index:4d} {epoch.epoch:6d} {epoch.loss:11.4f} {dice:>9} {epoch.learning_rate:14.2e}"
    log.info("%s %3d:%02d", numbers, *divmod(round(epoch.seconds), 60))
    record.on_epoch_end(epoch.epoch, epoch.as_dict())


@contextmanager
def _only_training_of(workspace: Workspace, index: int) -> Iterator[None]:
    """Wait until no other process trains this fold in this workspace, and keep others waiting."""
    place = md5_of_text(str(workspace.training.absolute()))[:8]
    lock = FileLock(workspace.cache / f"training_{place}_fold{index}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("fold %d: another process trains it in this workspace; waiting until it has ended", index)
        lock.acquire()
    with lock:
        yield


def lineage_of(workspace: Workspace, fold: Fold, *, ancestors: tuple[Ancestor, ...]) -> Lineage:
    """Return the lineage of a network that is trained on a fold."""
    known = known_fingerprints(workspace, read_dataset(workspace.dataset_csv))
    train, val = (tuple(known[case_id] for case_id in case_ids) for case_ids in (fold.train, fold.val))
    return Lineage(train=train, val=val, ancestors=ancestors)


def training_ranges(dataset: Mapping[str, CaseRecord], fold: Fold, data: Path) -> dict[str, tuple[float, float]]:
    """Return the training ranges of a fold, against which prediction checks for out-of-distribution studies."""
    packed = open_packed(data).cases
    names = ("spacing_y_mm", "spacing_z_mm", "num_slices", "mean_grey", "gland_volume_ml")
    known = ({**asdict(dataset[one]), "mean_grey": mean_grey(packed[one].intensity)} for one in fold.train)
    return property_ranges({name: properties[name] for name in names} for properties in known)


def fit_fold(
    cfg: Config,
    recipe: Recipe,
    data: Path,
    *,
    fold_index: int,
    group: ProcessGroup,
    initial: Mapping[str, torch.Tensor] | None = None,
    on_epoch_end: Callable[[Epoch], None] = lambda _: None,
    checkpoints: Checkpoints | None = None,
) -> TrainingResult:
    """Train a network on a fold of the packed set in `data`, from random or from given weights; every rank calls this."""
    settings, stream = cfg.train, seed_sequence(Stream.initial_weights, seed=cfg.seed, fold_index=fold_index)
    with reproducible(torch_seed(stream), deterministic=settings.deterministic):
        network = build_network(recipe.model, num_regions=len(recipe.preprocess.regions))
        if initial is not None:
            lines = start_from(network, initial, name=recipe.model.name, freeze=settings.freeze)
            for line in lines if group.rank == 0 else ():
                log.info("fold %d: %s", fold_index, line)
        return fit(
            open_packed(data),
            network=network,
            recipe=recipe,
            settings=settings,
            device=group.local_device(choose_device(cfg.machine.device)),
            seed=cfg.seed,
            fold_index=fold_index,
            on_epoch_end=on_epoch_end,
            checkpoints=checkpoints,
            group=group,
        )


def training_identity(cfg: Config, recipe: Recipe, *, data: str, initial_md5: str | None) -> str:
    """Return a hash of everything that determines a fold's weights; only the same training resumes.

    Initial weights count by their content: an alias can move to another version.
    """
    settings = portable_science_of(cfg)["train"]
    start = [] if initial_md5 is None else [initial_md5]
    del settings["init"]
    if settings["freeze"] is None:
        del settings["freeze"]  # as in versions without it, whose trainings go on
    facts = [TRAINING_VERSION, recipe.as_dict(), settings, cfg.seed, data, *start]
    return md5_of_text(json.dumps(facts, sort_keys=True))


def _finished_mark(workspace: Workspace, index: int) -> Path:
    """Return the file that marks a fold as finished while other folds still train."""
    return workspace.training / f"fold{index}.finished.json"


def _fold_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    best = {f"val/best_{name}": summary[key] for name, key in (("dice", "val_dice"), ("iou", "val_iou"))}
    return {**best, "val/best_epoch": summary["best_epoch"], "train/num_epochs": summary["num_epochs"]}


def collect_folds(workspace: Workspace, trained: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Write model/folds.json from all folds in the workspace, and return the summaries of those just trained."""
    with FileLock(workspace.cache / "folds.lock"):
        num_folds = len(read_folds(workspace.kfold_json))
        summaries = {index: workspace.fold(index) / "summary.json" for index in range(num_folds)}
        table = {index: read_json(path) for index, path in summaries.items() if path.is_file()}
        write_json(workspace.model / "folds.json", {f"fold{index}": row for index, row in table.items()})
    return {index: table[index] for index in trained}


def _precision_tag(summaries: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Return what train.precision=auto was on the GPUs of the folds, as a tag; empty if it was not measured."""
    measured = sorted({summary["precision"] for summary in summaries.values() if "precision" in summary})
    return {"precision": ",".join(measured)} if measured else {}


def _write_history(folder: Path, result: TrainingResult, *, metric: ValMetric, title: str) -> dict[str, Any]:
    """Write history.csv, history.png and summary.json, and return the summary; without times, so that equal runs are equal."""
    history = result.history
    rows = [{"epoch": epoch.epoch, **epoch.as_dict()} for epoch in history]
    columns = [name for name in rows[-1] if name != "seconds"]  # the last epoch has val scores
    table = pd.DataFrame(rows, columns=columns)
    write_csv(folder / "history.csv", table)
    best = best_epoch(history, metric=metric)
    save_png(folder / "history.png", history_figure(table, kept=best.epoch, title=title))
    scores = {"val_dice": best.score("dice"), "val_iou": best.score("iou")}
    summary: dict[str, Any] = {**scores, "best_epoch": best.epoch, "num_epochs": len(history)}
    if result.measured_precision is not None:
        summary["precision"] = result.measured_precision
    write_json(folder / "summary.json", summary)
    return summary
