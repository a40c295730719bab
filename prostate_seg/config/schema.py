"""Types, sentences and range checks of every setting; the values are in configs/*.yaml.

`parse` turns Hydra's composed DictConfig into these dataclasses or refuses it with a `ConfigError` that names the key, the
rule and the value. Lengths are in millimetres, voxel orders are (z, y, x). Nothing here reads files or imports numerics.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar, cast, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from prostate_seg.common.errors import ConfigError
from prostate_seg.common.suggestions import probably_meant

Group = TypeVar("Group")

A_GROUP = "a group of settings"
"""In words, the type of a key that has others below it."""

NOT_DUPLICATES = re.compile(
    r"\s*(?P<first>[^/]*[^/\s])\s*/\s*(?P<second>[^/\s][^/]*?)\s*:\s+(?P<reason>\S.*)", re.DOTALL
)
"""How fold.not_duplicates names a pair; a slash is in no case id."""

Check = tuple[str, bool, str]
"""A setting's name inside its group, whether it holds, and the rule in words."""


class DataSource(Enum):
    """Where cases come from."""

    folder = "folder"
    phantom = "phantom"
    picai = "picai"
    decathlon = "decathlon"
    prostate158 = "prostate158"
    promise12 = "promise12"


class OnBadCase(Enum):
    """What a case that fails a quality check does to the run."""

    fail = "fail"
    exclude = "exclude"


class Crop(Enum):
    """What the kept region is centred on; `mask` uses the reference and marks every number `oracle_crop`."""

    center = "center"
    mask = "mask"


class SplitStrategy(Enum):
    """How patients are divided into train, val and test."""

    kfold = "kfold"
    all = "all"
    picai = "picai"


class ModelName(Enum):
    """Networks in `segmentation/networks/networks.py`."""

    unet = "unet"
    attention_unet = "attention_unet"
    resunet_a = "resunet_a"
    dynunet = "dynunet"
    segresnet = "segresnet"
    unet3d = "unet3d"


class Activation(Enum):
    """Activation after each normalised convolution."""

    prelu = "prelu"
    relu = "relu"
    leakyrelu = "leakyrelu"


class Norm(Enum):
    """Normalisation after each convolution."""

    instance = "instance"
    batch = "batch"


class Loss(Enum):
    """Losses in `segmentation/training/losses.py`."""

    bce = "bce"
    dice = "dice"
    dice_ce = "dice_ce"
    iou = "iou"
    focal_dice = "focal_dice"


class ValMetric(Enum):
    """What is compared between epochs, on the val studies."""

    dice = "dice"
    iou = "iou"


class Optimizer(Enum):
    """Optimisers of torch."""

    adamw = "adamw"
    adam = "adam"


class Schedule(Enum):
    """Course of the learning rate over the training budget."""

    cosine = "cosine"
    constant = "constant"


class Augmentation(Enum):
    """Strength of the random changes to training images."""

    none = "none"
    standard = "standard"
    coil = "coil"
    """Standard, and an endorectal coil drawn into an eighth of the inputs."""


class TrainingSlices(Enum):
    """Which slices a 2-D network trains on."""

    all = "all"
    gland = "gland"


class Resume(Enum):
    """What a training does about one that was stopped before it had finished."""

    auto = "auto"
    never = "never"


class Precision(Enum):
    """Number format of the forward pass; `auto` takes bfloat16 where the processor computes in it."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


class Device(Enum):
    """Where tensors live; `auto` takes a GPU when there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class OnRerun(Enum):
    """What becomes of a stage's earlier run in the same pipeline once a new one has finished."""

    supersede = "supersede"
    keep = "keep"


class Backend(Enum):
    """What computes the networks of a prediction."""

    torch = "torch"
    onnx = "onnx"


class OnUnreachable(Enum):
    """What becomes of a stage whose store cannot be reached when it starts."""

    fail = "fail"
    spool = "spool"


class TableFormat(Enum):
    """How a stage that answers a question prints its answer."""

    table = "table"
    json = "json"


