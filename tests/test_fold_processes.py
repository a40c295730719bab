"""What a fold says in its process reaches its record here; the first that fails stops the others."""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from prostate_seg.errors import InputError
from prostate_seg.progress import num_cores
from prostate_seg.stages.fold_processes import train_side_by_side
from prostate_seg.workspace import FoldRecord

log = logging.getLogger(__name__)


class Records:
    """What each fold was told, and how it ended."""

    def __init__(self) -> None:
        self.told: dict[int, list[object]] = {}
        self.ended: dict[int, str] = {}

    @contextmanager
    def open_fold(self, index: int) -> Iterator["Record"]:
        self.told[index] = []
        try:
            yield Record(self.told[index])
            self.ended[index] = "finished"
        except BaseException as error:
            self.ended[index] = type(error).__name__
            raise


class Record:
    def __init__(self, told: list[object]) -> None:
        self.told = told

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.told.append((epoch, dict(metrics)))

    def finish(self, metrics: Mapping[str, float], figures: Sequence[Path]) -> None:
        self.told.append((dict(metrics), list(figures)))


def speak(index: int, record: FoldRecord) -> None:
    log.info("fold %d has %d threads", index, torch.get_num_threads())
    for epoch in (1, 2):
        record.on_epoch_end(epoch, {"val/dice": index + epoch / 10})
    record.finish({"process": os.getpid()}, [Path(f"fold{index}.png")])


def fail_in_fold_1(folder: Path, kind: str, index: int, record: FoldRecord) -> None:
    record.on_epoch_end(1, {})
    if index != 1:
        time.sleep(60)
        (folder / "reached").touch()
    while len(list(folder.iterdir())) < 1:  # until the other fold is on its way too
        time.sleep(0.05)
    if kind == "refuse":
        raise InputError("case c: the loss is nan")
    if kind == "defect":
        raise KeyError("c")
    os._exit(7)


def test_records_and_logs_of_all_folds_arrive_in_order(caplog: pytest.LogCaptureFixture) -> None:
    records = Records()
    with caplog.at_level(logging.INFO):
        train_side_by_side(speak, [0, 1, 2], num_parallel=2, open_fold=records.open_fold)
    processes = set()
    for index in range(3):
        first, second, (final, figures) = records.told[index]  # type: ignore[misc]
        assert (first, second) == ((1, {"val/dice": index + 0.1}), (2, {"val/dice": index + 0.2}))
        assert figures == [Path(f"fold{index}.png")]
        processes.add(final["process"])
    assert len(processes) == 3
    assert os.getpid() not in processes
    assert set(records.ended.values()) == {"finished"}
    share = max(1, num_cores() // 2)
    assert {f"fold {index} has {share} threads" for index in range(3)} <= {r.getMessage() for r in caplog.records}


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("refuse", InputError, "case c: the loss is nan"),
        ("defect", RuntimeError, "KeyError('c')"),
        ("vanish", InputError, "fold 1: its process ended without a word (exit code 7)"),
    ],
)
def test_first_fold_that_fails_stops_the_others(tmp_path: Path, kind: str, error: type[Exception], text: str) -> None:
    records, start = Records(), time.monotonic()

    @contextmanager
    def open_fold(index: int) -> Iterator[Record]:
        with records.open_fold(index) as record:
            if index == 0:
                (tmp_path / "open").touch()
            yield record

    with pytest.raises(error) as caught:
        train_side_by_side(partial(fail_in_fold_1, tmp_path, kind), [0, 1, 2], num_parallel=2, open_fold=open_fold)
    assert text in str(caught.value)
    if kind != "vanish":
        assert "fail_in_fold_1" in str(caught.value.__cause__)  # where it was raised
    assert time.monotonic() - start < 50
    assert records.ended == {0: "KeyboardInterrupt", 1: error.__name__}
    assert not (tmp_path / "reached").exists()
