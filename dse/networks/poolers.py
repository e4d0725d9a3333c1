"""From the hidden states of a BERT's last layers to one vector per sentence.

A pooler's name says three things: `concat_top` puts the k layers side by side, the lowest first, and
`mean_top` averages them; `mean`, `sqrt_mean` or `max` is taken over the tokens; `with_cls` keeps
position 0, `[CLS]`, which the others leave out. `[SEP]` always counts. (`cls`, BERT's own tanh pooler,
needs no hidden states and lives in models.py.)

    >>> hidden = [torch.tensor([[[9.0], [1.0], [3.0], [7.0]]])]  # [CLS] x [SEP] [PAD]
    >>> pool("concat_top_mean", hidden, torch.tensor([[1, 1, 1, 0]]))  # (1 + 3) / 2
    tensor([[2.]])
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def pool(pooler_type: str, layers: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
    """Pool hidden states into sentence vectors.

    Args:
        pooler_type: one of config.POOLER_TYPES but `cls`.
        layers: the k last layers' hidden states, lowest first, each (batch, length, hidden), float.
        attention_mask: (batch, length), 1 for tokens and 0 for padding.

    Returns:
        (batch, k * hidden) for `concat_top_…`, (batch, hidden) for `mean_top_…`.
    """
    over_tokens = pooler_type.removesuffix("_with_cls").split("_top_")[1]
    mask = attention_mask.to(layers[0].dtype)
    if not pooler_type.endswith("_with_cls"):
        mask = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, 1:]], dim=1)
    if pooler_type.startswith("mean_top"):
        # Mean over the layers comes first: it does not commute with the maximum over tokens.
        layers = [torch.stack(tuple(layers)).mean(dim=0)]
    return torch.cat([_over_tokens(over_tokens, hidden, mask) for hidden in layers], dim=-1)


def _over_tokens(how: str, hidden: Tensor, mask: Tensor) -> Tensor:
    """(batch, length, hidden) and (batch, length) to (batch, hidden)."""
    if how == "max":
        return hidden.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(dim=1)
    # A product of (1, length) and (length, hidden) per sentence: no masked copy of the hidden states.
    total = torch.bmm(mask.unsqueeze(1), hidden).squeeze(1)
    count = mask.sum(dim=1, keepdim=True)
    return total / (count.sqrt() if how == "sqrt_mean" else count)
