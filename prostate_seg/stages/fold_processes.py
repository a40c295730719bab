"""Train several folds side by side: each in a process of its own, with its share of the processor's threads and one GPU.

The parent assigns the GPUs and keeps the records of the folds; a process sends metrics and log records over a pipe.
"""

import logging
import multiprocessing
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path

import torch

from prostate_seg.common.errors import InputError
from prostate_seg.common.progress import num_cores
from prostate_seg.common.signals import submit_all
from prostate_seg.config.workspace import FoldRecord, OpenFold

log = logging.getLogger(__name__)

TrainFold = Callable[[int, FoldRecord], None]

SECONDS_BETWEEN_LOOKS = 0.2
"""How soon a fold that need not go on is stopped."""


class GpuPool:
    """The GPUs that folds share: each fold gets the one on which the fewest folds train."""

    def __init__(self, gpus: Sequence[int]) -> None:
        """Take the CUDA indices of the GPUs, as torch counts them; none where folds train on the CPU."""
        self._num_folds = Counter(dict.fromkeys(gpus, 0))
        self._lock = threading.Lock()

    @contextmanager
    def assign(self) -> Iterator[int | None]:
        """Reserve a GPU until the block ends, however it ends; None without GPUs."""
        with self._lock:
            gpu = min(self._num_folds, key=self._num_folds.__getitem__, default=None)
            if gpu is not None:
                self._num_folds[gpu] += 1
        try:
            yield gpu
        finally:
            if gpu is not None:
                with self._lock:
                    self._num_folds[gpu] -= 1


def train_side_by_side(
    train_fold: TrainFold, indices: Sequence[int], *, num_parallel: int, open_fold: OpenFold, gpus: Sequence[int] = ()
) -> None:
    """Train folds in processes, so many at once; the first that fails stops the others.

    Args:
        train_fold: Called in the fold's process with its index and its record; can be pickled.
        indices: The folds.
        num_parallel: Processes at once; each has that part of the cores.
        open_fold: Starts the record of a fold, here.
        gpus: CUDA indices of the GPUs to train on. A fold gets a free one, or shares the one with the fewest folds.

    Raises:
        InputError: If a process ends without a word, or with what it raises itself.
    """
    stop, pool_of_gpus = threading.Event(), GpuPool(gpus)
    context = multiprocessing.get_context("spawn")

    def watch(index: int) -> None:
        if stop.is_set():
            return
        try:
            with open_fold(index) as record, pool_of_gpus.assign() as gpu:
                _train_in_process(context, train_fold, index, record, num_parallel=num_parallel, gpu=gpu, stop=stop)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(num_parallel) as pool:
        try:
            for future in as_completed(submit_all(pool, watch, indices)):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _train_in_process(
    context: SpawnContext,
    train_fold: TrainFold,
    index: int,
    record: FoldRecord,
    *,
    num_parallel: int,
    gpu: int | None,
    stop: threading.Event,
) -> None:
    """Start the process of a fold and follow it; the process has ended when this returns."""
    ours, theirs = context.Pipe(duplex=False)
    arguments = (theirs, train_fold, index, num_parallel, gpu)
    process = context.Process(target=_work, args=arguments, daemon=True, name=f"fold{index}")
    process.start()
    theirs.close()  # so that the pipe ends with the process
    try:
        _follow(process, ours, record, index=index, stop=stop)
    finally:
        process.terminate()
        process.join()


def _follow(process: SpawnProcess, pipe: Connection, record: FoldRecord, *, index: int, stop: threading.Event) -> None:
    """Hand on what a process says until it has said that it is done."""
    while not stop.is_set():
        if not pipe.poll(SECONDS_BETWEEN_LOOKS):
            continue
        try:
            kind, *content = pipe.recv()
        except EOFError:
            process.join()
            raise InputError(
                f"fold {index}: its process ended without a word (exit code {process.exitcode}), as when memory is short\n"
                "Give the same command again: it goes on after the last complete epoch. "
                "A smaller machine.num_parallel_folds needs less memory."
            ) from None
        match kind:
            case "log":
                logging.getLogger(content[0].name).handle(content[0])
            case "epoch":
                record.on_epoch_end(*content)
            case "finish":
                record.finish(*content)
            case "error":
                error, text = content
                raise error from _TracebackOfProcess(text)
            case "done":
                return
    raise KeyboardInterrupt  # another fold has failed, or the stage was stopped: this fold was killed


class _TracebackOfProcess(Exception):  # noqa: N818 - only shows where the error came from
    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Sender:
    """The record of a fold, in its process."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.pipe.send(("epoch", epoch, dict(metrics)))

    def finish(self, metrics: Mapping[str, float], figures: Sequence[Path]) -> None:
        self.pipe.send(("finish", dict(metrics), list(figures)))


class _LogSender(logging.Handler):
    """Sends what is logged; a parent that is gone ends the process with its next line."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__()
        self.pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args = record.getMessage(), None  # an argument may not be picklable
        self.pipe.send(("log", record))


def _work(pipe: Connection, train_fold: TrainFold, index: int, num_parallel: int, gpu: int | None) -> None:
    """Be the process of a fold."""
    for name in (
        "SIGINT",
        "SIGUSR1",
        "SIGUSR2",
    ):  # Ctrl-C and Slurm's signals, which Windows lacks, reach the whole group
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)  # the parent ends its processes itself
    logging.basicConfig(level=logging.INFO, handlers=[_LogSender(pipe)])
    torch.set_num_threads(max(1, num_cores() // num_parallel))
    try:
        if gpu is not None:
            torch.cuda.set_device(gpu)
        train_fold(index, _Sender(pipe))
        pipe.send(("done",))
    except BrokenPipeError:
        return  # the parent was killed: the next command goes on after the last complete epoch
    except Exception as error:
        text = traceback.format_exc()
        with suppress(BrokenPipeError):
            pipe.send(("error", error if isinstance(error, InputError | OSError) else RuntimeError(repr(error)), text))
