"""A thread that writes while the device computes: in order, in bounded memory, and no error is lost on either side."""

from __future__ import annotations

import threading
import time

import pytest

from OpenSciDraw.utils.background import Abandoned, Background, Handover


def test_jobs_are_done_in_their_order_beside_the_caller() -> None:
    done: list[int] = []
    threads: set[int] = set()

    def job(number: int) -> None:
        threads.add(threading.get_ident())
        time.sleep(0.001 * (5 - number))
        done.append(number)

    with Background() as writer:
        for number in range(5):
            writer.submit(job, number)
    assert done == [0, 1, 2, 3, 4] and len(threads) == 1 and threading.get_ident() not in threads


def test_no_more_jobs_wait_than_allowed() -> None:
    going, submitted = threading.Event(), []

    def submit_three() -> None:
        with Background(ahead=1) as writer:
            for number in range(3):
                writer.submit(going.wait)
                submitted.append(number)

    caller = threading.Thread(target=submit_three)
    caller.start()
    time.sleep(0.1)
    assert submitted == [0, 1]  # one is done, one waits
    going.set()
    caller.join(10)
    assert submitted == [0, 1, 2]


def test_a_jobs_error_reaches_the_caller_and_ends_what_waits() -> None:
    done: list[int] = []
    may_fail = threading.Event()

    def job(number: int) -> None:
        may_fail.wait()
        if number == 0:
            raise OSError("disk full")
        done.append(number)

    with pytest.raises(OSError, match="disk full"), Background() as writer:
        writer.submit(job, 0)
        writer.submit(job, 1)
        may_fail.set()
    assert done == []


def test_the_callers_error_lets_the_job_in_hand_finish_and_drops_the_rest() -> None:
    done: list[int] = []
    begun = threading.Event()

    def job(number: int) -> None:
        begun.set()
        time.sleep(0.05)
        done.append(number)

    with pytest.raises(KeyboardInterrupt), Background() as writer:
        writer.submit(job, 0)
        writer.submit(job, 1)
        begun.wait()
        raise KeyboardInterrupt
    assert done == [0]


def test_items_are_handed_over_in_order_and_no_more_than_allowed_lie_between() -> None:
    taken: list[int] = []
    ahead = []

    def take(items: Handover[int]) -> None:
        for item in items:
            time.sleep(0.001)
            taken.append(item)

    with Background() as writer:
        items: Handover[int] = Handover(2, writer.check)
        writer.submit(take, items)
        with items:
            for number in range(20):
                items.put(number)
                ahead.append(number - len(taken))
    assert taken == list(range(20)) and max(ahead) <= 4  # two between, one in each hand


def test_neither_side_of_a_handover_waits_for_one_that_failed() -> None:
    def fail(items: Handover[int]) -> None:
        next(iter(items))
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), Background() as writer:
        items: Handover[int] = Handover(1, writer.check)
        writer.submit(fail, items)
        with items:
            for number in range(100):
                items.put(number)
    seen: list[BaseException] = []

    def take(items: Handover[int]) -> None:
        try:
            list(items)
        except Abandoned as error:
            seen.append(error)
            raise

    with pytest.raises(KeyboardInterrupt), Background() as writer:
        items = Handover(1, writer.check)
        writer.submit(take, items)
        with items:
            items.put(0)
            raise KeyboardInterrupt
    assert len(seen) == 1
