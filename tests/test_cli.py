"""Command line: arguments are passed to Hydra as typed; a command that cannot run is refused with a suggestion."""

import functools
import io
import logging
import os
import re
import shlex
import string
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from prostate_seg.cli import (
    PATHS,
    TEXT_OF_HYDRA,
    WITH_COMMAS,
    config_folder,
    hydra_word,
    hydra_words,
    require_inputs,
    typed_word,
    write_error,
)
from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.common.suggestions import OTHER_NAMES, probably_meant, unknown_key_message
from prostate_seg.common.terminal import ConsoleHandler
from prostate_seg.config import schema as config
from prostate_seg.stages import require_stage
from prostate_seg.sweeping.identity import swept_settings
from prostate_seg.sweeping.search_space import expand_globs
from tests.conftest import composed

ODD_NAMES = [
    "a (1).nii.gz",
    "a=b.nii.gz",
    "a#1.nii.gz",
    "O'Neil.nii.gz",
    'the "best" one.mha',
    "O'Neil's \"best\".mha",
    "2020, second half",
    "[2020] a",
    "{x}",
    "$HOME/x",
    "50%&more",
    "a:b",
    "ends in a backslash\\",
    "\\server\\share",
    "Größe/Müller.nrrd",
    "前列腺.mha",
    "12e4567",
    "0012",
    "10005_1000005",
    "true",
    "main~2",
    "HEAD^",
    "HEAD@{1}",
    "*.mha",
    "(.+)",
    " x ",
    "a\tb",
    "choice",
    "'",
    "x,'y",
]
PATTERNS = [
    r"(.+)",
    r"^([^_]+)",
    r"^(\d{1,3})_",
    r"^(?P<patient>[A-Z]{2}\d+)(?:_|$)",
    r"(a|b)\(x\)",
    r"^(\w+)\.nii$",
    "a=(b)",
]
TEXT = sorted(
    key
    for key, kind in config.setting_types().items()
    if kind in (str, str | None) and key not in ("stage", "data.root")
)


def value_of(word: str, **how: bool) -> Any:
    """Return Hydra's value of a typed argument."""
    read = hydra_word(word, **({"is_multirun": False} | how))
    return OverridesParser.create().parse_override(read).value()


def values_of(word: str) -> list[Any]:
    """Return the values of the jobs for a typed argument of a multirun."""
    override = OverridesParser.create().parse_override(hydra_word(word, is_multirun=True))
    if not override.is_sweep_override():
        return [override.value()]
    words = [f"key={one}" for one in override.sweep_string_iterator()]
    return [OverridesParser.create().parse_override(one).value() for one in words]


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("key", ["predict.input", "find.commit", "hydra.sweeper.study_name"])
def test_text_settings_are_used_as_typed(key: str, name: str) -> None:
    assert value_of(f"{key}={name}") == name


@pytest.mark.parametrize("key", [*TEXT, *sorted(PATHS - {"compare.runs"}), *sorted(TEXT_OF_HYDRA)])
def test_every_text_setting_accepts_brackets_and_commas(key: str) -> None:
    assert value_of(f"{key}=a (1), b=[2].mha") == "a (1), b=[2].mha"
    assert value_of(f"+{key}=007") == "007"


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("is_multirun", [False, True])
def test_regular_expression_is_used_as_typed(pattern: str, is_multirun: bool) -> None:
    assert value_of(f"data.patient_pattern={pattern}", is_multirun=is_multirun) == pattern


def test_docs_command_for_one_study_per_patient_composes() -> None:
    assert (
        config.parse(composed(*hydra_words(["stage=train", "data.patient_pattern=(.+)"]))).data.patient_pattern
        == "(.+)"
    )


@settings(deadline=None, derandomize=True, database=None, max_examples=150)
@given(st.text(st.sampled_from(string.printable[:95] + "äé日"), min_size=1, max_size=10))
def test_any_text_is_used_as_typed_or_is_hydra_grammar(text: str) -> None:
    value = value_of(f"register.reason={text}")
    is_hydras = text[:1] in "'\"" or "(" in text or "\\" in text or text.lower() == "null"
    assert value == text or is_hydras


