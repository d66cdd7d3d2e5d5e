"""Log lines: their logger, their rank, and how often they appear."""

import logging
import threading

import pytest

from gr.logging import configure, get_logger, log_once


@pytest.fixture(autouse=True)
def _as_before():
    root = logging.getLogger("gr")
    before = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:], root.level, root.propagate = before


def test_rank_0_speaks_plainly(capsys):
    configure(rank=0)
    get_logger("gr.train").info("step 1")
    get_logger("gr.train").warning("slow")
    assert capsys.readouterr().err == "step 1\nwarning: slow\n"


def test_other_ranks_only_warn_and_say_who_they_are(capsys):
    configure(rank=3)
    get_logger("gr.train").info("step 1")
    get_logger("gr.train").error("lost")
    assert capsys.readouterr().err == "[rank 3] error: lost\n"


def test_configuring_again_prints_no_line_twice(capsys):
    configure()
    configure()
    get_logger("elsewhere").info("hello")
    assert capsys.readouterr().err == "hello\n"


def test_once(capsys):
    configure()
    logger = get_logger("gr.once")
    for _ in range(3):
        log_once(logger, "fallback taken")
    log_once(logger, "another", level=logging.INFO)
    assert capsys.readouterr().err == "warning: fallback taken\nanother\n"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_of_the_disk_in_a_thread_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    configure()

    def fail():
        raise FileNotFoundError(2, "No such file or directory", "run/a\nb")

    threading.Thread(target=fail, name="writer").start()
    [thread.join() for thread in threading.enumerate() if thread.name == "writer"]
    assert capsys.readouterr().err == "error: writer: [Errno 2] No such file or directory: 'run/a\\nb'\n"
