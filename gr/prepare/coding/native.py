"""The C++ of coding.cpp, and which of it and the reference is used.

B rows, V values.
"""

import ctypes
import functools
from ctypes import c_bool, c_int64, c_void_p
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from gr.errors import DataError, InstallError
from gr.logging import get_logger
from gr.ops import compiler
from gr.prepare.coding.reference import ReferenceCodes, order_reference

_logger = get_logger(__name__)
_SOURCE = Path(__file__).with_name("coding.cpp")
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fPIC", "-fno-strict-aliasing", "-shared")
_NO_ROOM = "there is no memory for the codes of so many values, or they are more than 2^31; take a part of the log"


class Codes(Protocol):
    """See ReferenceCodes."""

    def __len__(self) -> int: ...

    def encode(self, values: pa.Array) -> np.ndarray: ...

    def values(self) -> pa.Array: ...


def new_codes(kind: pa.DataType) -> Codes:
    """Codes for values of a type, string or int64."""
    library = _library()
    return ReferenceCodes(kind) if library is None else NativeCodes(library, kind)


def order_of(user_B: np.ndarray, time_B: np.ndarray | None, users: int) -> np.ndarray:
    """As order_reference; user_B: int32 in [0, users). time_B: int64."""
    library = _library()
    if library is None:
        return order_reference(user_B, time_B)
    user_B = np.ascontiguousarray(user_B, dtype=np.int32)
    time_B = None if time_B is None else np.ascontiguousarray(time_B, dtype=np.int64)
    order_B = np.empty(len(user_B), dtype=np.int32)
    time = None if time_B is None else time_B.ctypes.data
    if not library.gr_order(user_B.ctypes.data, time, len(user_B), users, order_B.ctypes.data):
        raise MemoryError(f"no room for {users:,} users")
    return order_B


class NativeCodes:
    """ReferenceCodes in C++."""

    def __init__(self, library: ctypes.CDLL, kind: pa.DataType) -> None:
        self._library, self._kind = library, kind
        self._codes = library.gr_codes_new()
        if not self._codes:
            raise DataError(_NO_ROOM)

    def __del__(self) -> None:
        if getattr(self, "_codes", None):
            self._library.gr_codes_free(self._codes)

    def __len__(self) -> int:
        return int(self._library.gr_codes_count(self._codes))

    def encode(self, values: pa.Array) -> np.ndarray:
        assert values.type == self._kind
        valid, *rest = values.buffers()
        addresses = [None if buffer is None else buffer.address for buffer in (valid, *rest)]
        code_B = np.empty(len(values), dtype=np.int32)
        bitmap = addresses[0] if values.null_count else None
        offsets, data = (None, addresses[1]) if len(rest) == 1 else (addresses[1], addresses[2])
        place = (values.offset, len(values), code_B.ctypes.data)
        if not self._library.gr_codes_encode(self._codes, offsets, data, bitmap, *place):
            raise DataError(_NO_ROOM)
        return code_B

    def values(self) -> pa.Array:
        count, size = len(self), self._library.gr_codes_bytes(self._codes)
        offset_V, data = np.empty(count + 1, dtype=np.int64), np.empty(size, dtype=np.uint8)
        self._library.gr_codes_copy(self._codes, offset_V.ctypes.data, data.ctypes.data)
        if pa.types.is_integer(self._kind):
            return pa.Array.from_buffers(self._kind, count, [None, pa.py_buffer(data)])
        return pa.Array.from_buffers(pa.large_string(), count, [None, pa.py_buffer(offset_V), pa.py_buffer(data)])


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled operators; None, which is logged, where they cannot be built."""
    try:
        name = f"coding-{compiler.fingerprint([_SOURCE], _FLAGS)}"
        library = ctypes.CDLL(str(compiler.library(name, [_SOURCE], _FLAGS)))
    except (InstallError, OSError) as error:
        _logger.warning("the log is read by plain Python, which is several times slower: %s", error)
        return None
    signatures = {
        "gr_codes_new": (c_void_p, []),
        "gr_codes_free": (None, [c_void_p]),
        "gr_codes_count": (c_int64, [c_void_p]),
        "gr_codes_bytes": (c_int64, [c_void_p]),
        "gr_codes_copy": (None, [c_void_p] * 3),
        "gr_codes_encode": (c_bool, [*[c_void_p] * 4, c_int64, c_int64, c_void_p]),
        "gr_order": (c_bool, [c_void_p, c_void_p, c_int64, c_int64, c_void_p]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