def test_null_is_one_of_the_values_of_a_text_setting_in_a_multirun() -> None:
    word = "train.init=null,models:/gland@champion"
    assert hydra_word(word, is_multirun=True) == word
    assert hydra_word("train.init='null',other", is_multirun=True) == "train.init='null',other"


def test_quotes_functions_escapes_and_interpolations_of_hydra_keep_their_meaning() -> None:
    for typed, value in [
        ("'a, b'", "a, b"),
        ('"a (1)"', "a (1)"),
        (r"a\ \(1\)\,b", "a (1),b"),
        ("null", None),
        ("", ""),
        ("str(12)", "12"),
        ("${paths.root}/x", "${paths.root}/x"),
        ("${oc.env:HOME,/x}/y", "${oc.env:HOME,/x}/y"),
    ]:
        assert hydra_word(f"predict.input={typed}", is_multirun=False) == f"predict.input={typed}"
        assert value_of(f"predict.input={typed}") == value
    assert value_of("predict.input=${paths.root}/a (1).mha") == "${paths.root}/a (1).mha"
    assert (
        config.parse(composed(hydra_word("predict.output=${paths.root}/a (1)", is_multirun=False))).predict.output
        == "./a (1)"
    )


def test_arguments_that_hydra_parses_correctly_are_unchanged() -> None:
    words = ["stage=train", "data.root=/data/x-1_2", "model=unet", "train.learning_rate=1e-3", "model.channels=[8,16]"]
    words += ["compare.runs=[abc,../x]", "hydra.run.dir=${paths.root}/x", "~data.exclude", "--cfg", "job"]
    assert hydra_words(words) == words


def test_home_folder_is_expanded_without_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert value_of("predict.input=~/x (1).mha") == "/home/ann/x (1).mha"
    assert value_of("predict.input='~/x'") == "/home/ann/x"
    assert value_of("paths.root=~") == "/home/ann"
    assert value_of("compare.runs=[~/a,abc]") == ["/home/ann/a", "abc"]
    assert values_of("data.root=~/a,~/b") == ["/home/ann/a", "/home/ann/b"]
    assert value_of("find.commit=~2") == "~2"
    assert value_of("predict.input=./~/x") == "./~/x"
    assert value_of("predict.input=~nobody-of-this-name/x") == "~nobody-of-this-name/x"


def test_each_item_of_a_text_list_is_text() -> None:
    assert value_of("data.exclude=[10005_1000005, 0012,a (1)]") == ["10005_1000005", "0012", "a (1)"]
    assert value_of("data.exclude=['a,b',c]") == ["a,b", "c"]
    assert value_of("data.exclude=[]") == []
    assert value_of("fetch.parts=null") is None
    words = ["data.labels={lesion: 3}", "target.regions.lesion=[lesion]", "target.regions={apex: [lesion]}"]
    cfg = config.parse(composed(*(hydra_word(word, is_multirun=False) for word in words)))
    assert cfg.data.labels == {"transition_zone": 1, "peripheral_zone": 2, "lesion": 3}
    assert cfg.target.regions == {"whole_gland": None, "lesion": ["lesion"], "apex": ["lesion"]}
    assert config.parse(composed(hydra_word("data.exclude=[10005_1000005]", is_multirun=False))).data.exclude == [
        "10005_1000005"
    ]
    with pytest.raises(ConfigError, match="data.exclude: must be a list, each text, is 10005_1000005"):
        config.parse(composed(hydra_word("data.exclude=10005_1000005", is_multirun=False)))


