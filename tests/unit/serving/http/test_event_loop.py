"""What the event loop gets of other threads, and how late it knows itself to be."""

import asyncio
import threading
import time

from gr.serving.http import event_loop
from gr.serving.http.event_loop import Answers, Lateness


def test_answers_of_another_thread_come_by_one_wake_up(monkeypatch, caplog):
    async def ask():
        loop, wakes, taken = asyncio.get_running_loop(), [], []
        original = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *a: wakes.append(a) or original(*a), raising=False)
        answers = Answers()

        def refuse(result):
            raise ArithmeticError(result)

        def answer():
            for number in range(50):
                answers.add(loop, refuse if number == 7 else taken.append, number)

        thread = threading.Thread(target=answer)
        thread.start()
        thread.join()  # while the loop stands still
        assert len(wakes) == 1
        await asyncio.sleep(0.01)
        assert taken == [number for number in range(50) if number != 7]

    asyncio.run(ask())
    assert "an answer could not be given" in caplog.text


def test_a_loop_that_stood_still_read_late(monkeypatch):
    monkeypatch.setattr(event_loop, "_HALF_LIFE", 0.1)

    async def read():
        loop, lateness = asyncio.get_running_loop(), Lateness()
        assert lateness.seconds(loop) == 0
        time.sleep(0.3)
        late = lateness.seconds(loop)
        assert 0.29 < late < 1
        await asyncio.sleep(0.02)  # its timer tells how late the turn was that has ended
        assert 0.1 < lateness.seconds(loop) <= late + 0.3
        await asyncio.sleep(1)
        assert lateness.seconds(loop) < 0.1  # what was late long ago says little

    asyncio.run(read())
