"""No rank has the whole model in memory while a reference is loaded and scored in shards."""

from __future__ import annotations

from pathlib import Path

import pytest
from strategy_runs import SLOW_IMPORTS, STRATEGIES

from benchmarks.reference_memory import measure, write_model
from tests.forked_ranks import import_before_the_forks

SIZE = {
    "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 16, "num_attention_heads": 8,
    "num_key_value_heads": 8,
}  # fmt: skip


@pytest.mark.slow
def test_a_rank_holds_half_a_model_and_a_few_layers(tmp_path: Path) -> None:
    """Stored in bf16, kept in fp32; loaded whole it would be 1 and more, as ZeRO-3's rank 1 had 1.5."""
    import_before_the_forks(*SLOW_IMPORTS)
    total = write_model(tmp_path, SIZE)
    for family, strategy in (("causal", "fsdp"), ("mdlm", "zero3")):
        for share in measure(tmp_path, family, STRATEGIES[strategy], total):
            assert 0.45 < share < 0.85, (family, strategy)
