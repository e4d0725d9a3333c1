"""From the hidden states of a BERT's last layers to one vector per sentence.

A pooler says how layers are combined (`concat_top` puts them side by side, the lowest first, `mean_top` averages
them), what is taken over the tokens (`mean`, `sqrt_mean` or `max`), and whether position 0, `[CLS]`, counts: only in
the forms `…_with_cls`. `[SEP]` always counts. `cls` is BERT's own tanh pooler.

A new pooler is a line here, and a branch of `_over_tokens` where it takes something else over the tokens. The module
loads no torch at import, so that flags that name poolers are checked at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pooler:
    """How hidden states become one vector."""

    side_by_side: bool = False  # layers next to each other; otherwise their mean
    over_tokens: str = ""  # mean, sqrt_mean or max; empty: BERT's own tanh pooler, which needs no hidden states
    with_cls: bool = False  # does position 0 count?

    @property
    def is_berts(self) -> bool:
        """Is it BERT's own tanh pooler?"""
        return not self.over_tokens

    def pool(self, layers: "Sequence[Tensor]", attention_mask: "Tensor") -> "Tensor":
        """Sentence vectors, (batch, k * hidden) side by side, (batch, hidden) otherwise.

        Args:
            layers: the k last layers' hidden states, lowest first, each (batch, length, hidden), float.
            attention_mask: (batch, length), 1 for tokens and 0 for padding.

        >>> import torch
        >>> hidden = [torch.tensor([[[9.0], [1.0], [3.0], [7.0]]])]  # [CLS] x [SEP] [PAD]
        >>> POOLERS["concat_top_mean"].pool(hidden, torch.tensor([[1, 1, 1, 0]]))  # (1 + 3) / 2
        tensor([[2.]])
        """
        import torch

        mask = attention_mask.to(layers[0].dtype)
        if not self.with_cls:
            mask = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, 1:]], dim=1)
        if not self.side_by_side:
            # Mean over the layers comes first: it does not commute with the maximum over tokens.
            layers = [torch.stack(tuple(layers)).mean(dim=0)]
        return torch.cat([self._over_tokens(hidden, mask) for hidden in layers], dim=-1)

    def _over_tokens(self, hidden: "Tensor", mask: "Tensor") -> "Tensor":
        """(batch, length, hidden) and (batch, length) to (batch, hidden)."""
        if self.over_tokens == "max":
            return hidden.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(dim=1)
        # A product of (1, length) and (length, hidden) per sentence: no masked copy of the hidden states.
        total = mask.unsqueeze(1).bmm(hidden).squeeze(1)
        count = mask.sum(dim=1, keepdim=True)
        return total / (count.sqrt() if self.over_tokens == "sqrt_mean" else count)


POOLERS = {
    f"{layers}_{tokens}{ending}": Pooler(layers == "concat_top", tokens, ending == "_with_cls")
    for ending in ("", "_with_cls")
    for layers in ("concat_top", "mean_top")
    for tokens in ("mean", "sqrt_mean", "max")
} | {"cls": Pooler()}
