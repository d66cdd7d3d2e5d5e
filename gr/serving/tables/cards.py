"""Tables over cards, each a process with a core and tables of its own: a batch's pooled lookups by all at once.

The ids of a card's features go to it through shared memory, and its pooled vectors come back as one block of fp16 that
holds nothing but what was asked for. fp16 is sent by a single card too, so that results do not depend on their number.
Features of the user's side are looked up once a request: their vectors travel once, and who asks expands them.

K cards, F features, B bags of a feature (examples, or users), D width, C columns: the sum of the features' D.
"""

import multiprocessing
import os
import signal
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch
from torch import Tensor

from gr.errors import ServingError
from gr.serving.servable import Unavailable

Lookup = Callable[[Tensor, Tensor], Tensor]  # ids, offsets (int32 both) -> float32 [B, C], such as PackedTables
_START_SECONDS = 300
_READY, _FAILED = b"ready", b"failed"


@dataclass(frozen=True)
class Bags:
    """The ids of one feature. ids: int32. offsets_B1: int32, where each bag begins, and the end."""

    ids: Tensor
    offsets_B1: Tensor


@dataclass(frozen=True)
class CardGroup:
    """Features that are looked up by one call, with equally many bags. widths: D by feature, in the order of the call.

    open: makes the lookup, in the card's own process; it is sent there, so it is a function of a module, or a partial
    of one.
    """

    widths: Mapping[str, int]
    open: Callable[[], Lookup]


class Cards:
    """Processes that hold tables. One lookup at a time; close it, or use it as a context."""

    def __init__(self, cards: Sequence[Sequence[CardGroup]], *, bags: int, ids: int) -> None:
        """bags: of a feature, at most. ids: of a card's features in one lookup, at most.

        Raises ServingError where a card does not start.
        """
        context = multiprocessing.get_context("forkserver")  # a process with threads, as a server is, must not fork
        context.set_forkserver_preload([__name__, "gr.serving.tables.card_tables"])
        self._lock = threading.Lock()
        self._ended: Unavailable | None = None
        cores = sorted(os.sched_getaffinity(0))
        self._cards = [_Card(context, place, groups, bags, ids, cores) for place, groups in enumerate(cards)]
        try:
            for card in self._cards:
                card.started()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Cards":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        for card in self._cards:
            card.stop()

    @property
    def running(self) -> bool:
        """Whether no card has ended."""
        return self._ended is None and not wait([card.process.sentinel for card in self._cards], timeout=0)

    def lookup(self, bags: Mapping[str, Bags]) -> dict[str, Tensor]:
        """The pooled vectors of every feature, float32 [B, D], after their transfer in fp16.

        Features of a group have equally many bags. Raises ServingError for more bags or ids than there is room for, and
        where a card has ended.
        """
        with self._lock:
            if self._ended is not None:
                raise self._ended
            for card in self._cards:
                card.check(bags)
            try:
                for card in self._cards:
                    card.ask(bags)
                said = self._replies()
            except Unavailable as error:
                self._ended = error  # the other cards' replies are still in their pipes
                raise
            answers: dict[str, Tensor] = {}
            for card, reply in zip(self._cards, said, strict=True):
                answers |= card.answer(reply)
        return answers

    def _replies(self) -> list[bytes]:
        """The reply of each card when it is done, in the order of the cards."""
        pending = {card.connection: card for card in self._cards}
        replies: dict[int, bytes] = {}
        while pending:
            for connection in wait(list(pending)):
                card = pending.pop(cast(Connection, connection))
                replies[card.place] = card.received()
        return [replies[card.place] for card in self._cards]


