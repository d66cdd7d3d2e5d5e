"""Configuration as written: YAML files and overrides, merged, every value remembering where it came from.

Nothing here knows the typed tree, except for the paths of its sections that choose a variant by `kind`.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gr.config.packaged import hint, located
from gr.errors import TransientError
from gr.files import is_transient

Location = tuple[str | int, ...]
# Far above any real configuration. The depth is of nesting and of bases, and far below Python's recursion limit; the
# letters are read in seconds.
_MAX_DEPTH, _MAX_FILES, _MAX_LETTERS = 50, 500, 1_000_000


@dataclass(frozen=True)
class Node:
    """A scalar, a list of nodes or a dict of nodes, and where it was written: `file:line` or the override's text."""

    value: Any
    origin: str

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def child(self, part: str | int) -> "Node | None":
        if isinstance(self.value, dict):
            return self.value.get(part)
        if isinstance(self.value, list) and isinstance(part, int) and part < len(self.value):
            return self.value[part]
        return None

    def find(self, location: Location) -> "Node | None":
        node: Node | None = self
        for part in location:
            node = node.child(part) if node else None
        return node

    def origin_of(self, location: Location) -> str:
        """The place where the value at `location` was written, or that of its nearest written section."""
        lengths = range(len(location), -1, -1)
        return next(node.origin for length in lengths if (node := self.find(location[:length])))


def merge(old: Node, new: Node, default_kinds: Mapping[Location, str], at: Location = ()) -> Node:
    """`new` over `old`: sections merge, everything else replaces.

    default_kinds: the sections that choose a variant by `kind`, with the kind that an unset one means. Where `new`
    changes the kind, the keys of the old variant go: they mean nothing to the new one.
    """
    if not (isinstance(old.value, dict) and isinstance(new.value, dict)):
        return new
    if at in default_kinds and "kind" in new.value and new.value["kind"].value != _kind(old, default_kinds[at]):
        return new
    merged = dict(old.value)
    for key, child in new.value.items():
        merged[key] = merge(old.value[key], child, default_kinds, (*at, key)) if key in old.value else child
    return Node(merged, new.origin)


def _kind(section: Node, default: str) -> Any:
    return section.value["kind"].value if "kind" in section.value else default


class _Syntax(Exception):
    """A text is not usable YAML. Becomes one line of the ConfigError."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line


class ScalarLoader(yaml.SafeLoader):
    """YAML 1.2's idea of a scalar: 1e-3 is a number; yes, off, 010, 1:30 and dates are text. No aliases and no tags."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - add_implicit_resolver below writes here, not to SafeLoader's

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise _Syntax(line, "YAML aliases (*name) are not supported; write the value again or share it by `base:`")
        if getattr(event, "tag", None) is not None:
            raise _Syntax(line, f"YAML tags ({event.tag}) are not supported; write the plain value")
        return super().compose_node(parent, index)


_PATTERNS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",  # recognised in order to be refused
        list("-+0123456789."),
    ),
)
SCALARS = tuple((tag, re.compile(rf"^(?:{pattern})$"), first) for tag, pattern, first in _PATTERNS)
for _scalar in SCALARS:
    ScalarLoader.add_implicit_resolver(*_scalar)


_ENDS = (yaml.StreamStartToken, yaml.StreamEndToken, yaml.BlockEndToken)
_LOST = (yaml.DocumentStartToken, yaml.DocumentEndToken, yaml.DirectiveToken, yaml.AnchorToken)