@dataclass(kw_only=True, slots=True)
class PhantomConfig:
    """Size and difficulty of the made data set."""

    num_patients: int
    """Patients to make."""
    num_second_studies: int
    """How many of them get a second study, with the same gland."""
    field_of_view_mm: float
    """Edge length of the square field of view."""
    num_slices_range: list[int]
    """Fewest and most slices of a study."""
    gland_volume_range_ml: list[float]
    """Smallest and largest gland."""
    difficulty: float
    """From 0 (clean, high contrast) to 1 (strong noise and bias field, weak edges)."""

    def __post_init__(self) -> None:
        _check(
            "data.phantom",
            self,
            ("num_patients", 1 <= self.num_patients <= 9999, "must be from 1 to 9999"),
            (
                "num_second_studies",
                0 <= self.num_second_studies <= self.num_patients,
                "must be from 0 to data.phantom.num_patients",
            ),
            ("field_of_view_mm", 80 <= self.field_of_view_mm <= 400, "must be from 80 to 400"),
            ("num_slices_range", _is_range(self.num_slices_range, 8, 64), "must be two rising numbers from 8 to 64"),
            (
                "gland_volume_range_ml",
                _is_range(self.gland_volume_range_ml, 15, 263),
                "must be two rising numbers from 15 to 263",
            ),
            ("difficulty", 0 <= self.difficulty <= 1, "must be from 0 to 1"),
        )


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which images and masks to use."""

    source: DataSource
    """Where the cases come from."""
    root: str | None
    """Folder with images/ and masks/, or of nnU-Net's or BIDS' layout; null takes data/ in the workspace."""
    patient_pattern: str
    """Regular expression whose first group, searched in a case id, is the patient."""
    whole_gland_labels: list[int] | None
    """Mask labels that make up the whole gland; null takes every label above 0."""
    exclude: list[str]
    """Case ids to leave out."""
    on_bad_case: OnBadCase
    """Whether a case that fails a check stops the run or is left out."""
    phantom: PhantomConfig | None
    """Settings of data=phantom; null for every other source."""

    def __post_init__(self) -> None:
        labels = self.whole_gland_labels
        _check(
            "data",
            self,
            ("patient_pattern", _has_a_group(self.patient_pattern), "must be a regular expression with a group"),
            (
                "whole_gland_labels",
                labels is None or (len(labels) > 0 and min(labels) > 0),
                "must be null or a list of labels above 0",
            ),
            (
                "phantom",
                (self.phantom is not None) == (self.source is DataSource.phantom),
                "must be set for data=phantom, and for no other data",
            ),
        )


@dataclass(kw_only=True, slots=True)
class PreprocessConfig:
    """What happens to a volume before a network sees it."""

    spacing_mm: list[float] | None
    """Voxel edge lengths (z, y, x) to resample to; null keeps each study's own."""
    image_size: int
    """Edge length in voxels of the square that is kept of every slice."""
    crop: Crop
    """What that square is centred on."""
    to_8bit: bool
    """Whether intensities become 0 to 255; otherwise they stay as scanned, in float32."""
    intensity_percentiles: list[float]
    """Percentiles of the kept region that become 0 and 255."""

    def __post_init__(self) -> None:
        spacing = self.spacing_mm
        _check(
            "preprocess",
            self,
            (
                "spacing_mm",
                spacing is None or (len(spacing) == 3 and all(0.1 <= value <= 20 for value in spacing)),
                "must be null or three lengths (z, y, x) from 0.1 to 20",
            ),
            ("image_size", 32 <= self.image_size <= 1024, "must be from 32 to 1024"),
            (
                "intensity_percentiles",
                _is_range(self.intensity_percentiles, 0, 100),
                "must be two rising numbers from 0 to 100",
            ),
        )


