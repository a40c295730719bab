"""Hashes are those that DVC writes."""

import os
from pathlib import Path

import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.provenance import hashing
from prostate_seg.provenance.hashing import hash_paths
from tests.project_helpers import dvc_md5


@pytest.fixture
def paths(tmp_path: Path) -> Path:
    folder = tmp_path / "paths"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "a.txt").write_text("a\r\nb\n")
    (folder / "empty").write_bytes(b"")
    (folder / "deep" / "b.bin").write_bytes(bytes(range(256)) * 9000)
    (folder / "deep" / "er" / "ümlaut name.csv").write_text("x,y\n")
    (folder / ".hidden").write_text("h")
    (folder / "link.txt").symlink_to(folder / "a.txt")
    return folder


@pytest.mark.slow
def test_hashes_equal_those_of_dvc_add(paths: Path, tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    alone = tmp_path / "alone.bin"
    alone.write_bytes(os.urandom(3_000_000))
    theirs = dvc_md5(tmp_path / "repository", paths, alone)
    ours = hash_paths([paths, alone], cache=tmp_path / "cache")
    assert {path.name: hashed.md5 for path, hashed in ours.items()} == theirs


def test_listing_names_every_file_with_its_md5(paths: Path, tmp_path: Path) -> None:
    hashed = hash_paths([paths], cache=tmp_path / "cache")[paths]
    assert set(hashed.files) == {
        ".hidden", "a.txt", "deep/b.bin", "deep/er/ümlaut name.csv", "empty", "link.txt",
    }  # fmt: skip
    assert hashed.files["empty"] == "d41d8cd98f00b204e9800998ecf8427e"
    assert hashed.md5.endswith(".dir")


def test_unchanged_file_is_not_read_again(paths: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hash_paths([paths], cache=tmp_path / "cache")
    monkeypatch.setattr(hashing, "_hash_file", lambda path, info: pytest.fail(f"read {path}"))
    assert hash_paths([paths], cache=tmp_path / "cache") == before


def test_changed_file_is_read_again_and_changes_its_folder(paths: Path, tmp_path: Path) -> None:
    before = hash_paths([paths], cache=tmp_path / "cache")[paths]
    (paths / "a.txt").write_text("a\r\nc\n")
    os.utime(paths / "a.txt", (1, 1))
    after = hash_paths([paths], cache=tmp_path / "cache")[paths]
    assert after.md5 != before.md5
    assert {name for name in after.files if after.files[name] != before.files[name]} == {"a.txt", "link.txt"}


def test_absent_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent.csv: cannot be hashed"):
        hash_paths([tmp_path / "absent.csv"], cache=tmp_path / "cache")