class Reader:
    """Reads files and overrides into one tree and collects every fault on the way instead of stopping at the first.

    faults: one line each. broken: some file could not be used at all; validating the rest would only find that again.
    """

    def __init__(self, default_kinds: Mapping[Location, str], *, bases: bool = True) -> None:
        """bases: whether a file may name others."""
        self._default_kinds, self._bases = default_kinds, bases
        self._known: dict[Path, Node] = {}  # files that were read, over their bases: many may name the same one
        self.faults: list[str] = []
        self.broken = False

    def read(self, path: str | Path, overrides: Iterable[str]) -> Node:
        tree = self._file(located(Path(path)), ())
        changes = Node({}, str(path))
        for text in overrides:
            # First among themselves and dropping nothing: `tower.layers=3 tower.kind=sasrec` keeps both, in any order.
            changes = merge(changes, self._override(text), default_kinds={})
        merged = self._merge(tree, changes)
        return Node(merged.value, tree.origin)

    def _merge(self, old: Node, new: Node) -> Node:
        return merge(old, new, self._default_kinds)

    def _fail(self, origin: str, problem: str) -> None:
        self.faults.append(f"{origin}: {problem}")
        self.broken = True

    def _file(self, path: Path, above: tuple[Path, ...]) -> Node:
        """A file over its bases. `above`: the files that lead here, to find cycles."""
        own = self._parse_file(path)
        base = own.value.pop("base", None)
        tree = Node({}, own.origin)
        if base is not None and not self._bases:
            self._fail(base.origin, "base: a checkpoint's configuration names no other file")
            return own
        for name in self._base_names(base):
            tree = self._merge(tree, self._base(name, path.parent / name.value, (*above, path)))
        return self._merge(tree, own)

    def _base(self, name: Node, path: Path, chain: tuple[Path, ...]) -> Node:
        """The file that `name` names, over its bases. `chain`: the files that lead to it."""
        nothing = Node({}, name.origin)
        try:
            place, is_file = path.resolve(), path.is_file()
        except ValueError:
            self._fail(name.origin, f"base: {describe(name.value)} is no name of a file")
            return nothing
        except OSError as error:
            self._fail(name.origin, f"base: {describe(name.value)} cannot be read: {error.strerror}")
            return nothing
        if place in [above.resolve() for above in chain]:
            self._fail(name.origin, f"base: cycle: {' -> '.join(map(str, (*chain, path)))}")
        elif not is_file:
            self._fail(name.origin, f"base: no such file: {path}")
        elif len(chain) > _MAX_DEPTH:
            self._fail(name.origin, f"base: more than {_MAX_DEPTH} files above one another; name fewer, in one list")
        elif len(self._known) >= _MAX_FILES:
            self._fail(name.origin, f"base: more than {_MAX_FILES} files; name fewer")
        else:
            if place not in self._known:
                self._known[place] = self._file(path, chain)
            return self._known[place]
        return nothing

    def _base_names(self, base: Node | None) -> Sequence[Node]:
        if base is None:
            return ()
        names = base.value if isinstance(base.value, list) else [base]
        if not all(isinstance(name.value, str) for name in names):
            self._fail(base.origin, f"base: expected a file name or a list of them, got {base.plain()!r}")
            return ()
        return names

    def _parse_file(self, path: Path) -> Node:
        nothing = Node({}, f"{path}:1")
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(_MAX_LETTERS + 1)
        except FileNotFoundError:
            self._fail(str(path), f"no such file{hint(path) or _near_file(path)}")
            return nothing
        except OSError as error:
            if is_transient(error):
                raise TransientError(f"{path}: cannot be read: {error.strerror}") from None
            self._fail(str(path), f"cannot be read: {error.strerror}")
            return nothing
        except UnicodeDecodeError as error:
            self._fail(str(path), f"cannot be read: not UTF-8 text (byte {error.start})")
            return nothing
        except ValueError:  # a NUL
            self._fail(str(path), "is no name of a file")
            return nothing
        try:
            node = self._parse(text, lambda line: f"{path}:{line}")
        except _Syntax as error:
            self._fail(f"{path}:{error.line}", str(error))
            return nothing
        if node.value is None:
            return nothing
        if not isinstance(node.value, dict):
            self._fail(node.origin, f"top level must be `key: value` lines, got {describe(node.plain())}")
            return nothing
        return node

    def _override(self, text: str) -> Node:
        origin = f"override '{text if len(text) <= 80 else text[:77] + '...'}'"
        name, equals, value = text.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts) or len(parts) > _MAX_DEPTH:
            self.faults.append(f"{origin}: expected a.b.c=value")
            return Node({}, origin)
        try:
            node = self._parse(value, lambda line: origin)
            _check_whole(value, node.value)
        except _Syntax as error:
            self.faults.append(f"{origin}: {error}")
            return Node({}, origin)
        for part in reversed(parts):
            node = Node({part: node}, origin)
        return node

    def _parse(self, text: str, origin: Callable[[int], str]) -> Node:
        """YAML text as a Node. Raises _Syntax; faults that leave the rest readable are collected instead."""
        if len(text) > _MAX_LETTERS:
            raise _Syntax(1, f"longer than {_MAX_LETTERS:,} letters; a long list of tables is JSON or Parquet")
        try:
            loader = ScalarLoader(text)
            root = loader.get_single_node()
            return Node(None, origin(1)) if root is None else self._convert(loader, root, origin, 0)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            problem = " ".join(str(error.problem or error.context).split())
            raise _Syntax(mark.line + 1 if mark else 1, f"not valid YAML: {problem}") from None
        except yaml.YAMLError as error:
            raise _Syntax(1, f"not valid YAML: {' '.join(str(error).split())}") from None
        except RecursionError:
            raise _Syntax(1, f"nested more than {_MAX_DEPTH} levels deep") from None

    def _convert(self, loader: ScalarLoader, node: yaml.Node, origin: Callable[[int], str], depth: int) -> Node:
        line = node.start_mark.line + 1
        if depth > _MAX_DEPTH:
            raise _Syntax(line, f"nested more than {_MAX_DEPTH} levels deep")
        if isinstance(node, yaml.MappingNode):
            return Node(self._convert_mapping(loader, node, origin, depth), origin(line))
        if isinstance(node, yaml.SequenceNode):
            return Node([self._convert(loader, item, origin, depth + 1) for item in node.value], origin(line))
        try:
            value = loader.construct_object(node)
        except ValueError as error:
            raise _Syntax(line, f"not a usable value: {error}") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise _Syntax(line, f"not a usable value: {node.value} is not a finite number")
        if isinstance(value, str):
            try:  # JSON writes a letter beyond 16 bits as a pair of escapes, which PyYAML leaves apart
                value = value.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                raise _Syntax(line, "not a usable value: text with half of a surrogate pair") from None
        return Node(value, origin(line))

    def _convert_mapping(
        self, loader: ScalarLoader, node: yaml.MappingNode, origin: Callable[[int], str], depth: int
    ) -> dict[str, Node]:
        result: dict[str, Node] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value
            if key_node.tag != "tag:yaml.org,2002:str":
                shown = key if isinstance(key, str) else "of this entry"
                self.faults.append(f"{origin(line)}: key {shown} is not text; put it in quotes")
                continue
            if key in lines:
                self.faults.append(f"{origin(line)}: duplicate key '{key}', first at line {lines[key]}; keep one")
                continue
            lines[key] = line
            child = self._convert(loader, value_node, origin, depth + 1)
            result[key] = Node(child.value, origin(line))  # the key's line is the one to look at, not the value's
        return result


