"""Which keys a query sees, in the model's own words: the mask function that it would give its own attention.

transformers' models ask for a mask by layer kind (window, chunk, full). Instead of a mask over the packed row they are
handed the function, which group attention asks about places in one sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

GROUP_ATTENTION = "prefmill_group"  # its name among transformers' attention implementations


@dataclass(frozen=True)
class MaskPattern:
    """`sees(batch, head, query, key)` on int64 places is bool; no query sees further back than `reach` tokens.

    `reach` counts the query itself and is None without such a bound; `window` says that it is all. `ahead`: a query may
    see keys behind itself (tokens of one image).
    """

    sees: Callable[[int, int, Tensor, Tensor], Tensor] = causal_mask_function
    reach: int | None = None
    window: bool = False
    ahead: bool = False

    def first_key(self, query: int) -> int:
        """The first key that a query at this place may see."""
        return 0 if self.reach is None else max(0, query + 1 - self.reach)

    def mask(self, queries: range, keys: range, device: torch.device) -> Tensor:
        """What these places see of these, [queries, keys] bool."""
        places = (torch.arange(span.start, span.stop, device=device) for span in (queries, keys))
        query, key = next(places)[:, None], next(places)[None]
        # A pattern may look at queries alone or at keys alone, and then gives a single column or row.
        return torch.as_tensor(self.sees(0, 0, query, key)).expand(len(queries), len(keys))


def is_causal(pattern: MaskPattern | None, length: int) -> bool:
    """Whether `pattern` is plain causal attention in sequences of `length` tokens: a window as long is none."""
    return pattern is None or (not pattern.ahead and pattern.reach is not None and pattern.reach >= length)


def register() -> None:
    """Have models with group attention make patterns where they would make masks."""
    AttentionMaskInterface.register(GROUP_ATTENTION, _pattern)


def _pattern(
    *,
    mask_function: Any,
    config: Any,
    local_size: int | None = None,
    use_vmap: bool = False,
    allow_is_causal_skip: bool = True,
    **_: Any,
) -> MaskPattern | None:
    # transformers hands on this very function unless something was laid over it; without a mask kernels are faster.
    if mask_function is causal_mask_function:
        return None
    # Only a function that transformers made of the window alone is one: callers may have laid others over it.
    window = not use_vmap and local_size is not None and local_size == getattr(config, "sliding_window", None)
    return MaskPattern(mask_function, local_size, window, ahead=use_vmap or not allow_is_causal_skip)
