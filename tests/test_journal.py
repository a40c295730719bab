"""What is put into the spool is there as whole lines, in order, whatever happens to disk or process."""

import errno
import json
import multiprocessing
from io import FileIO
from pathlib import Path

import pytest
from filelock import Timeout

from prostate_seg.common.errors import InputError
from prostate_seg.tracking import journal as module
from prostate_seg.tracking.journal import Header, Spool, plain, read_lines, remove_delivered, waiting

HEADER = Header(what="train of p", address="http://store", experiment="e", workspace="/w", cache="/w/.cache")


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool.create(tmp_path, HEADER, name="train")


def numbers(spool: Spool) -> list[int]:
    return [record["n"] for _, record in spool.records()]


def test_folder_comes_back_as_it_was_left(spool: Spool) -> None:
    for n in range(3):
        assert spool.put({"do": "log", "n": n}) == n + 1
    spool.note(1, ids={"local-a": "b"})
    spool.note(2, refused="no")
    spool.release()
    again = Spool(spool.folder)
    assert again.header == HEADER
    assert numbers(again) == [0, 1, 2]
    assert (again.num_records, again.num_delivered, again.num_refused) == (3, 2, 1)
    assert again.ids == {"local-a": "b"}


def test_every_line_is_json_that_people_can_read(spool: Spool) -> None:
    spool.put({"do": "log", "tags": {"name": "Größe"}, "metrics": [["loss", plain(float("nan")), 1, 1]]})
    lines = (spool.folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    assert "Größe" in lines[1]
    assert all(json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert [float(plain(value)) for value in (0.5, float("inf"))] == [0.5, float("inf")]


def test_line_that_a_crash_has_cut_off_is_dropped_and_the_next_one_is_whole(spool: Spool) -> None:
    spool.put({"n": 0})
    spool.release()
    with (spool.folder / "records.jsonl").open("a") as stream:
        stream.write('{"n": 1, "metr')
    again = Spool(spool.folder)
    again.put({"n": 2})
    assert numbers(again) == [0, 2]


def test_full_disk_leaves_whole_lines_and_loses_none_once_there_is_room(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool.put({"n": 0})
    write = module._write_some

    def full(file: FileIO, data: memoryview) -> int:
        if len(data) < 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[: len(data) // 2])  # half of it still fits

    with monkeypatch.context() as disk:
        disk.setattr(module, "_write_some", full)
        spool.put({"n": 1})
        spool.put({"n": 2})
        assert spool.flush() is False
        assert numbers(spool) == [0]
    assert spool.flush() is True
    assert numbers(spool) == [0, 1, 2]


def put_for_ever(folder: str, ready: "multiprocessing.synchronize.Event") -> None:
    spool = Spool(Path(folder), wait_seconds=10)
    for n in range(10**9):
        spool.put({"n": n, "text": "x" * 500})
        if n == 200:
            ready.set()


def test_killed_process_leaves_whole_records_and_lets_go(spool: Spool) -> None:
    spool.release()
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=put_for_ever, args=(str(spool.folder), ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(Timeout):
        Spool(spool.folder)
    assert [found.is_held for found in waiting(spool.folder.parent)] == [True]
    process.kill()
    process.join(10)
    again = Spool(spool.folder)
    assert numbers(again) == list(range(again.num_records))
    assert again.num_records > 200


def test_folder_of_which_all_is_delivered_does_not_wait_and_is_removed(spool: Spool) -> None:
    root = spool.folder.parent
    spool.put({"n": 0})
    assert [found.num_records for found in waiting(root)] == [1]
    spool.note(1)
    assert waiting(root) == []
    remove_delivered(root)
    assert spool.folder.is_dir()  # its process still runs
    spool.release()
    remove_delivered(root)
    assert not spool.folder.exists()


def test_folder_that_has_only_begun_is_not_removed(spool: Spool) -> None:
    spool.release()
    remove_delivered(spool.folder.parent)
    assert spool.folder.is_dir()


@pytest.mark.parametrize(
    "text", ["", "notes\n", '{"format": 2, "what": "x"}\n', '{"format": 1, "surprise": "x"}\n', "[]\n"]
)
def test_folder_that_is_no_spool_is_refused_in_words(tmp_path: Path, text: str) -> None:
    (tmp_path / "records.jsonl").write_text(text)
    with pytest.raises(InputError, match="records.jsonl: is not what a stage writes; move the folder away"):
        Spool(tmp_path)


def test_spool_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file cannot be written: .*\n.*paths.spool"):
        Spool.create(tmp_path / "file", HEADER, name="train")


def test_lines_of_an_absent_file_are_none(tmp_path: Path) -> None:
    assert list(read_lines(tmp_path / "absent")) == []