@dataclass(kw_only=True, slots=True)
class FoldConfig:
    """Which patients train, which choose the checkpoint and which test."""

    strategy: SplitStrategy
    """How patients are divided."""
    num_folds: int
    """Number of folds of kfold."""
    val_fraction: float
    """Part of the training patients of a fold that chooses the checkpoint."""
    file: str | None
    """Split file of fold=picai: JSON whose folds[i].val lists the test case ids of fold i."""
    index: int | None
    """The one fold to train and evaluate; null does all."""
    not_duplicates: list[str]
    """Pairs of near-identical images that are no duplicates, each CASE/CASE: REASON; the leak gate lets them pass."""

    def __post_init__(self) -> None:
        _check(
            "fold",
            self,
            ("num_folds", 1 <= self.num_folds <= 100, "must be from 1 to 100"),
            (
                "num_folds",
                self.num_folds >= 2 or self.strategy is not SplitStrategy.kfold,
                "must be at least 2 for fold=kfold (fold=all trains on every case)",
            ),
            ("val_fraction", 0 < self.val_fraction < 1, "must be above 0 and below 1"),
            ("index", self.index is None or self.index >= 0, "must be null or at least 0"),
            (
                "file",
                (self.file is not None) == (self.strategy is SplitStrategy.picai),
                "must name a file for fold=picai, and be null otherwise",
            ),
            (
                "not_duplicates",
                all(NOT_DUPLICATES.fullmatch(pair) for pair in self.not_duplicates),
                'must be pairs with a reason, such as ["10001_1/10002_1: two patients, says the register"]',
            ),
        )


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The network."""

    name: ModelName
    """Entry of the table in segmentation/networks/networks.py."""
    num_slices: int
    """Slices that the network sees at once: 1 in 2-D, neighbours as channels in 2.5-D, the depth of the patch in 3-D."""
    channels: list[int]
    """Feature channels per level, finest first."""
    strides: list[list[int]]
    """Down-sampling between levels, (y, x) or (z, y, x) each; one entry fewer than channels."""
    num_res_units: int
    """Residual units per level; 0 takes plain convolutions. For dynunet 0 or 1: without or with; for segresnet at least 1."""
    dilations: list[list[int]] | None
    """Dilations of resunet_a's parallel branches, a list per level, finest first; null for every other network."""
    norm: Norm
    """Normalisation after each convolution."""
    activation: Activation
    """Activation after each normalisation."""
    dropout: float
    """Dropout probability."""

    def __post_init__(self) -> None:
        dims = 3 if self.name is ModelName.unet3d else 2
        _check(
            "model",
            self,
            ("num_slices", self.num_slices >= 1, "must be at least 1"),
            ("num_slices", dims == 3 or self.num_slices % 2 == 1, "must be odd: a slice and as many on both sides"),
            ("channels", len(self.channels) >= 2 and min(self.channels) >= 1, "must be two or more numbers above 0"),
            (
                "strides",
                len(self.strides) == len(self.channels) - 1,
                "must have one entry fewer than model.channels",
            ),
            (
                "strides",
                all(len(level) == dims and min(level) >= 1 for level in self.strides),
                f"must have {dims} numbers above 0 per level for model.name={self.name.value}",
            ),
            ("num_res_units", 0 <= self.num_res_units <= 8, "must be from 0 to 8"),
            *self._rules_of_network(),
            ("dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1"),
        )

    def _rules_of_network(self) -> list[Check]:
        """Return what holds for this network alone."""
        suffix = f" for model.name={self.name.value}"
        is_dilated = self.name is ModelName.resunet_a
        dilations = self.dilations or []
        doubled = [self.channels[0] * 2**level for level in range(len(self.channels))] if self.channels else []
        own: dict[ModelName, list[Check]] = {
            ModelName.attention_unet: [
                ("num_res_units", self.num_res_units == 0, "must be 0"),
                ("norm", self.norm is Norm.batch, "must be batch"),
                ("activation", self.activation is Activation.relu, "must be relu"),
            ],
            ModelName.resunet_a: [
                ("num_res_units", self.num_res_units == 0, "must be 0 (each dilation is a residual branch)"),
                (
                    "dilations",
                    len(dilations) == len(self.channels) and all(level and min(level) >= 1 for level in dilations),
                    "must be a list of numbers above 0 for each of model.channels",
                ),
            ],
            ModelName.dynunet: [
                ("num_res_units", self.num_res_units <= 1, "must be 0 or 1"),
                ("channels", len(self.channels) >= 3, "must be three or more numbers"),
            ],
            ModelName.segresnet: [
                ("num_res_units", self.num_res_units >= 1, "must be at least 1"),
                ("channels", self.channels == doubled, "must double from level to level"),
                ("strides", all(set(level) == {2} for level in self.strides), "must all be 2"),
            ],
        }
        rules = [(key, holds, f"{rule}{suffix}") for key, holds, rule in own.get(self.name, [])]
        return [*rules, ("dilations", is_dilated or self.dilations is None, f"must be null{suffix}")]


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """How the network is fitted."""

    loss: Loss
    """What is minimised."""
    metric: ValMetric
    """Mean over the val studies that chooses the weights; on the network's grid, at threshold 0.5, whatever `evaluate` sets."""
    optimizer: Optimizer
    """How."""
    learning_rate: float
    """Largest learning rate."""
    weight_decay: float
    """Decoupled weight decay (adamw) or L2 penalty (adam) of the weights of convolutions; none on biases, norms and PReLU."""
    schedule: Schedule
    """Course of the learning rate over the budget."""
    warmup_fraction: float
    """Part of the budget in which the learning rate rises from 0."""
    batch_size: int
    """Slices, or 3-D patches, per step."""
    steps_per_epoch: int | None
    """Steps of an epoch; null passes over every training slice once. Val is looked at after an epoch, or after several."""
    max_epochs: int
    """Epochs per fold at most; the schedule ends there."""
    max_minutes: float | None
    """Minutes per fold at most; the schedule ends there when this comes first."""
    slices: TrainingSlices
    """Slices a 2-D network trains on."""
    augmentation: Augmentation
    """Random changes to the training images."""
    ema_decay: float
    """Decay per step of the running mean of the weights, which is validated and kept; smaller at first; 0 for none."""
    zscore: bool
    """Whether each image is clipped to its 5th to 95th percentile before it is brought to mean 0 and SD 1."""
    precision: Precision
    """Number format of the forward pass."""
    num_parallel_folds: int
    """Folds that train side by side, each with its part of the cores, or a GPU of its own."""
    resume: Resume
    """Whether a training that was stopped goes on from its last complete epoch."""
    deterministic: bool
    """Whether two runs on one machine give the same bits; slower."""

    def __post_init__(self) -> None:
        _check(
            "train",
            self,
            ("learning_rate", 0 < self.learning_rate <= 1, "must be above 0 and at most 1"),
            ("weight_decay", 0 <= self.weight_decay <= 1, "must be from 0 to 1"),
            ("warmup_fraction", 0 <= self.warmup_fraction < 1, "must be at least 0 and below 1"),
            ("batch_size", 1 <= self.batch_size <= 4096, "must be from 1 to 4096"),
            (
                "steps_per_epoch",
                self.steps_per_epoch is None or 1 <= self.steps_per_epoch <= 100_000,
                "must be null or from 1 to 100000",
            ),
            ("max_epochs", 1 <= self.max_epochs <= 100_000, "must be from 1 to 100000"),
            ("max_minutes", self.max_minutes is None or self.max_minutes > 0, "must be null or above 0"),
            ("num_parallel_folds", 1 <= self.num_parallel_folds <= 100, "must be from 1 to 100"),
            ("ema_decay", 0 <= self.ema_decay < 1, "must be at least 0 and below 1"),
        )


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """How predictions are made and scored."""

    threshold: float
    """Probability from which a voxel is gland."""
    largest_component: bool
    """Whether only the largest connected region is kept."""
    flips: bool
    """Whether predictions of the left-right mirrored image are averaged in."""
    num_bootstrap: int
    """Bootstrap samples behind each interval."""
    external_root: str | None
    """Data folder, laid out as data.root may be, to score the ensemble of all folds on in place of the test cases."""

    def __post_init__(self) -> None:
        _check(
            "evaluate",
            self,
            ("threshold", 0 < self.threshold < 1, "must be above 0 and below 1"),
            ("num_bootstrap", 100 <= self.num_bootstrap <= 100_000, "must be from 100 to 100000"),
        )


