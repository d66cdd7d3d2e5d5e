"""How vectors of tables travel between ranks: the types they are sent in."""

from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
from torchrec.distributed.types import CommOp, QuantizedCommCodecs

from gr.config.inventory import CommDtype

_OPERATIONS = (
    CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL,
    CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL,
    CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER,
)


def codecs(dtypes: CommDtype) -> dict[str, QuantizedCommCodecs] | None:
    """The codec of each collective, for TorchRec's sharders; None where nothing is converted.

    TorchRec's own registry takes fp16 for bf16 on CPU with a warning; gloo has sent bf16 since.
    """
    if dtypes == CommDtype():
        return None
    config = QCommsConfig(CommType(dtypes.forward), CommType(dtypes.backward))
    return {operation.name: get_qcomm_codecs(config) for operation in _OPERATIONS}
