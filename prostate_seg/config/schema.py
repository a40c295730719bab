"""Schema of the config: the groups of settings that a run has, and parsing and exporting them.

Values come from configs/*.yaml. Settings of a component are beside it, such as `segmentation/training/settings.py`; the
groups here describe the data source, the machine and the arguments of stages. Lengths are in mm, voxel orders are (z, y, x).
"""

import functools
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prostate_seg.common import settings
from prostate_seg.common.errors import ConfigError, first_line
from prostate_seg.common.settings import PathText, Range, Rule, Settings, parse_group, plain
from prostate_seg.data.settings import FoldConfig
from prostate_seg.imaging.settings import PreprocessConfig, TargetConfig
from prostate_seg.phantom.settings import PhantomSettings
from prostate_seg.reporting.settings import PromotionRules
from prostate_seg.segmentation.inference.settings import EvaluateConfig
from prostate_seg.segmentation.networks.settings import Backend, ModelConfig
from prostate_seg.segmentation.settings import Device
from prostate_seg.segmentation.training.settings import TrainConfig

DataSource = Literal["folder", "phantom", "picai", "decathlon", "prostate158", "promise12"]
TableFormat = Literal["table", "json"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Settings):
    """Images and masks."""

    source: DataSource
    """Source of the cases."""
    root: PathText | None
    """Folder with images/ and masks/, or in the layout of nnU-Net or BIDS; null takes data/ in the workspace."""
    patient_pattern: str
    """Regular expression whose first group, searched in a case id, is the patient."""
    whole_gland_labels: tuple[int, ...] | None
    """Mask labels of the whole gland; null takes every label above 0, or with zones every label that has a name."""
    labels: dict[str, int] | None
    """Value of each named mask label, which zones need; null takes the names in dataset.json (nnU-Net) or dseg.tsv (BIDS)."""
    exclude: list[str]
    """Case ids to leave out."""
    on_bad_case: Literal["fail", "exclude"]
    """Whether a case that fails a quality check stops the run or is excluded."""
    phantom: PhantomSettings | None
    """Settings of data=phantom; null for every other source."""

    def _rules(self) -> list[Rule]:
        labels = self.whole_gland_labels
        are_labels = labels is None or (len(labels) > 0 and min(labels) > 0)
        is_phantom_alone = (self.phantom is not None) == (self.source == "phantom")
        return [
            ("patient_pattern", _has_a_group(self.patient_pattern), "must be a regular expression with a group"),
            ("whole_gland_labels", are_labels, "must be null or a list of labels above 0"),
            ("labels", not self.labels or min(self.labels.values()) > 0, "must be null or names of labels above 0"),
            ("phantom", is_phantom_alone, "must be set for data=phantom, and for no other data"),
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class PathsConfig(Settings):
    """Folders on this machine."""

    root: PathText
    """Workspace: folder of preprocess/, prepared/, model/ and evaluation/."""
    cache: PathText
    """Folder of files that can be made again at any time."""
    journal: PathText
    """Folder of journals: records that a tracking store has not acknowledged yet. Unlike the cache it cannot be made again."""
    trained: PathText | None
    """Folder of model/ and of unfinished training, one per training if several run at the same time; null takes root."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineConfig(Settings):
    """Resources of this machine; another device changes a result by rounding, the other settings never change one."""

    num_workers: Annotated[int | None, Range(ge=1)]
    """Cases that are processed at the same time; null takes one per core."""
    device: Device
    """Device of tensors; auto takes a GPU if one is available."""
    num_parallel_folds: Annotated[int, Range(ge=1, le=100)]
    """Folds that train at the same time, each with its share of the cores, or a GPU of its own."""
    resume: Literal["auto", "never"]
    """Whether a training that was stopped continues from its last complete epoch, or starts again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MlflowConfig(Settings):
    """Tracking of runs."""

    tracking_uri: str | None
    """URI of the tracking store; a relative sqlite file is in the project's root; null disables tracking."""
    experiment: str
    """Experiment of all pipelines."""
    name: str
    """Name of the pipeline, the parent run of the stages' runs."""
    on_rerun: Literal["supersede", "keep"]
    """Whether a new finished run of a stage supersedes the earlier one of the same pipeline, or both are kept."""
    on_unreachable: Literal["fail", "journal"]
    """If the store cannot be reached at the start of a stage: fail, or keep the run in a journal for stage=sync."""
    fresh: bool
    """Whether to start a new pipeline of this name instead of continuing the newest."""
    skip_finished: bool
    """Whether to skip a stage whose last run had the same settings, inputs and code, and whose outputs are unchanged."""
    system_metrics: bool
    """Whether to log the use of CPU, memory, disk, network and GPU every ten seconds."""

    def _rules(self) -> list[Rule]:
        is_name = bool(re.fullmatch(r"[\w\-. :/]{1,100}", self.name))
        return [
            ("experiment", bool(self.experiment.strip()), "must not be empty"),
            ("name", is_name, "must be 1 to 100 letters, digits, spaces or any of _ - . : /"),
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig(Settings):
    """Arguments of stage=verify."""

    run: str | None
    """Id of the run of a stage or of a pipeline; null takes the newest run of each stage in DS_VERSION.json."""
    format: TableFormat
    """Output format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig(Settings):
    """Arguments of stage=export."""

    check: bool
    """Whether to compare params.yaml with the config instead of writing it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchConfig(Settings):
    """Arguments of stage=fetch for public data sets."""

    parts: list[str] | None
    """Archives to download, such as fold0 of PI-CAI; null takes all archives for training."""
    origin: PathText | None
    """Folder with the downloaded archives, or http address of a mirror; null takes the data set's own servers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditConfig(Settings):
    """Arguments of stage=audit."""

    splits: PathText | None
    """Split file: JSON of this project, of PI-CAI or of nnU-Net; null takes kfold.json of the workspace."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusConfig(Settings):
    """Arguments of stage=status."""

    format: TableFormat
    """Output format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FindConfig(Settings):
    """Arguments of stage=find; give one of the two."""

    commit: str | None
    """Commit, branch, tag or DVC experiment whose runs to list."""
    run: str | None
    """Id of a run whose commit and commands to show."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkConfig(Settings):
    """Arguments of stage=link."""

    commit: str
    """Commit, or name of a DVC experiment, whose dvc.lock lists the results."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceConfig(Settings):
    """Arguments of stage=reproduce."""

    run: str | None
    """Id of the run of a stage."""
    tolerance: Annotated[float, Range(ge=0, le=1)]
    """Largest relative difference of a metric that counts as reproduced."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig(Settings):
    """Arguments of stage=compare."""

    runs: list[PathText]
    """Baseline and others: ids of evaluations, sweeps over seed or pipelines with one of them, or folders with a cases.csv."""
    difference: Annotated[float, Range(gt=0, le=1)]
    """Difference in Dice for which the number of patients and of seeds is planned, from the variances of repeats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig(Settings):
    """Arguments of stage=report."""

    mixed_folds: PathText | None
    """For fold=groups: evaluation of the same cases with mixed folds, a run id or a folder, to set beside unseen groups."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StressConfig(Settings):
    """Arguments of stage=stress."""

    perturbations: list[str] | None
    """Perturbations to apply, such as noise and shift; null takes all."""
    max_cases: Annotated[int | None, Range(ge=2)]
    """Test cases, spread over the range of gland volumes; null takes all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisterConfig(PromotionRules):
    """Arguments of stage=register, and the requirements of a champion."""

    run: str | None
    """Id of an evaluation, of an evaluated training, or of a pipeline; null takes the pipeline's newest evaluation."""
    name: str
    """Name of the registered model."""
    onnx: bool
    """Whether to store each network as ONNX, too."""
    promote: bool
    """Whether the version becomes champion if it passes the gate."""
    force: bool
    """Whether the version becomes champion although the gate refuses it."""
    reason: str | None
    """Reason of the promotion, recorded with the alias; required with force."""

    def _rules(self) -> list[Rule]:
        is_name = bool(re.fullmatch(r"[\w\-. ]{1,100}", self.name))
        has_reason = bool((self.reason or "").strip())
        return [
            *PromotionRules._rules(self),
            ("name", is_name, "must be 1 to 100 letters, digits, spaces or any of _ - ."),
            ("force", self.promote or not self.force, "goes with register.promote=true"),
            ("reason", has_reason or not self.force, "must give the reason, for register.force=true"),
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictConfig(Settings):
    """Arguments of stage=predict."""

    model: PathText | None
    """Registered model such as models:/prostate_seg@champion, or folder of networks; null takes those of the workspace."""
    input: PathText | None
    """Image file, folder of images, DICOM series, or folder of patients with any of these in it."""
    pattern: str
    """File name pattern of the images in a folder, such as *_t2w.mha; DICOM series are matched by the name of their folder."""
    output: PathText
    """Folder for masks/, overlays/ and volumes.csv."""
    overwrite: bool
    """Whether existing masks of another input or model are replaced."""
    dicom_seg: bool
    """Whether masks of DICOM series are written as DICOM SEG, too."""
    backend: Backend
    """Inference backend; onnx needs a model that was registered with register.onnx=true."""
    min_expected_dice: Annotated[float, Range(ge=0, le=1)]
    """Lowest Dice of an acceptable mask: accept if the lower bound reaches it, reject if expected Dice does not, else check."""

    def _rules(self) -> list[Rule]:
        return [("pattern", bool(self.pattern.strip()), "must not be empty; * takes all")]


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig(Settings):
    """Repairs of stage=doctor."""

    close_silent: bool
    """Whether to close runs of other hosts without a heartbeat for an hour, too."""
    fix_paths: bool
    """Whether to replace the paths in a store that was moved or copied by those of its folder; a backup is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncConfig(Settings):
    """Arguments of stage=sync."""

    any_address: bool
    """Whether to send journals of another address, too, because it is the same store or was replaced by this one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleConfig(Settings):
    """Arguments of stage=bundle: run and output to pack, or input to unpack."""

    run: str | None
    """Id of the pipeline to pack."""
    output: PathText | None
    """Archive to write."""
    input: PathText | None
    """Archive whose runs to load into this store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(Settings):
    """Settings of a run."""

    stage: str | None
    """Stage to run; `python -m prostate_seg` lists the stages."""
    seed: Annotated[int, Range(ge=0, le=2**32 - 1)]
    """Seed of all random number generators."""
    data: DataConfig
    target: TargetConfig
    preprocess: PreprocessConfig
    fold: FoldConfig
    model: ModelConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    mlflow: MlflowConfig
    paths: PathsConfig
    machine: MachineConfig
    export: ExportConfig
    fetch: FetchConfig
    audit: AuditConfig
    verify: VerifyConfig
    status: StatusConfig
    find: FindConfig
    link: LinkConfig
    reproduce: ReproduceConfig
    compare: CompareConfig
    report: ReportConfig
    stress: StressConfig
    register: RegisterConfig
    predict: PredictConfig
    doctor: DoctorConfig
    sync: SyncConfig
    bundle: BundleConfig


SCIENCE_GROUPS = ("data", "target", "preprocess", "fold", "model", "train", "evaluate")
"""Groups that decide a result; the others describe the machine."""


STAGE_SETTINGS = {
    "fetch": ("data", "seed"),
    "preprocess": ("data", "target", "preprocess"),
    "prepare": ("fold", "seed"),
    "train": ("model", "train", "fold.max_train_cases", "fold.index", "seed"),
    "evaluate": ("evaluate", "train.precision", "fold.index", "fold.not_duplicates", "seed"),
    "report": (
        *("data.labels", "data.whole_gland_labels", "target"),
        *("evaluate.external_root", "evaluate.external_labels", "evaluate.num_bootstrap", "seed"),
    ),
    "register": ("fold.index",),
}
"""Science settings that decide the result of a stage for given inputs; dvc.yaml has the same under `params`."""


def parse(composed: DictConfig) -> Config:
    """Return a composed config, with or without Hydra's own part, as checked dataclasses; see `parse_group`."""
    cfg = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    if cfg.get("stage") == "export":
        _require_plain_science(cfg)
    try:
        values = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'config'}: {first_line(error.msg or error)}") from error
    return parse_group(Config, cast(dict[str, Any], values))


def _require_plain_science(cfg: DictConfig) -> None:
    """Refuse to export interpolations: values of this machine's environment do not belong in params.yaml, which is in git."""
    groups = [group for group in (*SCIENCE_GROUPS, "seed") if group in cfg]
    raw = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.masked_copy(cfg, groups), resolve=False))
    for key, value in settings.flat(raw).items():
        if "${" in value:
            raise ConfigError(f"{key}: must be a plain value to be exported, is {value}")


@functools.cache
def setting_types() -> dict[str, Any]:
    """Return the type of every key of the config, dotted, groups included."""
    return settings.setting_types(Config)


def science_of(cfg: Config) -> dict[str, Any]:
    """Return the settings that decide a result, as plain types: seed and science groups."""
    return {"seed": cfg.seed, **{group: plain(getattr(cfg, group)) for group in SCIENCE_GROUPS}}


def portable_science_of(cfg: Config) -> dict[str, Any]:
    """Return the same without settings that do not change a fold's weights, so that equal trainings write equal files.

    These are the place of the data on this machine, the choice of folds, and the pairs that the leak gate accepts.
    """
    science = science_of(cfg)
    del science["data"]["root"], science["fold"]["index"], science["fold"]["not_duplicates"]
    return science


def _has_a_group(pattern: str) -> bool:
    try:
        return re.compile(pattern).groups >= 1
    except re.error:
        return False