@dataclass(kw_only=True, slots=True)
class PathsConfig:
    """Where stages write on this machine."""

    root: str
    """Workspace folder: preprocess/, prepared/, model/ and evaluation/ lie in it."""
    cache: str
    """Folder for files that can be made again at any time."""
    spool: str
    """Folder of what a store has still to be told; unlike the cache it cannot be made again."""
    trained: str | None
    """Folder of model/ and of unfinished training, where trainings side by side each need their own; null takes root."""


@dataclass(kw_only=True, slots=True)
class MachineConfig:
    """What this machine offers; another device changes a result by rounding, another number of workers not at all."""

    num_workers: int | None
    """Cases that are worked on side by side; null takes one per core."""
    device: Device
    """Where tensors live."""

    def __post_init__(self) -> None:
        workers = self.num_workers
        _check("machine", self, ("num_workers", workers is None or workers >= 1, "must be null or at least 1"))


@dataclass(kw_only=True, slots=True)
class MlflowConfig:
    """Where runs are recorded, and under which name."""

    tracking_uri: str | None
    """Address of the store; a relative sqlite file lies in the project's root; null records nothing."""
    experiment: str
    """Experiment that holds all pipelines."""
    name: str
    """Name of the pipeline that the stages' runs belong to."""
    on_rerun: OnRerun
    """What becomes of a stage's earlier run once a new one has finished."""
    on_unreachable: OnUnreachable
    """What becomes of a stage whose store cannot be reached when it starts: it fails, or is recorded on disk for stage=sync."""
    fresh: bool
    """Whether to begin a new pipeline of that name instead of going on with the newest."""
    skip_finished: bool
    """Whether a stage is skipped whose last run had the same settings, inputs and code, and left its outputs in place."""
    system_metrics: bool
    """Whether the use of processor, memory, disk, network and GPU is recorded every ten seconds."""

    def __post_init__(self) -> None:
        is_name = bool(re.fullmatch(r"[\w\-. :/]{1,100}", self.name))
        _check(
            "mlflow",
            self,
            ("experiment", bool(self.experiment.strip()), "must not be empty"),
            ("name", is_name, "must be 1 to 100 letters, digits, spaces or any of _ - . : /"),
        )


