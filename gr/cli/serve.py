"""`gr serve`: a package over HTTP, in the Open Inference Protocol."""

import importlib.util
import json
from contextlib import ExitStack
from pathlib import Path

import click

from gr.cli.out import dump
from gr.config.serving import load_serve_config
from gr.errors import ConfigError, InstallError

_NEEDED = ("starlette", "uvicorn", "httptools", "uvloop", "prometheus_client")


@click.command(
    help="Answer requests with the model of PACKAGE, a folder of `gr export`, over HTTP in the Open Inference Protocol "
    "until SIGTERM or Ctrl-C.\n\nLimits are keys and values, such as deadline_ms=60 or connections=1000; see "
    "docs/serving.md. A line of JSON a request goes to stdout, without data of the user."
)
@click.argument("package", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--host", help="Address to listen on; sets host. By default only this machine can ask.")
@click.option("--port", type=int, help="Port to listen on, 0 for any; sets port.")
@click.option("--name", help="Name of the model in requests; by default that of the folder.")
@click.option("--watch", is_flag=True, help="Serve what `gr publish` puts into the package from now on, too.")
@click.option("--access-log/--no-access-log", default=True, help="A line of JSON a request on stdout, or none.")
def command(
    package: Path,
    overrides: tuple[str, ...],
    host: str | None,
    port: int | None,
    name: str | None,
    watch: bool,
    access_log: bool,
) -> None:
    given = {"host": host, "port": port}
    flags = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    limits = load_serve_config([*overrides, *flags])
    model = package.resolve().name if name is None else name
    if not model or "/" in model:
        raise ConfigError(f"--name={model}: expected a name without /, as it stands in the paths of requests")
    require_serve("gr serve")
    from gr import logging
    from gr.serving.engine import Engine
    from gr.serving.http.served import Served
    from gr.serving.http.server import listen, serve
    from gr.serving.package.layout import read_current
    from gr.serving.package.version import Version
    from gr.serving.package.watch import Watch

    logging.configure()
    with ExitStack() as stack:
        listener = stack.enter_context(listen(limits))

        def open_version() -> Version:
            return Version.open(package, runners=limits.workers)

        engine = stack.enter_context(Engine(open_version(), limits))
        if watch:

            def current() -> str:
                return read_current(package).weights

            stack.enter_context(Watch(engine, current, open_version, limits.watch_seconds))
        serve(Served(engine, model, limits, dump if access_log else None), listener)


def require_serve(what: str) -> None:
    """Raises InstallError where the packages of the server are not installed."""
    if missing := [module for module in _NEEDED if importlib.util.find_spec(module) is None]:
        raise InstallError(f"{what} needs {', '.join(missing)}: install them with `pip install 'gr[serve]'`")