def _check_whole(text: str, value: Any) -> None:
    """Raises _Syntax where YAML reads less than was typed: it drops comments, and folds line breaks into blanks."""
    tokens = [token for token in yaml.scan(text, Loader=ScalarLoader) if not isinstance(token, _ENDS)]
    dropped = text[tokens[-1].end_mark.index if tokens else 0 :].strip() or any(isinstance(t, _LOST) for t in tokens)
    is_plain = len(tokens) == 1 and isinstance(tokens[0], yaml.ScalarToken) and tokens[0].plain
    if dropped or (is_plain and isinstance(value, str) and value != text):
        raise _Syntax(1, f"YAML reads {describe(value)} of it: put the text in quotes of its own, KEY.PATH='\"TEXT\"'")


def _near_file(path: Path) -> str:
    """A question whether the file of the nearest name in its folder was meant; empty where there is none."""
    try:
        stems = [each.stem for each in path.parent.iterdir() if each.suffix == path.suffix]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.stem, stems, n=1, cutoff=0.6)
    return f"; did you mean {path.with_name(near[0] + path.suffix)}?" if near else ""


def describe(value: Any) -> str:
    """A value as a fault shows it: short, in YAML's words."""
    if isinstance(value, dict):
        return "a section" if value else "an empty section"
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "nothing (null)"
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
