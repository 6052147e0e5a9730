"""Positions of which a model has two sets: LongRoPE (arXiv 2402.13753), as in Phi 3.5 and Phi 4 mini."""

from __future__ import annotations

from typing import Any


def position_border(config: Any) -> int | None:
    """The length up to which LongRoPE has its short factors; None for any other kind of positions.

    transformers chooses by the longest row of each forward: a row's numbers would depend on what stands beside it,
    and a prompt that is read in pieces would have both sets.
    """
    given = getattr(config.get_text_config(), "rope_parameters", None) or {}
    # By kind of layer where layers differ.
    for rope in (given, *(value for value in given.values() if isinstance(value, dict))):
        if rope.get("rope_type") == "longrope":
            return int(rope["original_max_position_embeddings"])
    return None
