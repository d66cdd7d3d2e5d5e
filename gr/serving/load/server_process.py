"""A server in a process of its own, of whatever can be opened there: of a package, or of what it is compared with."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from gr import logging
from gr.config.serving import ServeConfig
from gr.errors import GRError, ServingError
from gr.serving.engine import Engine
from gr.serving.servable import ServedVersion

MODEL = "bench"


@contextmanager
def server(open_version: Callable[[], ServedVersion], limits: ServeConfig) -> Iterator[tuple[str, int]]:
    """The address of the server, whose model is MODEL. It ends with the context.

    open_version: is called in the other process and so sent there: a function of a module, or a partial of one.
    Raises ServingError where the server does not start.
    """
    context = multiprocessing.get_context("spawn")  # a process with threads must not fork
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(open_version, limits, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        try:
            address = ours.recv()
        except EOFError:
            raise ServingError("the server has ended before it listened; its own lines say why") from None
        if isinstance(address, str):
            raise ServingError(f"the server did not start: {address}")
        yield address
    finally:
        process.terminate()
        process.join()


def _serve(open_version: Callable[[], ServedVersion], limits: ServeConfig, pipe: Connection) -> None:
    from gr.serving.http.served import Served
    from gr.serving.http.server import listen, serve

    logging.configure()
    try:
        with listen(limits) as listener, Engine(open_version(), limits) as engine:
            pipe.send(listener.getsockname()[:2])
            serve(Served(engine, MODEL, limits), listener)
    except GRError as error:
        pipe.send(str(error))