@dataclass(kw_only=True, slots=True)
class VerifyConfig:
    """What stage=verify compares the workspace with."""

    run: str | None
    """Id of a run of a stage or of a whole pipeline; null takes the newest of each stage in DS_VERSION.json."""
    format: TableFormat
    """How the answer is printed."""


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """What stage=export does with params.yaml."""

    check: bool
    """Whether to compare params.yaml with the config instead of writing it."""


@dataclass(kw_only=True, slots=True)
class FetchConfig:
    """What stage=fetch takes of a public data set, and from where."""

    parts: list[str] | None
    """Archives to take, such as fold0 of PI-CAI; null takes all that are for training."""
    origin: str | None
    """Folder with the downloaded archives, or http address of a mirror; null takes the data set's own servers."""


@dataclass(kw_only=True, slots=True)
class AuditConfig:
    """Which split stage=audit looks at."""

    splits: str | None
    """Split file: JSON of this project, of PI-CAI or of nnU-Net; null takes kfold.json of the workspace."""


@dataclass(kw_only=True, slots=True)
class StatusConfig:
    """How stage=status answers."""

    format: TableFormat
    """How the answer is printed."""


@dataclass(kw_only=True, slots=True)
class FindConfig:
    """What stage=find looks up; one of the two."""

    commit: str | None
    """Commit, branch, tag or DVC experiment whose runs are wanted."""
    run: str | None
    """Id of a run whose commit and commands are wanted."""


@dataclass(kw_only=True, slots=True)
class LinkConfig:
    """What stage=link writes to runs."""

    commit: str
    """Commit, or name of a DVC experiment, whose dvc.lock names the results."""


