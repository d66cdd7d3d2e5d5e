"""Compiles a Triton kernel for a GPU that is not there, and counts what came out. Needs no driver: triton has ptxas."""

import collections
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_]+)", re.MULTILINE)


@dataclass(frozen=True)
class Compiled:
    """counts: instructions by name, without their suffixes. shared: bytes."""

    counts: collections.Counter[str]
    shared: int
    registers: int

    @property
    def spills(self) -> int:
        return self.counts["LDL"] + self.counts["STL"]

    @property
    def pipelined_loads(self) -> int:
        return self.counts["LDGSTS"] + self.counts["UTMALDG"]


def compile_for(
    kernel: Any,
    arch: int,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    warps: int,
    stages: int = 1,
    unaligned: frozenset[str] = frozenset(),
) -> Compiled:
    """types: by argument, "*bf16", "i32", ...; constants: compile-time values, None for an absent pointer.

    Pointers and strides (*_row, *_head) are promised to be multiples of 16, as the launcher finds them: without that
    loads are scalar, and nothing is pipelined.
    """
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [
        index
        for index, name in enumerate(names)
        if name not in unaligned and (signature[name].startswith("*") or name.endswith(("_row", "_head")))
    ]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages}
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        code = _tool("nvdisasm", "-c", file.name)
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return Compiled(collections.Counter(_INSTRUCTION.findall(code)), done.metadata.shared, int(registers[1]))


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_BIN / name), *arguments], capture_output=True, text=True, check=True).stdout
