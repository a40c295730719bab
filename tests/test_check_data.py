"""The first stage of dvc.yaml suggests the command that provides data, and succeeds once they exist."""

from pathlib import Path

import pytest

from prostate_seg import check_data
from prostate_seg.config.schema import parse, science_of
from prostate_seg.stages.export import params_text
from tests.conftest import composed


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone without data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (tmp_path / "params.yaml").write_text(params_text(science_of(parse(composed())), command="x"))
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    with pytest.raises(SystemExit) as left:
        check_data.main()
    assert left.value.code == code
    return capsys.readouterr().err


def test_command_that_provides_data_is_suggested_until_they_exist(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "  python -m prostate_seg --config-name from_params stage=fetch\n" in refusal(capsys)
    assert not check_data.CHECKED.exists()
    (folder / "data" / "images").mkdir(parents=True)
    check_data.main()
    assert check_data.CHECKED.is_file()


def test_data_that_dvc_tracks_are_pulled_or_added(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(folder.parent))
    assert "dvc add data && git add data.dvc" in refusal(capsys)
    monkeypatch.setenv("DVC_ROOT", str(folder))
    (folder / "data.dvc").touch()
    assert "bring it here with dvc pull" in refusal(capsys)


def test_own_data_are_requested_and_absent_settings_are_reported(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = params_text(science_of(parse(composed("data=folder", "data.root=null"))), command="x")
    (folder / "params.yaml").write_text(own)
    text = refusal(capsys)
    assert "Give the folder of your data" in text
    assert "stage=fetch" not in text
    (folder / "params.yaml").unlink()
    assert "params.yaml is absent in this folder: write it with stage=export" in refusal(capsys, code=2)