def test_commas_of_a_multirun_sweep_unless_quoted(tmp_path: Path) -> None:
    assert values_of("predict.input=a (1).mha,b.mha") == ["a (1).mha", "b.mha"]
    assert values_of("predict.input='a,b.mha',c") == ["a,b.mha", "c"]
    assert values_of("predict.input='a,b.mha'") == ["a,b.mha"]
    assert values_of("mlflow.name=choice(a,b (2))") == ["a", "b (2)"]
    assert values_of("data.exclude=[a (1),b],[c]") == [["a (1)", "b"], ["c"]]
    assert values_of("train.max_epochs=1,2") == [1, 2]
    assert values_of("fold.index=range(0,3)") == [0, 1, 2]
    assert values_of("register.reason=better, and faster") == ["better, and faster"]
    assert set(TEXT) >= WITH_COMMAS
    folder = tmp_path / "2019,2020"
    folder.mkdir()
    assert values_of(f"data.root={folder}") == [str(folder)]


@pytest.mark.parametrize("name", [name for name in ODD_NAMES if name.strip() == name and name != "'"])
def test_recorded_command_is_the_typed_one(name: str) -> None:
    read = hydra_word(f"register.reason={name}", is_multirun=False)
    assert typed_word(read) == f"register.reason={name}"
    assert typed_word("register.reason='null'") == "register.reason='null'"  # invalid without quotes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "train: an argument is written key=value, without spaces around =; did you mean stage=train?"),
        (["stage", "=", "train"], "stage: an argument is written key=value"),
        (["stage=train,evaluate"], "stage=train,evaluate: several values are several jobs; add -m to the command"),
        (["model=glob(*)"], r"model=glob(*): several values are several jobs; add -m"),
        (["model.channels=8,16"], "add -m to the command, or write a list: model.channels=[8,16]"),
        (["+sweep=optuna"], "+sweep=optuna: a sweep is many jobs; add -m to the command"),
        (["seed=["], "seed: must be a whole number, is [\nno viable alternative at input '['"),
        (["fold=0"], "fold: no option '0'; known are all, groups, kfold, picai; did you mean fold.index=0?"),
        (["model=un(et"], "model: no option 'un(et'; known are"),
        (["+hydra.job.env_set.X=a(b"], """quote it: '+hydra.job.env_set.X='"'"'a(b'"'"''"""),
        (["--lr=0.1"], "unrecognized arguments: --lr=0.1\nSettings are written key=value: train.learning_rate=0.1"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        ([], "Choose a stage"),
    ],
)
def test_invalid_arguments_are_refused_with_a_message(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hydra_words(words)
    assert message in str(caught.value)


def test_help_and_config_options_need_no_stage() -> None:
    for words in (["--help"], ["--cfg", "job"], ["--info"], ["--cfg", "job", "fold.index=0,1"]):
        assert hydra_words(words) == words


def test_hydra_has_the_options_that_cli_reads() -> None:
    """Contract of the private function of Hydra that cli.py uses."""
    arguments = get_args_parser().parse_intermixed_args(["a=1", "-m", "--config-name", "x", "b=2"])
    assert (arguments.overrides, arguments.multirun, arguments.config_name) == (["a=1", "b=2"], True, "x")
    for name in ("help", "hydra_help", "cfg", "info", "shell_completion", "experimental_rerun"):
        assert not getattr(arguments, name)


def swept(*overrides: str) -> dict[str, list[str | None]]:
    """Return the settings that a multirun varies, as the callback finds them."""
    with initialize_config_dir(config_dir=str(config_folder())):
        loader = GlobalHydra.instance().config_loader()
        cfg = loader.load_configuration("config", overrides=list(overrides), run_mode=_multirun())
        return swept_settings(cfg)


def _multirun() -> Any:
    from hydra.types import RunMode

    return RunMode.MULTIRUN


def test_glob_becomes_a_choice_in_a_study() -> None:
    with initialize_config_dir(config_dir=str(config_folder())):
        loader = GlobalHydra.instance().config_loader()
        words = expand_globs(["model=glob(un*)", "seed=1", "data.root='a (1)'"], loader)
    assert words == ["model=choice(unet,unet3d)", "seed=1", "data.root='a (1)'"]


def test_callback_finds_settings_swept_by_glob_choice_and_range() -> None:
    assert swept("model=glob(*,exclude=unet3d)")["model"] == [
        "attention_unet",
        "dynunet",
        "resunet_a",
        "segresnet",
        "unet",
    ]
    assert swept("fold.index=range(0,5)", "stage=choice(train,evaluate)") == {
        "fold.index": ["0", "1", "2", "3", "4"],
        "stage": ["train", "evaluate"],
    }
    with pytest.raises(ConfigError, match="has no value to try"):
        swept("train.loss=glob(*)")
    with pytest.raises(ConfigError, match=r"train.lr: unknown key; did you mean train.learning_rate\?"):
        swept("+train.lr=0.1,0.2")
    with pytest.raises(ConfigError, match=r"model: no option 'unett'; known are .*; did you mean model=unet\?"):
        swept("model=unet,unett")
    with pytest.raises(ConfigError, match=r"only a search draws from an interval; add \+sweep=optuna"):
        swept("train.learning_rate=interval(1e-4,1e-2)")


NAMES = {
    "train.lr": "train.learning_rate",
    "lr": "train.learning_rate",
    "learningrate": "train.learning_rate",
    "epochs": "train.max_epochs",
    "bs": "train.batch_size",
    "batch": "train.batch_size",
    "batchsize": "train.batch_size",
    "train.batch-size": "train.batch_size",
    "num_workers": "machine.num_workers",
    "workers": "machine.num_workers",
    "device": "machine.device",
    "gpu": "machine.device",
    "random_seed": "seed",
    "spacing": "preprocess.spacing_mm",
    "folds": "fold.num_folds",
    "k": "fold.num_folds",
    "arch": "model",
    "network": "model",
    "optim": "train.optimizer",
    "wd": "train.weight_decay",
    "data_dir": "data.root",
    "predict.inputs": "predict.input",
    "train.dropout": "model.dropout",
    "model.lerning_rate": "train.learning_rate",
}


@pytest.mark.parametrize("name", NAMES)
def test_unknown_key_suggests_the_setting_of_the_same_meaning(name: str) -> None:
    assert unknown_key_message(name, config.setting_types()) == f"{name}: unknown key; did you mean {NAMES[name]}?"


def test_unknown_key_with_plus_suggests_it_too() -> None:
    with pytest.raises(ConfigError, match=r"train.lr: unknown key; did you mean train.learning_rate\?"):
        config.parse(composed("+train.lr=1"))


def test_ambiguous_name_suggests_each_setting_that_has_it() -> None:
    assert probably_meant("format", config.setting_types()) == ["verify.format", "status.format"]
    assert probably_meant("verify.fromat", config.setting_types()) == ["verify.format"]
    assert probably_meant("xyzzy", config.setting_types()) == []


def test_suggested_settings_exist_and_no_alias_is_a_setting() -> None:
    assert set(OTHER_NAMES) <= set(config.setting_types())
    names = [name for others in OTHER_NAMES.values() for name in others.split()]
    assert len(names) == len(set(names))


CHAIN = ["fetch", "preprocess", "prepare", "train", "evaluate", "report"]
WRITES = {
    "fetch": ["data/images/1_1.mha"],
    "preprocess": ["preprocess/dataset.csv"],
    "prepare": ["prepared/kfold.json"],
    "train": ["model/fold0/recipe.json", "model/fold1/recipe.json"],
    "evaluate": ["evaluation/metrics.json"],
}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@functools.cache
def parsed(*overrides: str) -> config.Config:
    return config.parse(composed(*overrides))


def run_before(folder: Path, *stages: str) -> None:
    """Write the files that mark a stage as finished."""
    for name in (name for stage in stages for name in WRITES[stage]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"folds": [{}, {}]}')


def refusal(*typed: str) -> str:
    """Return the message of a command that is refused for missing inputs."""
    words = [word for word in typed if "=" in word and not word.startswith("-")]
    overrides = [
        hydra_word(word, is_multirun=False) for word in words if not re.match(r"stage=|\+sweep=|fold.index=0,1", word)
    ]
    stages = next(word for word in words if word.startswith("stage=")).removeprefix("stage=").split(",")
    with pytest.raises((InputError, ConfigError)) as caught:
        require_inputs(stages, parsed(*overrides), typed)
    return str(caught.value)


def command_in(text: str) -> list[str]:
    return shlex.split(text.splitlines()[-1])[3:]


@pytest.mark.parametrize("stage", ["preprocess", "prepare", "train", "evaluate", "report"])
def test_stage_on_a_fresh_clone_lists_all_earlier_stages(workspace: Path, stage: str) -> None:
    text = refusal(f"stage={stage}", "seed=3")
    chain = CHAIN[: CHAIN.index(stage) + 1]
    assert command_in(text) == ["-m", f"stage={','.join(chain)}", "seed=3"]
    assert "data" in text
    run_before(workspace, *chain[:-1])
    require_inputs([stage], parsed(), [])


@pytest.mark.parametrize(
    ("stage", "chain"),
    [
        ("inspect", "fetch,inspect"),
        ("audit", "fetch,preprocess,prepare,audit"),
        ("register", f"{','.join(CHAIN[:-1])},register"),
    ],
)
def test_stages_outside_the_pipeline_list_their_inputs(workspace: Path, stage: str, chain: str) -> None:
    assert command_in(refusal(f"stage={stage}")) == ["-m", f"stage={chain}"]


def test_only_missing_inputs_are_listed(workspace: Path) -> None:
    run_before(workspace, "preprocess")
    assert command_in(refusal("stage=train")) == ["-m", "stage=prepare,train"]
    run_before(workspace, "fetch", "prepare")
    (workspace / "model/fold0").mkdir(parents=True)
    (workspace / "model/fold0/recipe.json").touch()
    assert "model/fold1/recipe.json  from stage=train" in refusal("stage=evaluate")
    require_inputs(["evaluate"], parsed("fold.index=0"), [])


def test_inputs_written_by_the_chain_are_not_missing(workspace: Path) -> None:
    require_inputs(["fetch", "preprocess", "prepare", "train"], parsed(), [])
    text = refusal("-m", "stage=preprocess,train,evaluate", "mlflow=off")
    assert command_in(text) == ["-m", "stage=fetch,preprocess,prepare,train,evaluate", "mlflow=off"]


def test_before_a_sweep_the_missing_stages_run_once(workspace: Path) -> None:
    typed = ["-m", "stage=train", "fold.index=0,1", "seed=3", "hydra/launcher=joblib"]
    first, again = refusal(*typed).splitlines()[-1].split(" && ")
    assert first.strip() == "python -m prostate_seg -m stage=fetch,preprocess,prepare seed=3"
    assert again == shlex.join(["python", "-m", "prostate_seg", *typed])
    run_before(workspace, "preprocess")
    first, _ = refusal("-m", "+sweep=optuna", "stage=train").splitlines()[-1].split(" && ")
    assert first.strip() == "python -m prostate_seg stage=prepare"


def test_before_torchrun_the_missing_stages_run_in_one_process(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = "python -m prostate_seg -m stage=fetch,preprocess,prepare fold.index=0  # and then torchrun again"
    assert refusal("stage=train", "fold.index=0").splitlines()[-1].strip() == command


def test_suggested_command_keeps_from_params(workspace: Path) -> None:
    assert command_in(refusal("--config-name", "from_params", "stage=prepare"))[:2] == ["--config-name", "from_params"]


def test_prediction_without_a_model_suggests_how_to_get_one(workspace: Path) -> None:
    (workspace / "x").mkdir()
    for name in ("a (1).mha", "x, y.mha"):
        (workspace / name).touch()
        text = refusal("stage=predict", f"predict.input={name}")
        assert "add predict.model=models:/NAME@ALIAS" in text
        command = command_in(text)
        assert command[:2] == ["-m", "stage=fetch,preprocess,prepare,train,predict"]
        assert values_of(command[2]) == [name]
    command = command_in(refusal("stage=predict", "predict.input=x", "predict.model=models:/prostate_seg@champion"))
    assert command[1] == "stage=fetch,preprocess,prepare,train,evaluate,register,predict"
    assert command[-1] == "register.promote=true"


def test_data_that_fetch_cannot_provide_are_requested(workspace: Path) -> None:
    text = refusal("stage=train", "data=folder", "data.root=x (1)")
    assert text.startswith(
        "data.root: must be a folder with images/ and masks/, or of nnU-Net's or BIDS' layout; x (1) does not"
    )
    assert "stage=fetch" not in text
    (workspace / "data").mkdir()
    (workspace / "data/.tmp-1").touch()  # a fetch that was killed leaves no data
    assert "data is empty" in refusal("stage=preprocess", "data=folder", "data.root=data")
    (workspace / "data.dvc").touch()
    assert "bring it here with dvc pull" in refusal("stage=preprocess")


@pytest.mark.parametrize(
    ("typed", "key"),
    [
        (["stage=evaluate", "evaluate.external_root=absent"], "evaluate.external_root"),
        (["stage=prepare", "fold=picai", "fold.file=absent"], "fold.file"),
        (["stage=audit", "audit.splits=absent"], "audit.splits"),
        (["stage=predict", "predict.input=absent"], "predict.input"),
        (["stage=predict", "predict.input=.", "predict.model=absent"], "predict.model"),
    ],
)
def test_file_that_a_setting_names_must_exist(workspace: Path, typed: list[str], key: str) -> None:
    assert refusal(*typed) == f"{key}: there is no file or folder absent; check the path"


def test_prediction_without_input_is_a_bad_command(workspace: Path) -> None:
    assert refusal("stage=predict").startswith("predict.input: must name an image file")
    assert list(workspace.iterdir()) == []


@pytest.mark.parametrize("given", ["[12e4567,0012, ../a~b/c d]", "['12e4567','0012','../a~b/c d']"])
def test_runs_to_compare_stay_text_quoted_or_not(given: str) -> None:
    assert value_of(f"compare.runs={given}") == ["12e4567", "0012", "../a~b/c d"]


def test_stages_are_listed_within_the_width_of_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(
        ConfigError, match="  inspect     summarise a data set: sizes, spacings, gland volumes"
    ) as error:
        require_stage(None)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    write_error(str(error.value))
    listed = capsys.readouterr().err.splitlines()[:-1]
    assert max(len(line) for line in listed) <= 80
    assert sum(line.startswith(" " * 14) for line in listed) >= 10


def test_message_is_wrapped_at_a_terminal_and_its_command_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "  python -m prostate_seg -m stage=fetch,preprocess data.root=images"
    text = f"train.max_epochs: must be at least 1, is 0 and no number of epochs\n  {'case 1_1: ' * 6}\n{command}"
    write_error(text)
    assert capsys.readouterr().err == f"prostate_seg: {text}\n"
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    write_error(text)
    *lines, last = capsys.readouterr().err.splitlines()
    assert last == command
    assert max(map(len, lines)) <= 40
    assert "".join(lines).replace(" ", "") == f"prostate_seg:{text.removesuffix(command)}".replace(" ", "").replace(
        "\n", ""
    )


def test_log_continues_after_the_reader_of_the_console_has_left(capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        handler = ConsoleHandler(closed)
        for line in ("first", "second"):
            handler.handle(logging.makeLogRecord({"msg": line}))
        handler.stream = io.StringIO()
        handler.handle(logging.makeLogRecord({"msg": "%d", "args": ("no number",)}))
    assert capsys.readouterr().err.count("--- Logging error ---") == 1  # that of the last line