class _Card:
    """The parent's side of a card: its process, and the memory that both see."""

    def __init__(
        self, context: Any, place: int, groups: Sequence[CardGroup], bags: int, ids: int, cores: Sequence[int]
    ) -> None:
        self.place, self.groups, self._bags = place, groups, bags
        features = sum(len(group.widths) for group in groups)
        columns = sum(sum(group.widths.values()) for group in groups)
        self._ids = torch.zeros(max(ids, 1), dtype=torch.int32).share_memory_()
        self._offsets = torch.zeros(features * bags + len(groups), dtype=torch.int32).share_memory_()
        self._vectors = torch.zeros(max(columns * bags, 1), dtype=torch.float16).share_memory_()
        self._sizes: list[int] = []
        self.connection, theirs = context.Pipe()
        shared = self._ids, self._offsets, self._vectors
        self.process = context.Process(
            target=_serve, args=(theirs, groups, shared, cores[place % len(cores)]), name=f"card-{place}", daemon=True
        )
        self.process.start()
        theirs.close()

    def started(self) -> None:
        if not self.connection.poll(_START_SECONDS):
            raise ServingError(f"card {self.place} has not opened its tables within {_START_SECONDS} seconds")
        try:
            said = self.connection.recv_bytes()
        except (EOFError, OSError):
            self.process.join(5)
            raise ServingError(
                f"card {self.place} has ended while it started (exit code {self.process.exitcode}), its own lines say "
                'why; in a script, open the package below if __name__ == "__main__":'
            ) from None
        if said != _READY:
            raise ServingError(f"card {self.place} cannot open its tables: {said.removeprefix(_FAILED).decode()}")

    def check(self, bags: Mapping[str, Bags]) -> None:
        """Raises ServingError where a lookup does not fit the card."""
        asked = 0
        for group in self.groups:
            counts = {name: len(bags[name].offsets_B1) - 1 for name in group.widths}
            if len(set(counts.values())) > 1:
                raise ServingError(f"features of one lookup have different numbers of bags: {counts}")
            if (most := max(counts.values())) > self._bags:
                raise ServingError(f"{most} examples in one lookup, and card {self.place} has room for {self._bags}")
            asked += sum(len(bags[name].ids) for name in group.widths)
        if asked > len(self._ids):
            raise ServingError(f"{asked} ids in one lookup, and card {self.place} has room for {len(self._ids)}")

    def ask(self, bags: Mapping[str, Bags]) -> None:
        """Writes the ids side by side, and wakes the card: for each group its number of bags and of ids."""
        self._sizes, sent = [], []
        id_place = offset_place = 0
        for group in self.groups:
            first = id_place
            for name in group.widths:
                own = bags[name]
                B = len(own.offsets_B1) - 1
                torch.add(own.offsets_B1[:-1], id_place - first, out=self._offsets[offset_place : offset_place + B])
                self._ids[id_place : id_place + len(own.ids)] = own.ids
                id_place, offset_place = id_place + len(own.ids), offset_place + B
            self._offsets[offset_place] = id_place - first
            offset_place += 1
            self._sizes.append(B)
            sent += [B, id_place - first]
        try:
            self.connection.send_bytes(struct.pack(f"<{len(sent)}q", *sent))
        except OSError:
            raise self._ended() from None

    def answer(self, said: bytes) -> dict[str, Tensor]:
        """The vectors of the card's features. said: its reply. Raises ServingError where it could not look up."""
        if said != _READY:
            raise ServingError(f"card {self.place} cannot look up: {said.removeprefix(_FAILED).decode()}")
        answers: dict[str, Tensor] = {}
        place = 0
        for group, B in zip(self.groups, self._sizes, strict=True):
            widths = list(group.widths.values())
            block_BC = self._vectors[place : place + B * sum(widths)].view(B, sum(widths)).float()
            answers |= dict(zip(group.widths, block_BC.split(widths, dim=1), strict=True))
            place += B * sum(widths)
        return answers

    def stop(self) -> None:
        self.connection.close()  # the end of the pipe ends the process
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def received(self) -> bytes:
        """The card's next message. Raises ServingError where it has ended."""
        try:
            return self.connection.recv_bytes()
        except (EOFError, OSError):
            raise self._ended() from None

    def _ended(self) -> Unavailable:
        self.process.join(5)
        return Unavailable(
            f"card {self.place} has ended (exit code {self.process.exitcode}), and its tables with it; open the "
            "package again"
        )


def _serve(
    connection: Connection, groups: Sequence[CardGroup], shared: tuple[Tensor, Tensor, Tensor], core: int
) -> None:
    """A card's process, until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, which all processes get; the parent decides
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    try:
        lookups = [group.open() for group in groups]
    except Exception as error:  # whatever it is, the parent says it
        connection.send_bytes(_FAILED + f"{type(error).__name__}: {error}".encode())
        return
    with suppress(EOFError, ConnectionError):  # the other end is closed, or its process has ended
        connection.send_bytes(_READY)
        while True:
            sizes = struct.unpack(f"<{2 * len(groups)}q", connection.recv_bytes())
            try:
                _look_up(groups, lookups, shared, sizes)
            except RuntimeError as error:  # of torch and fbgemm: an id outside its table, no memory
                connection.send_bytes(_FAILED + str(error).splitlines()[0].encode())
            else:
                connection.send_bytes(_READY)


@torch.inference_mode()
def _look_up(
    groups: Sequence[CardGroup], lookups: Sequence[Lookup], shared: tuple[Tensor, Tensor, Tensor], sizes: Sequence[int]
) -> None:
    ids, offsets, vectors = shared
    id_place = offset_place = place = 0
    for group, look_up, B, count in zip(groups, lookups, sizes[::2], sizes[1::2], strict=True):
        ends = offset_place + len(group.widths) * B + 1
        pooled_BC = look_up(ids[id_place : id_place + count], offsets[offset_place:ends])
        vectors[place : place + pooled_BC.numel()].copy_(pooled_BC.view(-1))  # to fp16
        id_place, offset_place, place = id_place + count, ends, place + pooled_BC.numel()
