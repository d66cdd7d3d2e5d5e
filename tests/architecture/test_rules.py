"""gr keeps its budgets, and each rule is shown to bite."""

from pathlib import Path

import pytest

from . import rules
from .source import ROOT, imported, modules, parse

RULES = (
    rules.file_size,
    rules.functions,
    rules.names,
    rules.exceptions,
    rules.prints,
    rules.unsafe_loads,
    rules.imports,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_gr_keeps_the_rule(rule):
    assert [fault for module in modules("gr") for fault in rule(module)] == []


@pytest.mark.parametrize("rule", (rules.file_size, rules.functions, rules.names), ids=lambda rule: rule.__name__)
def test_everything_else_keeps_the_budgets(rule):
    assert [fault for module in modules("launch", "benchmarks", "tests") for fault in rule(module)] == []


def test_launch_imports_no_gr():
    """A launcher runs where gr need not be installed, and TorchX executes components.py by itself."""
    found = [(str(module), line) for module in modules("launch") for line, name in imported(module) if name == "gr"]
    assert found == []


def test_every_folder_of_gr_is_a_package():
    folders = {module.path.parent for module in modules("gr")}
    assert [str(folder) for folder in sorted(folders) if not (ROOT / folder / "__init__.py").is_file()] == []


def test_no_room_of_gr_is_full():
    files = [path for suffix in ("py", "cpp", "h") for path in (ROOT / "gr").rglob(f"*.{suffix}")]
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in files}
    assert list(rules.full_rooms(rules.room_sizes(lines))) == []


def test_a_full_room_is_named():
    config, whole = (int(1000 * each) for each in (rules.CEILINGS["config"], rules.WITHOUT_PREPARE))
    sizes = rules.room_sizes(
        {"gr/config/a.py": config + 100, "gr/errors.py": 600, "gr/files.py": 501, "gr/ops/x/a.cpp": whole}
    )
    faults = list(rules.full_rooms(sizes))
    assert len(faults) == 4
    assert faults[0].startswith("gr/ground has 1.10 thousand lines") and "gr/config has" in faults[1]
    assert "gr/ops has" in faults[2] and "gr without prepare has" in faults[3]


_LONG_BODY = "\n".join(["    x = 1"] * 60)
_NINE, _THIRTEEN = (", ".join(f"p{i}" for i in range(count)) for count in (9, 13))


@pytest.mark.parametrize(
    ("rule", "path", "code", "said"),
    [
        (rules.file_size, "gr/a.py", "\n" * 401, "401 lines, at most 400"),
        (rules.file_size, "gr/ops/a/triton.py", "\n" * 901, "901 lines, at most 900"),
        (rules.functions, "gr/a.py", f"def f():\n{_LONG_BODY}", "f has 61 lines"),
        (rules.functions, "gr/a.py", f"def f({_NINE}): ...", "f has 9 parameters, at most 8"),
        (rules.functions, "gr/ops/a.py", f"def f({_THIRTEEN}): ...", "f has 13 parameters, at most 12"),
        (rules.names, "gr/utils.py", "", "name the file"),
        (rules.names, "gr/a.py", "class TableManager: ...", "class TableManager"),
        (rules.exceptions, "gr/a.py", "try: ...\nexcept: raise", "catches everything"),
        (rules.exceptions, "gr/a.py", "try: ...\nexcept Exception: pass", "catches everything"),
        (rules.exceptions, "gr/a.py", "raise Exception('x')", "bare Exception"),
        (rules.prints, "gr/a.py", "print(1)", "print outside"),
        (rules.prints, "gr/cli/a.py", "print(1)", "shows control characters"),
        (rules.prints, "gr/cli/a.py", "click.echo(name)", "shows control characters"),
        (rules.prints, "gr/cli/a.py", "Console().print(table)", "shows control characters"),
        (rules.unsafe_loads, "gr/a.py", "def f():\n    import pickle", "pickle runs code"),
        (rules.unsafe_loads, "gr/a.py", "torch.load(p)", "without weights_only"),
        (rules.unsafe_loads, "gr/a.py", "torch.load(p, weights_only=False)", "without weights_only"),
        (rules.imports, "gr/ops/a.py", "import triton.language as tl", "triton imported outside"),
        (rules.imports, "gr/a.py", "from launch.components import train", "gr does not import launch"),
    ],
)
def test_rule_bites(rule, path, code, said):
    faults = list(rule(parse(Path(path), code)))
    assert len(faults) == 1
    assert said in faults[0]


@pytest.mark.parametrize(
    ("rule", "path", "code"),
    [
        (rules.file_size, "gr/ops/a/triton.py", "\n" * 900),
        (rules.functions, "gr/a.py", f"class A:\n    def f(self, {', '.join(f'p{i}' for i in range(8))}): ..."),
        (rules.functions, "gr/ops/a/triton.py", f"@triton.jit\ndef kernel({_THIRTEEN}): ..."),
        (rules.exceptions, "gr/a.py", "try: ...\nexcept OSError: pass"),
        (rules.prints, "gr/cli/out.py", "click.echo(1)"),
        (rules.prints, "gr/cli/a.py", "say(1)"),
        (rules.unsafe_loads, "gr/a.py", "torch.load(p, weights_only=True)"),
        (rules.imports, "gr/ops/a/triton.py", "import triton"),
    ],
)
def test_rule_lets_pass(rule, path, code):
    assert list(rule(parse(Path(path), code))) == []
