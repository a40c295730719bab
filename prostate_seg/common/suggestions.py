"""Suggestions for names that do not exist: former names, names in other programs, then similar names."""

import difflib
from collections.abc import Collection

OTHER_NAMES = {
    "stage": "task step command mode action",
    "seed": "random_seed random_state seeds rng manual_seed",
    "data": "dataset dataset_name",
    "data.root": "data_dir data_path data_folder dataset_dir dataset_path image_dir images_dir root_dir dir folder path",
    "data.patient_pattern": "patient_regex patient_id_pattern regex",
    "data.whole_gland_labels": "labels label gland_labels",
    "data.exclude": "skip ignore exclude_cases excluded",
    "preprocess.spacing_mm": "spacing voxel_size voxel_spacing target_spacing resample resolution pixdim",
    "preprocess.image_size": "size img_size crop_size input_size image_shape patch_size roi_size",
    "preprocess.intensity_percentiles": "percentiles clip clip_percentiles intensity_range",
    "preprocess.to_8bit": "8bit uint8 bit_depth",
    "preprocess.crop": "crop_mode maskcrop",
    "fold.num_folds": "folds k k_fold k_folds n_folds nb_folds n_splits num_splits cv",
    "fold.index": "fold_index fold_id fold_idx fold_number fold_nr",
    "fold.val_fraction": "val_size val_split val_ratio validation_split validation_fraction",
    "fold.file": "split_file splits_file",
    "model": "arch architecture network net backbone model_name",
    "model.channels": "features filters feature_maps n_filters num_filters base_filters base_channels",
    "model.dropout": "dropout_rate drop dropout_prob",
    "model.norm": "norm_type normalization_layer batch_norm",
    "model.activation": "act activation_function",
    "train.learning_rate": "lr learn_rate base_lr initial_lr init_lr max_lr step_size eta",
    "train.max_epochs": "epochs epoch num_epochs n_epochs nb_epochs total_epochs",
    "train.max_minutes": "minutes max_time time_limit timeout budget",
    "train.steps_per_epoch": "steps iterations iters num_steps num_iterations iterations_per_epoch",
    "train.batch_size": "bs batch batches mini_batch mini_batch_size train_batch_size",
    "train.weight_decay": "wd decay l2 regularization",
    "train.optimizer": "optim optimiser opt solver",
    "train.loss": "criterion loss_function loss_fn",
    "train.metric": "val_metric monitor",
    "train.warmup_fraction": "warmup warmup_steps warmup_epochs",
    "train.augmentation": "aug augment augmentations data_augmentation",
    "train.precision": "amp fp16 bf16 mixed_precision dtype",
    "train.ema_decay": "ema",
    "train.zscore": "z_score normalize normalise normalization standardize",
    "evaluate.threshold": "thresh cutoff",
    "evaluate.tta": "flips flip test_time_augmentation mirroring",
    "evaluate.largest_component": "largest_cc lcc keep_largest postprocess",
    "evaluate.external_root": "external external_data external_test test_data",
    "machine.num_workers": "workers n_workers threads num_threads n_threads n_jobs jobs cpus cores",
    "machine.device": "gpu gpus cuda devices accelerator",
    "mlflow.tracking_uri": "uri tracking_url mlflow_uri",
    "mlflow.name": "run_name pipeline pipeline_name",
    "predict.input": "inputs in input_dir input_path input_file image",
    "predict.output": "out outputs out_dir output_dir output_path save_dir",
    "predict.model": "checkpoint ckpt weights model_path",
    "paths.root": "workspace work_dir workdir",
}
"""Settings by their names in other programs; _ and - are ignored."""


RENAMED = {
    "evaluate.flips": "evaluate.tta",
    "paths.spool": "paths.journal",
    "train.num_parallel_folds": "machine.num_parallel_folds",
    "train.resume": "machine.resume",
}
"""Former names of settings; an override or a params.yaml with one is refused with the present name."""


def present_name(key: str) -> str:
    """Return the present name of a setting that a file recorded, also of a searched one such as `search evaluate.flips`."""
    kind, space, name = key.rpartition(" ")
    return f"{kind}{space}{RENAMED.get(name, name)}"


def probably_meant(key: str, known: Collection[str]) -> list[str]:
    """Return the keys that a name probably means: one, several if it is ambiguous, or none."""
    group, _, last = key.rpartition(".")
    name = _plain(last)
    other_names = {_plain(other): meant for meant, others in OTHER_NAMES.items() for other in others.split()}
    if other_names.get(name) in known:
        return [other_names[name]]
    same_name = [one for one in known if _plain(one.rpartition(".")[2]) == name]
    if same_name:
        return [one for one in same_name if group and one.startswith(f"{group}.")] or same_name
    alike = closest(key, known)
    if alike is not None:
        return [alike]
    names = {_plain(one.rpartition(".")[2]): one for one in known} | other_names
    similar = difflib.get_close_matches(name, [one for one in names if len(one) > 3], n=1, cutoff=0.75)
    return [names[one] for one in similar]


def unknown_key_message(key: str, known: Collection[str]) -> str:
    """Return the message for a key that does not exist, with the key that was probably meant."""
    if key in RENAMED:
        return f"{key}: was renamed; use {RENAMED[key]}"
    if key in known:
        return f"{key}: cannot be set here, because {key.rpartition('.')[0]} is null; choose the option that has it"
    meant = " or ".join(probably_meant(key, known))
    return f"{key}: unknown key" + (f"; did you mean {meant}?" if meant else "; --cfg job shows the known ones")


def closest(word: str, known: Collection[str]) -> str | None:
    """Return the known word that is most similar to `word`, or None if none is."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.6)), None)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
