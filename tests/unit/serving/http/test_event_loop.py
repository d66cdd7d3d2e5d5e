"""What the event loop gets of other threads, and how late it knows itself to be."""

import asyncio
import threading
import time
from concurrent.futures import Future

from gr.serving import Answer
from gr.serving.http import event_loop
from gr.serving.http.event_loop import Answers, Lateness


def test_answers_of_another_thread_come_by_one_wake_up(monkeypatch):
    async def ask():
        loop, wakes = asyncio.get_running_loop(), []
        original = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *a: wakes.append(a) or original(*a), raising=False)
        answers, futures = Answers(), [Future() for _ in range(50)]
        own = [answers.of(future) for future in futures]

        def answer():
            for number, future in enumerate(futures[:-1]):
                future.set_result(Answer(str(number), {}, 0.0, 0.0))
            futures[-1].set_exception(ArithmeticError("no"))

        thread = threading.Thread(target=answer)
        thread.start()
        thread.join()  # while the loop stands still
        assert len(wakes) == 1
        done = await asyncio.gather(*own, return_exceptions=True)
        assert [each.version for each in done[:-1]] == [str(number) for number in range(49)]
        assert isinstance(done[-1], ArithmeticError)

    asyncio.run(ask())


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
