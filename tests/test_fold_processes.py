"""Metrics and log records of fold processes arrive in this process; the first fold that fails stops the others."""

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from prostate_seg.common.errors import InputError
from prostate_seg.common.progress import num_cores
from prostate_seg.config.workspace import FoldRecord
from prostate_seg.segmentation.devices import available_gpus
from prostate_seg.steps import fold_processes
from prostate_seg.steps.fold_processes import train_in_parallel

log = logging.getLogger(__name__)


class Records:
    """Events of each fold, and how it ended."""

    def __init__(self) -> None:
        self.events: dict[int, list[object]] = {}
        self.ended: dict[int, str] = {}

    @contextmanager
    def open_fold(self, index: int) -> Iterator["Record"]:
        self.events[index] = []
        try:
            yield Record(self.events[index])
            self.ended[index] = "finished"
        except BaseException as error:
            self.ended[index] = type(error).__name__
            raise


class Record:
    def __init__(self, events: list[object]) -> None:
        self.events = events

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.events.append((epoch, dict(metrics)))

    def finish(self, metrics: Mapping[str, float], figures: Sequence[Path]) -> None:
        self.events.append((dict(metrics), list(figures)))


def send_events(index: int, record: FoldRecord) -> None:
    try:
        raise KeyError(index)
    except KeyError:
        log.info("fold %d has %d threads", index, torch.get_num_threads(), exc_info=True)
    for epoch in (1, 2):
        record.on_epoch_end(epoch, {"val/dice": index + epoch / 10})
    record.finish({"process": os.getpid()}, [Path(f"fold{index}.png")])


def fail_in_fold_1(folder: Path, kind: str, index: int, record: FoldRecord) -> None:
    record.on_epoch_end(1, {})
    if index != 1:
        time.sleep(60)
        (folder / "reached").touch()
    while len(list(folder.iterdir())) < 1:  # until the other fold runs too
        time.sleep(0.05)
    if kind == "refuse":
        raise InputError("case c: the loss is nan")
    if kind == "defect":
        raise KeyError("c")
    os._exit(7)


def test_records_and_logs_of_all_folds_arrive_in_order(caplog: pytest.LogCaptureFixture) -> None:
    records = Records()
    with caplog.at_level(logging.INFO):
        train_in_parallel(send_events, [0, 1, 2], num_parallel=2, open_fold=records.open_fold)
    processes = set()
    for index in range(3):
        first, second, (final, figures) = records.events[index]  # type: ignore[misc]
        assert (first, second) == ((1, {"val/dice": index + 0.1}), (2, {"val/dice": index + 0.2}))
        assert figures == [Path(f"fold{index}.png")]
        processes.add(final["process"])
    assert len(processes) == 3
    assert os.getpid() not in processes
    assert set(records.ended.values()) == {"finished"}
    share = max(1, num_cores() // 2)
    texts = [record.getMessage() for record in caplog.records]
    for index in range(3):
        (text,) = (text for text in texts if text.startswith(f"fold {index} has {share} threads\nTraceback"))
        assert text.endswith(f"KeyError: {index}")


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("refuse", InputError, "case c: the loss is nan"),
        ("defect", RuntimeError, "KeyError('c')"),
        ("vanish", InputError, "fold 1: its process ended unexpectedly (exit code 7)"),
    ],
)
def test_first_fold_that_fails_stops_the_others(tmp_path: Path, kind: str, error: type[Exception], text: str) -> None:
    records = Records()

    @contextmanager
    def open_fold(index: int) -> Iterator[Record]:
        with records.open_fold(index) as record:
            if index == 0:
                (tmp_path / "open").touch()
            yield record

    with pytest.raises(error) as caught:
        train_in_parallel(partial(fail_in_fold_1, tmp_path, kind), [0, 1, 2], num_parallel=2, open_fold=open_fold)
    assert text in str(caught.value)
    if kind != "vanish":
        assert "fail_in_fold_1" in caught.value.__notes__[0]  # the original traceback
    assert records.ended == {0: "KeyboardInterrupt", 1: error.__name__}
    assert not (tmp_path / "reached").exists()


class FakeTraining:
    """Folds that train until the test ends them, instead of processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, num_parallel: int, gpus: Sequence[int], num_folds: int):
        self.gpu_of: dict[int, int | None] = {}
        self.running: set[int] = set()
        self._ends = {index: threading.Event() for index in range(num_folds)}
        monkeypatch.setattr(fold_processes, "_train_in_process", self._train)
        self._thread = threading.Thread(
            target=self._start, args=(num_parallel, gpus, Records().open_fold), name="stage", daemon=True
        )
        self._thread.start()

    def _start(self, num_parallel: int, gpus: Sequence[int], open_fold: object) -> None:
        with suppress(InputError):
            train_in_parallel(
                send_events,
                list(self._ends),
                num_parallel=num_parallel,
                open_fold=open_fold,
                gpus=gpus,  # type: ignore[arg-type]
            )

    def _train(self, run: partial[None], index: int, *_: object) -> None:
        self.gpu_of[index] = run.keywords["gpu"]
        self.running.add(index)
        assert self._ends[index].wait(10)
        self.running.discard(index)

    def wait_until_running(self, *indices: int) -> None:
        deadline = time.monotonic() + 10
        while self.running != set(indices):
            assert time.monotonic() < deadline, self.running
            time.sleep(0.002)

    def end(self, *indices: int) -> None:
        for index in indices:
            self._ends[index].set()

    def end_all(self) -> None:
        self.end(*self._ends)
        self._thread.join(10)
        assert not self._thread.is_alive()


def test_next_fold_uses_the_gpu_of_a_finished_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    folds = FakeTraining(monkeypatch, num_parallel=2, gpus=[0, 1], num_folds=4)
    folds.wait_until_running(0, 1)
    folds.end(1)  # before fold 0
    folds.wait_until_running(0, 2)
    folds.end(2)
    folds.wait_until_running(0, 3)
    folds.end_all()
    assert {folds.gpu_of[0], folds.gpu_of[1]} == {0, 1}
    assert folds.gpu_of[2] == folds.gpu_of[3] == folds.gpu_of[1]


def test_more_folds_than_gpus_share_them_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    folds = FakeTraining(monkeypatch, num_parallel=5, gpus=[0, 1], num_folds=7)
    folds.wait_until_running(0, 1, 2, 3, 4)
    on = {gpu: [index for index, one in folds.gpu_of.items() if one == gpu] for gpu in (0, 1)}
    assert sorted(map(len, on.values())) == [2, 3]
    fewer = min(on, key=lambda gpu: len(on[gpu]))
    ended = on[fewer]
    folds.end(ended[0])
    folds.wait_until_running(*({0, 1, 2, 3, 4, 5} - {ended[0]}))
    assert folds.gpu_of[5] == fewer
    folds.end(ended[1], 5)
    folds.wait_until_running(*on[1 - fewer], 6)
    assert folds.gpu_of[6] == fewer  # no fold left
    folds.end_all()


def test_folds_on_the_cpu_get_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    folds = FakeTraining(monkeypatch, num_parallel=2, gpus=[], num_folds=2)
    folds.wait_until_running(0, 1)
    folds.end_all()
    assert folds.gpu_of == {0: None, 1: None}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert list(available_gpus("cpu")) == []
    assert list(available_gpus("auto")) == list(available_gpus("cuda")) == [0, 1, 2, 3]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(available_gpus("auto")) == []
    with pytest.raises(InputError, match="machine.device=cuda"):
        available_gpus("cuda")
