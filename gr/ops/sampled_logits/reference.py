"""The definition of sampled logits. T tokens, S samples a token, K items, D width."""

from torch import Tensor


def sampled_logits_reference(queries_TD: Tensor, items_KD: Tensor, index_TS: Tensor) -> Tensor:
    """logits[t, s] = queries[t] . items[index[t, s]], by gathering [T, S, D]. Differentiable; any float dtype."""
    return (queries_TD[:, None, :] * items_KD[index_TS]).sum(-1)