@dataclass(kw_only=True, slots=True)
class ReproduceConfig:
    """What stage=reproduce runs again."""

    run: str | None
    """Id of the run of a stage."""
    tolerance: float
    """Largest difference of a metric, relative to the recorded value, that still counts as reproduced."""

    def __post_init__(self) -> None:
        _check("reproduce", self, ("tolerance", 0 <= self.tolerance <= 1, "must be from 0 to 1"))


@dataclass(kw_only=True, slots=True)
class CompareConfig:
    """What stage=compare compares."""

    runs: list[str]
    """The baseline and one or more others: ids of evaluations or of pipelines that hold one, or folders with a cases.csv."""


@dataclass(kw_only=True, slots=True)
class RegisterConfig:
    """What stage=register puts into the registry, and what a champion must have shown."""

    run: str | None
    """Id of an evaluation, of a training that was evaluated, or of a pipeline; null takes the pipeline's newest evaluation."""
    name: str
    """Name of the model in the registry."""
    onnx: bool
    """Whether each network is stored as ONNX too."""
    promote: bool
    """Whether the version becomes champion, if it passes the gate."""
    min_test_patients: int
    """Fewest patients that a champion was tested on."""
    min_dice: float
    """Lowest mean Dice of a champion over its test cases."""
    max_failure_fraction: float
    """Largest part of its test cases below the Dice of a failure."""
    min_gain: float
    """What the interval of the Dice gained on the present champion must lie above; below 0 an equal model may follow."""
    force: bool
    """Whether the version becomes champion although the gate refuses it."""
    reason: str | None
    """Why the alias moves, for those who ask later; needed with force."""

    def __post_init__(self) -> None:
        is_name = bool(re.fullmatch(r"[\w\-. ]{1,100}", self.name))
        has_reason = bool((self.reason or "").strip())
        _check(
            "register",
            self,
            ("name", is_name, "must be 1 to 100 letters, digits, spaces or any of _ - ."),
            ("min_test_patients", self.min_test_patients >= 1, "must be at least 1"),
            ("min_dice", 0 <= self.min_dice <= 1, "must be from 0 to 1"),
            ("max_failure_fraction", 0 <= self.max_failure_fraction <= 1, "must be from 0 to 1"),
            ("min_gain", -1 <= self.min_gain <= 1, "must be from -1 to 1"),
            ("force", self.promote or not self.force, "goes with register.promote=true"),
            ("reason", has_reason or not self.force, "must say why, for register.force=true"),
        )


@dataclass(kw_only=True, slots=True)
class PredictConfig:
    """What stage=predict segments, with which networks, and where the masks go."""

    model: str | None
    """Registered model such as models:/prostate_seg@champion, or folder of networks; null takes those of the workspace."""
    input: str | None
    """Image file, folder of images, DICOM series, or folder of patients with any of these in it."""
    pattern: str
    """Which images of a folder are taken: a file name pattern, such as *_t2w.mha; DICOM series go by their folder's name."""
    output: str
    """Folder for masks/, overlays/ and volumes.csv."""
    overwrite: bool
    """Whether masks that are there and not of this input and model are replaced."""
    dicom_seg: bool
    """Whether masks of DICOM series are written as DICOM SEG too."""
    backend: Backend
    """What computes; onnx needs a model that was registered with register.onnx=true."""

    def __post_init__(self) -> None:
        _check("predict", self, ("pattern", bool(self.pattern.strip()), "must not be empty; * takes all"))


@dataclass(kw_only=True, slots=True)
class DoctorConfig:
    """What stage=doctor may fix."""

    close_silent: bool
    """Whether runs of other hosts that have given no sign of life for an hour are closed too."""
    fix_paths: bool
    """Whether the paths in a store that was moved or copied are replaced by those of its folder; a backup is kept."""


@dataclass(kw_only=True, slots=True)
class SyncConfig:
    """What stage=sync sends."""

    any_address: bool
    """Whether to send what was meant for another address too, because this is the same store or takes its place."""


@dataclass(kw_only=True, slots=True)
class BundleConfig:
    """What stage=bundle packs or unpacks; run and output, or input."""

    run: str | None
    """Id of the pipeline that is packed."""
    output: str | None
    """Archive to write."""
    input: str | None
    """Archive whose runs are put into this store."""


