"""Values of a request -> ids of the model."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from gr.data.vocabulary import Vocabulary
from gr.errors import DataError
from gr.serving.servable import RequestError


def ids_of(field: str, values: np.ndarray, vocabulary: Vocabulary, size: int) -> np.ndarray:
    """The id of each value, int64 [n]; 0 for one that the model does not know. size: ids are below it.

    Text may be bytes of UTF-8, as a protocol has it. Raises RequestError where the values have more than one dimension
    or are of another kind than the vocabulary's.
    """
    if values.ndim != 1:
        raise RequestError(field, f"has shape {list(values.shape)}, it must have one dimension")
    if not len(values):
        return np.empty(0, np.int64)
    if vocabulary.has_numbers and values.dtype == np.int64:  # most of the time of a small request would go to Arrow
        ids, _ = vocabulary.ids_of_numbers(values)
    else:
        try:
            array = pa.array(values)
            ids = vocabulary.ids(array.cast(pa.string()) if pa.types.is_binary(array.type) else array)
        except (pa.ArrowException, DataError, UnicodeError) as error:
            raise RequestError(field, f"cannot be read ({'; '.join(map(str, error.args))})") from None
    return np.where((ids > 0) & (ids < size), ids, 0)  # where ids stand for themselves, any number has come through


def warm_up(vocabularies: Iterable[Vocabulary]) -> None:
    """Where a request's values go through Arrow, imports what Arrow imports with its first array: pandas.

    That takes a second, for which no request should wait.
    """
    if not all(vocabulary.has_numbers for vocabulary in vocabularies):
        pa.array(np.empty(0))
