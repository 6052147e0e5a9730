"""Adapters with every key of PEFT's LoRA: what training starts from, merges and writes is what PEFT's forward says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.errors import ConfigError
from tests.unit.training.test_adapter_start import adapter, margins, scores, train

__all__ = ["adapter"]  # a fixture

KINDS: dict[str, dict[str, Any]] = {
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 9}, "layers_to_transform": [1]},
    "bias": {"lora_bias": True, "use_rslora": True, "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "biases": {"bias": "all"},
    "pissa": {"init_lora_weights": "pissa"},
    "whole": {"modules_to_save": ["norm", "lm_head"]},
    "tied": {"target_modules": ["q_proj", "embed_tokens"]},
    "tied-whole": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "experts": {"target_modules": [], "target_parameters": ["experts.gate_up_proj"], "lora_dropout": 0.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lora_is_read_merged_and_written_as_peft_does(
    kind: str, tmp_path: Path, tiny_qwen2: Path, pairs_file: Path
) -> None:
    """Tied: merged into the one weight that head and embeddings share, the adapter of either would change both."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = other_base(tmp_path / "base", tiny_qwen2, kind)
    keys = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5, **KINDS[kind]}
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**keys))
    torch.manual_seed(3)
    for value in (value for value in model.parameters() if value.requires_grad):
        torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(tmp_path / "a")
    made = train(tmp_path / "on", pairs_file, model_name_or_path=str(tmp_path / "a"), learning_rate=1e-9)
    expected = scores(base, tmp_path / "a", pairs_file)
    for row in margins(made):
        assert [row["ref_chosen_logps"], row["ref_rejected_logps"]] == pytest.approx(expected[row["pair_id"]], abs=1e-4)
    ids = torch.arange(3, 40)[None]
    logits = [
        written.eval()(input_ids=ids).logits
        for written in (
            AutoModelForCausalLM.from_pretrained(made / "out"),
            peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), made / "out" / "adapter"),
            model,
        )
    ]
    assert torch.allclose(logits[0], logits[2], atol=1e-4)
    assert torch.allclose(logits[1], logits[2], atol=1e-4)


def other_base(folder: Path, tiny_qwen2: Path, kind: str) -> Path:
    """The base for a kind: one with a head of its own, one without, or one of experts."""
    from transformers import AutoTokenizer, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    AutoTokenizer.from_pretrained(tiny_qwen2).save_pretrained(folder)
    said = json.loads((tiny_qwen2 / "config.json").read_text())
    config = Qwen2ForCausalLM.config_class(**{**said, "tie_word_embeddings": kind.startswith("tied")})
    if kind == "experts":
        sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
        moe = {key: value for key, value in said.items() if key not in ("layer_types", "model_type", "architectures")}
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**moe, **sizes})).save_pretrained(folder)
    else:
        Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_an_adapter_that_begins_at_tokens_is_a_reference_row_by_row(
    tmp_path: Path, tiny_qwen2: Path, adapter: Path, pairs_file: Path
) -> None:
    from transformers import AutoTokenizer

    begins = AutoTokenizer.from_pretrained(tiny_qwen2)("<|im_end|>")["input_ids"]  # the last one of a row counts
    folder = shutil.copytree(adapter, tmp_path / "a")
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**said, "alora_invocation_tokens": begins}))
    keys = {"model_name_or_path": str(tiny_qwen2), "ref_name": str(folder)}
    with pytest.raises(ConfigError, match="layout=pairwise"):
        train(tmp_path / "group", pairs_file, layout="group", **keys)
    made = train(tmp_path / "rows", pairs_file, layout="pairwise", **keys)
    expected = scores(tiny_qwen2, folder, pairs_file)
    for row in margins(made):
        assert [row["ref_chosen_logps"], row["ref_rejected_logps"]] == pytest.approx(expected[row["pair_id"]], abs=1e-4)