@dataclass(kw_only=True, slots=True)
class Config:
    """A whole run."""

    stage: str | None
    """What to do; `python -m prostate_seg` lists the stages."""
    seed: int
    """Source of every random choice."""
    data: DataConfig
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
    register: RegisterConfig
    predict: PredictConfig
    doctor: DoctorConfig
    sync: SyncConfig
    bundle: BundleConfig

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed: must be from 0 to {2**32 - 1}, is {self.seed}")


SCIENCE_GROUPS = ("data", "preprocess", "fold", "model", "train", "evaluate")
"""Groups that decide a result; the others describe the machine."""


STAGE_SETTINGS = {
    "fetch": ("data", "seed"),
    "preprocess": ("data", "preprocess"),
    "prepare": ("fold", "seed"),
    "train": ("model", "train", "fold.index", "seed"),
    "evaluate": ("evaluate", "train.precision", "fold.index", "fold.not_duplicates", "seed"),
    "report": ("data.whole_gland_labels", "evaluate.external_root", "evaluate.num_bootstrap", "seed"),
    "register": ("fold.index",),
}
"""Of the science settings, those that decide what a stage makes of its inputs; dvc.yaml has the same under `params`."""


def parse(cfg: DictConfig) -> Config:
    """Return the composed config as checked dataclasses.

    Raises:
        ConfigError: For an unknown key, a wrong type, a missing or an impossible value.
    """
    try:
        if cfg.get("stage") == "export":
            _require_plain_science(cfg)
        # Resolved first: a path that names a setting gets the word that YAML has, not the enum's Python name.
        values = cast(Any, OmegaConf.to_container(cfg, resolve=True))
        _require_shapes(values)
        merged = OmegaConf.merge(OmegaConf.structured(Config), values)
        return cast(Config, OmegaConf.to_object(merged))
    except ConfigError:
        raise
    except ConfigKeyError as error:
        raise ConfigError(unknown_key_message(str(error.full_key))) from error
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        raise ConfigError(f"{key}: must be set to {rule_of(key)}; add {key}=... to the command") from error
    except ValidationError as error:
        raise ConfigError(_type_message(cfg)) from error
    except OmegaConfBaseException as error:
        said = str(error.msg or error).splitlines()[0]
        raise ConfigError(f"{error.full_key or 'config'}: {said}") from error


def parse_job(composed: DictConfig) -> Config:
    """Return the same of a config that still has Hydra's own part.

    Raises:
        ConfigError: As `parse`.
    """
    return parse(OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"]))


def parse_group(kind: type[Group], values: Mapping[str, Any]) -> Group:
    """Return one checked dataclass from plain values, such as a trained network's own settings.

    Raises:
        ConfigError: As `parse`.
    """
    try:
        return cast(Group, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), dict(values))))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{kind.__name__}: {error.full_key}: {error.msg}") from error


def _require_plain_science(cfg: DictConfig) -> None:
    """Refuse to export what this machine's environment would fill in: params.yaml lies in git."""
    groups = [group for group in (*SCIENCE_GROUPS, "seed") if group in cfg]
    for key, value in _leaves(OmegaConf.to_container(OmegaConf.masked_copy(cfg, groups), resolve=False)):
        if isinstance(value, str) and "${" in value:
            raise ConfigError(f"{key}: must be a plain value to be exported, is {value}")


def _require_shapes(values: dict[str, Any]) -> None:
    """Refuse a list or a group where the schema has none, and the other way round: merging would let some through."""
    for key, hint in _walk(Config, ""):
        value: Any = values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if _has_other_shape(value, hint):
            raise ConfigError(f"{key}: must be {type_in_words(hint)}, is {value}")


def _has_other_shape(value: Any, hint: Any) -> bool:
    options = [option for option in get_args(hint) if option is not type(None)]
    if value is None or value == "???":  # for OmegaConf to judge
        return False
    if type(None) in get_args(hint):
        return _has_other_shape(value, options[0])
    if options:
        return not isinstance(value, list) or any(_has_other_shape(one, options[0]) for one in value)
    return not isinstance(value, dict) if dataclasses.is_dataclass(hint) else isinstance(value, list | dict)


