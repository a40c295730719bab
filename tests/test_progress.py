"""Parallel processing of cases: ordered results, errors, and progress in the log."""

import logging
import time

import pytest
from threadpoolctl import threadpool_info

from prostate_seg.common import progress
from prostate_seg.common.progress import map_cases


def test_results_come_in_the_order_of_the_cases() -> None:
    def slow_first(number: int) -> int:
        time.sleep(0.05 if number == 0 else 0)
        return number * 10

    assert map_cases(slow_first, range(5), num_workers=3, label="x") == [0, 10, 20, 30, 40]
    assert map_cases(slow_first, [], num_workers=None, label="x") == []


def test_error_of_one_case_stops_the_others() -> None:
    seen = []

    def fail_on_one(number: int) -> None:
        seen.append(number)
        if number == 1:
            raise RuntimeError("case 1")
        time.sleep(0.01)

    with pytest.raises(RuntimeError, match="case 1"):
        map_cases(fail_on_one, range(1000), num_workers=1, label="x")
    assert len(seen) < 1000


def test_log_without_a_terminal_gets_plain_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    caplog.set_level(logging.INFO)
    map_cases(str, [1, 2], num_workers=1, label="preprocess")
    assert [record.message for record in caplog.records] == ["preprocess 1/2", "preprocess 2/2"]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_linear_algebra_uses_one_thread_for_any_number_of_workers(num_workers: int) -> None:
    def num_threads(_: int) -> set[int]:
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    assert map_cases(num_threads, [1, 2], num_workers=num_workers, label="x") == [{1}, {1}]
