"""Downloads: failures of servers are retried, incomplete files are not used, and received bytes are kept."""

import subprocess
import sys
from pathlib import Path

import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.data.public.download import (
    checksum_of,
    download,
    gigabytes,
    require_checksum,
    require_space,
)
from tests.conftest import ROOT
from tests.project_helpers import until
from tests.unreliable_server import UnreliableServer, unreliable_server

CONTENT = bytes(range(256)) * 2000
NUM_TRIES, FIRST_PAUSE_S = 3, 0.01


@pytest.fixture(autouse=True)
def hasty_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NUM_TRIES": NUM_TRIES, "FIRST_PAUSE_S": FIRST_PAUSE_S, "TIMEOUT_S": 0.3}.items():
        monkeypatch.setattr(f"prostate_seg.data.public.download.{name}", value)


def fetch(server: UnreliableServer, target: Path, *, path: str = "/a.zip") -> list[int]:
    """Download and return the numbers of received bytes that were reported."""
    received: list[int] = []
    download(f"{server.address}{path}", target, on_bytes=lambda have, total: received.append(have))
    return received


def test_a_file_is_downloaded_and_its_part_file_removed(tmp_path: Path) -> None:
    with unreliable_server({"/a.zip": CONTENT}) as server:
        received = fetch(server, tmp_path / "down" / "a.zip")
        assert (received[0], received[-1], received) == (0, len(CONTENT), sorted(received))
    assert (tmp_path / "down" / "a.zip").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "down").iterdir()] == ["a.zip"]


@pytest.mark.parametrize("trouble", ["break", "silence"])
def test_an_interrupted_transfer_resumes(tmp_path: Path, trouble: str) -> None:
    with unreliable_server({"/a.zip": CONTENT}, trouble, trouble) as server:
        fetch(server, tmp_path / "a.zip")
    half = len(CONTENT) // 2
    assert server.asked == [None, f"bytes={half}-", f"bytes={half + half // 2}-"]
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_a_busy_server_is_retried(tmp_path: Path) -> None:
    with unreliable_server({"/a.zip": CONTENT}, "503", "429") as server:
        fetch(server, tmp_path / "a.zip")
    assert len(server.asked) == 3
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_a_server_that_stays_busy_is_an_error_and_the_part_file_is_kept(tmp_path: Path) -> None:
    with unreliable_server({"/a.zip": CONTENT}, "break", *["503"] * 9) as server:
        with pytest.raises(InputError, match=r"a\.zip: given up after several tries: the server keeps answering 503\n"):
            fetch(server, tmp_path / "a.zip")
        assert len(server.asked) == 1 + NUM_TRIES
        server.troubles.clear()
        assert fetch(server, tmp_path / "a.zip")[0] == len(CONTENT) // 2
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("trouble", "words"), [("silence", "the connection timed out"), ("break", "the connection broke off")]
)
def test_a_server_that_sends_no_new_bytes_is_an_error(tmp_path: Path, trouble: str, words: str) -> None:
    with unreliable_server({"/a.zip": b"1"}, *[trouble] * 9) as server:
        with pytest.raises(InputError, match=words):
            fetch(server, tmp_path / "a.zip")
        assert len(server.asked) == NUM_TRIES
    assert not (tmp_path / "a.zip").exists()


def test_an_absent_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "b.zip.part").write_bytes(b"some")
    with unreliable_server({}) as server:
        with pytest.raises(
            InputError, match=r"answers 404 Not Found; the 0\.0 MB that are here are kept\nLook at the addr"
        ):
            fetch(server, tmp_path / "b.zip", path="/b.zip")
        assert len(server.asked) == 1
    assert (tmp_path / "b.zip.part").read_bytes() == b"some"


def test_without_range_support_the_download_restarts(tmp_path: Path) -> None:
    (tmp_path / "a.zip.part").write_bytes(CONTENT[:100])
    with unreliable_server({"/a.zip": CONTENT}, "no-ranges") as server:
        fetch(server, tmp_path / "a.zip")
        assert server.asked == ["bytes=100-"]
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_a_complete_part_file_becomes_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.zip.part").write_bytes(CONTENT)
    with unreliable_server({"/a.zip": CONTENT}) as server:
        fetch(server, tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_a_part_file_longer_than_the_file_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.zip.part").write_bytes(CONTENT + b"more")
    with unreliable_server({"/a.zip": CONTENT}) as server:
        fetch(server, tmp_path / "a.zip")
        assert server.asked == [f"bytes={len(CONTENT) + 4}-", None]
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_an_unreachable_server_is_reported_after_tries_with_doubling_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with unreliable_server({}) as server:
        address = server.address
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    with pytest.raises(InputError, match=f"{address}/a.zip: given up .*: the server cannot be reached\n.*HTTPS_PROXY"):
        download(f"{address}/a.zip", tmp_path / "a.zip", on_bytes=lambda *_: None)
    assert pauses == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S]


def test_a_password_in_an_address_is_not_shown(tmp_path: Path) -> None:
    with unreliable_server({}) as server, pytest.raises(InputError) as refused:
        address = server.address.replace("//", "//somebody:secret@")
        download(f"{address}/a.zip", tmp_path / "a.zip", on_bytes=lambda *_: None)
    assert f"{server.address}/a.zip: the server answers 404" in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_killed_download_resumes(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from prostate_seg.data.public.download import download\n"
        "download(sys.argv[1], Path(sys.argv[2]), on_bytes=lambda *_: None)"
    )
    with unreliable_server({"/a.zip": CONTENT}, "silence") as server:
        command = [sys.executable, "-c", program, f"{server.address}/a.zip", str(tmp_path / "a.zip")]
        process = subprocess.Popen(command, cwd=ROOT)
        part = tmp_path / "a.zip.part"
        until(lambda: part.is_file() and part.stat().st_size > 0, 60)
        process.kill()
        process.wait()
        have = part.stat().st_size
        assert fetch(server, tmp_path / "a.zip")[0] == have
        assert server.asked == [None, f"bytes={have}-"]
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_a_disk_that_is_too_small_is_reported_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prostate_seg.data.public.download.MARGIN_BYTES", 1 << 60)
    with (
        unreliable_server({"/a.zip": CONTENT}) as server,
        pytest.raises(InputError, match=r"needs 0\.5 MB and .* to spare.*free\nMake room.*: paths\.cache=DIR"),
    ):
        fetch(server, tmp_path / "a.zip")
    assert list(tmp_path.iterdir()) == []


def test_free_space_is_checked_for_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1, purpose="x", setting="paths.root")


def test_another_checksum_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert checksum_of(path, "md5") == "md5:900150983cd24fb0d6963f7d28e17f72"
    right = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    require_checksum(path, right)
    path.write_bytes(b"abd")
    with pytest.raises(InputError, match=f"must have {right}, has sha256:a52d"):
        require_checksum(path, right)


def test_sizes_are_formatted_with_units() -> None:
    assert [gigabytes(size) for size in (0, 5_400_000_000, 229_000_000, 35_000_000)] == [
        "0.0 MB",
        "5.4 GB",
        "0.2 GB",
        "35.0 MB",
    ]