def _leaves(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return [(prefix.removesuffix("."), tree)]
    return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{prefix}{key}.")]


def unknown_key_message(key: str) -> str:
    """Say that a key does not exist, and which one was probably meant."""
    if key in known_keys():
        return f"{key}: cannot be set here, because {key.rpartition('.')[0]} is null; choose the option that has it"
    meant = " or ".join(probably_meant(key, known_keys()))
    return f"{key}: unknown key" + (f"; did you mean {meant}?" if meant else "; --cfg job shows the known ones")


def known_keys() -> list[str]:
    """Return every key of the schema, dotted, groups included."""
    return list(setting_types())


@functools.cache
def setting_types() -> dict[str, Any]:
    """Return the type of every key of the schema, dotted, groups included."""
    return dict(_walk(Config, ""))


def science_of(cfg: Config) -> dict[str, Any]:
    """Return the settings that decide a result, as plain types: seed and science groups."""
    whole = as_container(cfg)
    return {"seed": cfg.seed, **{group: whole[group] for group in SCIENCE_GROUPS}}


def portable_science_of(cfg: Config) -> dict[str, Any]:
    """Return the same without what leaves a fold's weights as they are, so that equal trainings write equal files.

    That is where the data lie on this machine, whether other folds are trained too, which pairs the leak gate lets pass, and
    what is done about a stop.
    """
    science = science_of(cfg)
    del science["data"]["root"], science["fold"]["index"], science["fold"]["not_duplicates"], science["train"]["resume"]
    return science


def as_container(part: Any) -> dict[str, Any]:
    """Return a config dataclass as plain JSON and YAML types; enums become their names."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(part), enum_to_str=True))


def _walk(kind: type, prefix: str) -> list[tuple[str, Any]]:
    """List (dotted key, type) of a dataclass and of those inside it."""
    found = []
    for name, hint in get_type_hints(kind).items():
        found.append((prefix + name, hint))
        for inner in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(inner):
                found += _walk(cast(type, inner), f"{prefix}{name}.")
    return found


def type_in_words(hint: Any) -> str:
    """Say what values a type takes."""
    options = [option for option in get_args(hint) if option is not type(None)]
    if type(None) in get_args(hint):
        return f"null or {type_in_words(options[0])}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(member.name for member in hint)
    if options:
        return f"a list, each {type_in_words(options[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, A_GROUP)


def _type_message(cfg: DictConfig) -> str:
    """Find the setting whose value has the wrong type by merging one at a time."""
    schema = OmegaConf.structured(Config)
    for key in known_keys():
        value = OmegaConf.select(cfg, key, throw_on_missing=False)
        if isinstance(value, DictConfig) and rule_of(key).endswith(A_GROUP):
            continue
        alone: Any = value
        for part in reversed(key.split(".")):
            alone = {part: alone}
        try:
            OmegaConf.merge(schema, alone)
        except OmegaConfBaseException:
            return f"{key}: must be {rule_of(key)}, is {value}"
    return "a group of settings has the wrong type; compare with --cfg job"


def rule_of(key: str) -> str:
    """Say what type of value a key takes."""
    hints = setting_types()
    return type_in_words(hints[key]) if key in hints else "a value"


def _check(prefix: str, group: object, *checks: Check) -> None:
    """Raise for the first rule that does not hold."""
    for name, holds, rule in checks:
        if not holds:
            value = getattr(group, name)
            shown = value.value if isinstance(value, Enum) else value
            raise ConfigError(f"{prefix}.{name}: {rule}, is {'null' if shown is None else shown}")


def _is_range(values: list[Any], lowest: float, highest: float) -> bool:
    return len(values) == 2 and lowest <= values[0] < values[1] <= highest


def _has_a_group(pattern: str) -> bool:
    try:
        return re.compile(pattern).groups >= 1
    except re.error:
        return False
