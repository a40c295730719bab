"""Parallel training of folds: one process per fold, with its share of the CPU threads and one GPU.

The parent process assigns the GPUs and keeps the records of the folds; a fold's process sends metrics and log records by pipe.
"""

import logging
import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

import torch

from prostate_seg.common.errors import InputError
from prostate_seg.common.progress import num_cores
from prostate_seg.common.signals import submit_all
from prostate_seg.config.workspace import FoldRecord, OpenFold

log = logging.getLogger(__name__)

TrainFold = Callable[[int, FoldRecord], None]

POLL_SECONDS = 0.2
"""Delay after which a fold stops once another fold has failed."""


def train_in_parallel(
    train_fold: TrainFold, indices: Sequence[int], *, num_parallel: int, open_fold: OpenFold, gpus: Sequence[int] = ()
) -> None:
    """Train folds in processes of their own; the first that fails stops the others, and its error is raised.

    `train_fold` must be picklable: it is called in the fold's process, one of `num_parallel` that share the cores. Each fold
    gets a free one of the `gpus` (CUDA indices), or shares one when there are fewer. `open_fold` is called in this process.
    """
    stop = threading.Event()
    free_gpus: SimpleQueue[int | None] = SimpleQueue()  # one entry per process, so that they share the GPUs evenly
    for number in range(num_parallel):
        free_gpus.put(gpus[number % len(gpus)] if gpus else None)

    def supervise(index: int) -> None:
        if stop.is_set():
            return
        gpu = free_gpus.get()
        try:
            with open_fold(index) as record:
                run = partial(_run_fold, train_fold, index, num_parallel=num_parallel, gpu=gpu)
                _train_in_process(run, index, record, stop)
        except BaseException:
            stop.set()
            raise
        finally:
            free_gpus.put(gpu)

    with ThreadPoolExecutor(num_parallel) as pool:
        try:
            for future in as_completed(submit_all(pool, supervise, indices)):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _train_in_process(run: Callable[[Connection], None], index: int, record: FoldRecord, stop: threading.Event) -> None:
    """Start the process of a fold and forward its messages to the record; the process has ended when this returns."""
    context = multiprocessing.get_context("spawn")  # fork is unsafe with the threads of torch and CUDA
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(sender,), daemon=True, name=f"fold{index}")
    process.start()
    sender.close()  # so that the pipe closes when the process ends
    try:
        while not stop.is_set():
            if not receiver.poll(POLL_SECONDS):
                continue
            match receiver.recv():
                case "log", log_record:
                    logging.getLogger(log_record.name).handle(log_record)
                case "epoch", epoch, metrics:
                    record.on_epoch_end(epoch, metrics)
                case "finish", metrics, figures:
                    record.finish(metrics, figures)
                case "error", error, text:
                    error.add_note(f"In the fold's process:\n{text}")
                    raise error
                case _:  # done
                    return
        raise KeyboardInterrupt  # another fold has failed, or the stage was stopped: the record ends as killed
    except EOFError:
        process.join()
        raise InputError(
            f"fold {index}: its process ended unexpectedly (exit code {process.exitcode}), as when memory is short\n"
            "Give the same command again: it goes on after the last complete epoch. "
            "A smaller machine.num_parallel_folds needs less memory."
        ) from None
    finally:
        process.terminate()
        process.join()


@dataclass(frozen=True)
class _PipeRecord(FoldRecord):
    """The record of a fold in its process, which sends everything to the parent."""

    pipe: Connection

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.pipe.send(("epoch", epoch, dict(metrics)))

    def finish(self, metrics: Mapping[str, float], figures: Sequence[Path]) -> None:
        self.pipe.send(("finish", dict(metrics), list(figures)))


class _PipeHandler(logging.Handler):
    """Sends log records to the parent; when the parent is gone, the next one ends the process."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__()
        self.pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        record.msg = self.format(record)  # arguments and a traceback may not be picklable
        record.args = record.exc_info = record.exc_text = record.stack_info = None
        self.pipe.send(("log", record))


def _run_fold(train_fold: TrainFold, index: int, pipe: Connection, *, num_parallel: int, gpu: int | None) -> None:
    """Run the process of a fold."""
    # Ctrl-C and Slurm's signals reach the whole process group, and the parent ends its processes itself. Windows has no SIGUSR.
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_PipeHandler(pipe)])
    torch.set_num_threads(max(1, num_cores() // num_parallel))
    try:
        if gpu is not None:
            torch.cuda.set_device(gpu)
        train_fold(index, _PipeRecord(pipe))
        pipe.send(("done",))
    except BrokenPipeError:
        return  # the parent was killed: the next command goes on after the last complete epoch
    except Exception as error:
        text = traceback.format_exc()
        with suppress(BrokenPipeError):
            pipe.send(("error", error if isinstance(error, InputError | OSError) else RuntimeError(repr(error)), text))
