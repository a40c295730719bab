"""Command line: messages, exit codes, imports and files."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from prostate_seg.stages import STAGES
from tests.conftest import ROOT, Launch
from tests.project_helpers import wait_for

HEAVY = ("torch", "monai", "SimpleITK", "sklearn", "scipy", "pandas", "matplotlib", "numpy", "mlflow", "dvc", "optuna")


def test_command_without_a_stage_lists_the_stages(launch: Launch) -> None:
    result = launch()
    assert result.returncode == 2
    for name, sentence in STAGES.items():
        assert f"{name:<11} {sentence}" in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_stage_suggests_the_nearest_and_lists_the_stages(launch: Launch) -> None:
    result = launch("stage=trian")
    assert result.returncode == 2
    assert "stage: unknown stage 'trian'; did you mean train?" in result.stderr
    assert "evaluate" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage=train", "+train.epochz=3"], "train.epochz: unknown key; did you mean train.max_epochs?"),
        (["stage=train", "train.epochs=3"], "train.epochs: unknown key; did you mean train.max_epochs?"),
        (["stage=train", "modl=unet"], "modl: unknown key; did you mean model?"),
        (
            ["stage=train", "model=unett"],
            "model: no option 'unett'; known are attention_unet, dynunet, resunet_a, segresnet, unet, unet3d; "
            "did you mean model=unet?",
        ),
        (["stage=train", "train.max_epochs=many"], "train.max_epochs: must be a whole number, is many"),
        (["stage=train", "train.max_epochs=0"], "train.max_epochs: must be from 1 to 100000, is 0"),
        (["stage=train", "model=3"], "model: no option '3'; known are attention_unet"),
        (["stage=train", "seed=["], "no viable alternative at input '['"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["-m", "stage=export", "train.max_epochs=0,1"], "train.max_epochs: must be from 1 to 100000, is 0"),
    ],
)
def test_bad_command_or_config_exits_with_2_and_no_traceback(
    launch: Launch, arguments: list[str], message: str
) -> None:
    result = launch(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_refused_input_exits_with_1_and_no_traceback(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "empty" / "images").mkdir(parents=True)
    result = launch("stage=preprocess", "data=folder", "data.root=empty", "mlflow=off")
    assert result.returncode == 1
    assert result.stderr.startswith("prostate_seg: there is no ")  # without a line of Hydra before it
    assert "empty" in result.stderr
    assert "Traceback" not in result.stderr
    assert "preprocess FAILED" in result.stdout


def test_phantom_with_glands_beyond_the_field_of_view_is_refused(launch: Launch) -> None:
    result = launch("stage=fetch", "data.phantom.field_of_view_mm=80")
    assert result.returncode == 2
    assert "data.phantom.field_of_view_mm: must be from 98 to 400 for glands of up to 90 mL, is 80.0" in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(launch: Launch) -> None:
    result = launch("stage=preprocess", "data=folder", "data.root=absent", PROSTATE_SEG_DEBUG="1")
    assert "data.root: must be a folder" in result.stderr
    assert result.returncode == 1
    assert "Traceback" in result.stderr


@pytest.mark.parametrize("arguments", [["stage=train", "seed=7"], ["-m", "stage=train", "fold.index=0,1"]])
def test_stage_without_its_input_suggests_one_command_and_writes_nothing(tmp_path: Path, arguments: list[str]) -> None:
    result = run_and_list_imports(tmp_path, arguments)
    assert result.returncode == 1
    assert "python -m prostate_seg -m stage=fetch,preprocess,prepare" in result.stderr
    assert result.stderr.startswith("prostate_seg: stage=train needs files that do not exist yet:\n")
    assert result.stdout.rstrip().endswith("HEAVY []")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"]])
def test_help_and_config_import_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    result = run_and_list_imports(tmp_path, arguments)
    assert result.returncode == 0
    assert result.stdout.rstrip().endswith("HEAVY []")
    assert list(tmp_path.iterdir()) == []


def run_and_list_imports(folder: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the launcher in a folder; the last printed line lists the heavy libraries that it imported."""
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('HEAVY', [n for n in {HEAVY!r} if n in sys.modules]))\n"
        f"sys.argv = ['prostate_seg', *{arguments!r}]\n"
        "from prostate_seg.__main__ import main\n"
        "main()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


def test_target_that_is_not_on_the_allow_list_is_refused(launch: Launch) -> None:
    result = launch("stage=train", "+hydra.callbacks.x._target_=os.system", "+hydra.callbacks.x.command=touch owned")
    assert result.returncode == 2
    assert "os.system" in result.stderr
    assert "Traceback" not in result.stderr


def test_chain_stops_at_the_first_failure(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "empty" / "images").mkdir(parents=True)
    result = launch("-m", "stage=preprocess,prepare", "data=folder", "data.root=empty", "mlflow=off")
    assert result.returncode == 1
    assert result.stderr.startswith("prostate_seg: there is no ")
    assert "preprocess FAILED" in result.stdout
    assert "prepare F" not in result.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_stage_exits_with_its_code_and_leaves_no_partial_data(
    tmp_path: Path, number: int, code: int
) -> None:
    command = [sys.executable, "-m", "prostate_seg", "stage=fetch", "data.phantom.num_patients=500"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ignored below a background job of a shell
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=default
    )
    wait_for(tmp_path / "data")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "fetch KILLED" in out
    assert "Traceback" not in err
    assert list((tmp_path / "data").iterdir()) == []


def test_every_run_writes_its_config_and_log(launch: Launch, tmp_path: Path) -> None:
    launch("stage=export", "seed=77")
    (config,) = tmp_path.glob("logs/*/*/.hydra/config.yaml")
    assert "seed: 77" in config.read_text()
    assert (config.parents[1] / "prostate_seg.log").is_file()
