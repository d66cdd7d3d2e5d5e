"""The rules of docs/design on size, names and forbidden calls: each takes a module and yields its faults."""

import ast
from collections import Counter
from collections.abc import Iterator, Mapping

from .source import Module, imported

FILE_LINES, TRITON_FILE_LINES, FUNCTION_LINES = 400, 900, 60
PARAMETERS, OP_PARAMETERS = 8, 12
VAGUE_FILES = {"utils.py", "helpers.py", "misc.py"}
VAGUE_CLASSES = ("Manager", "Handler")
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle"}
# It admits a list of classes and no others, which its tests show.
RESTRICTED_UNPICKLER = "gr/checkpoint/metadata.py"
TERMINAL = "gr/cli/out.py"
# Thousand lines of Python and C++ of each room, as docs/design/architecture.md has them.
CEILINGS = {
    "ground": 1.1,
    "config": 4.4,
    "data": 3.5,
    "ops": 8.1,
    "embeddings": 1.6,
    "parallel": 0.7,
    "towers": 1.0,
    "tasks": 0.9,
    "models": 1.7,
    "metrics": 1.0,
    "checkpoint": 1.6,
    "planner": 5.1,
    "cluster": 0.5,
    "training": 1.4,
    "serving": 8.2,
    "recipes": 2.4,
    "cli": 2.75,
    "prepare": 5.7,
}
WITHOUT_PREPARE = 46.5
GROUND = {"environment", "errors", "logging", "files", "status", "watchdog", "schema", "units"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def file_size(module: Module) -> Iterator[str]:
    lines = module.text.count("\n")
    limit = TRITON_FILE_LINES if module.path.name == "triton.py" else FILE_LINES
    if lines > limit:
        yield f"{module}: {lines} lines, at most {limit}"


def functions(module: Module) -> Iterator[str]:
    for node in module.nodes:
        if isinstance(node, Function):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{module}:{node.lineno}: {node.name} has {lines} lines, at most {FUNCTION_LINES}"
            limit = OP_PARAMETERS if "ops" in module.path.parts else PARAMETERS
            count = _parameters(node)
            if count > limit and not _is_kernel(node):
                yield f"{module}:{node.lineno}: {node.name} has {count} parameters, at most {limit}"


def _parameters(node: Function) -> int:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    own = [argument for argument in named if argument.arg not in ("self", "cls")]
    return len(own) + (arguments.vararg is not None) + (arguments.kwarg is not None)


def _is_kernel(node: Function) -> bool:
    """A Triton kernel takes a pointer and a stride for everything; its launcher beside it keeps the limit."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def names(module: Module) -> Iterator[str]:
    if module.path.name in VAGUE_FILES:
        yield f"{module}: name the file for what is in it"
    for node in module.nodes:
        if isinstance(node, ast.ClassDef) and node.name.endswith(VAGUE_CLASSES):
            yield f"{module}:{node.lineno}: class {node.name}: name it for what it does"


def exceptions(module: Module) -> Iterator[str]:
    for node in module.nodes:
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            silent = all(isinstance(each, ast.Pass | ast.Continue) for each in node.body)
            if not caught or (caught in ("Exception", "BaseException") and silent):
                yield f"{module}:{node.lineno}: catches everything; name the exceptions"
        elif isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if ast.unparse(raised) in ("Exception", "BaseException"):
                yield f"{module}:{node.lineno}: raises a bare Exception; use one of gr.errors"


def prints(module: Module) -> Iterator[str]:
    commands = module.path.parts[:2] == ("gr", "cli")
    for call in _calls(module):
        name = ast.unparse(call.func)
        if name == "print" and not commands:
            yield f"{module}:{call.lineno}: print outside gr/cli; use gr.logging"
        if str(module.path) != TERMINAL and (name in ("print", "click.echo") or name.endswith(".print")) and commands:
            yield f"{module}:{call.lineno}: {name} shows control characters of names; use say or show of gr.cli.out"


def unsafe_loads(module: Module) -> Iterator[str]:
    for line, name in imported(module):
        if name in PICKLES and str(module.path) != RESTRICTED_UNPICKLER:
            yield f"{module}:{line}: {name} runs code from the file it reads"
    for call in _calls(module):
        safe = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in call.keywords)
        if ast.unparse(call.func) == "torch.load" and not safe:
            yield f"{module}:{call.lineno}: torch.load without weights_only=True"


def imports(module: Module) -> Iterator[str]:
    for line, name in imported(module):
        if name == "triton" and module.path.name != "triton.py":
            yield f"{module}:{line}: triton imported outside a file called triton.py"
        if name in ("launch", "tests", "benchmarks"):
            yield f"{module}:{line}: gr does not import {name}, which is not installed with it"


def _calls(module: Module) -> Iterator[ast.Call]:
    return (node for node in module.nodes if isinstance(node, ast.Call))


def room_sizes(files: Mapping[str, int]) -> dict[str, float]:
    """Thousand lines of each room of gr. files: lines by path, gr/room/... or gr/file.py."""
    sizes: Counter[str] = Counter()
    for path, lines in files.items():
        room = path.split("/")[1].removesuffix(".py")
        sizes["ground" if room in GROUND else room] += lines
    return {room: lines / 1000 for room, lines in sizes.items()}


def full_rooms(sizes: Mapping[str, float]) -> Iterator[str]:
    """A room that is full is tidied before it grows."""
    for room, ceiling in CEILINGS.items():
        if sizes.get(room, 0.0) > ceiling:
            yield f"gr/{room} has {sizes[room]:.2f} thousand lines, at most {ceiling}"
    whole = sum(size for room, size in sizes.items() if room != "prepare")
    if whole > WITHOUT_PREPARE:
        yield f"gr without prepare has {whole:.2f} thousand lines, at most {WITHOUT_PREPARE}"
