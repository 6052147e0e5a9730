"""A tiny judge that says yes to everything and always quotes one sentence, so that evidence is found and missed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

QUOTED = "Table 3 shows gains."
TRAINING_WORDS = [*[QUOTED] * 50, *['"}'] * 50]  # for its tokenizer


def save_quoting_model(folder: Path, tokenizer: Any) -> Path:
    """A Qwen2 whose layers do nothing: its next token follows from the last one alone.

    After a prompt's last token comes Yes, after a quotation mark QUOTED and the end of the JSON.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    said = [*ids(QUOTED), *ids('"}'), tokenizer.eos_token_id]
    assert len(set(said)) == len(said), said  # else one token had two followers
    quotation, colon = ids('"')[0], ids(":")[0]
    followers = [(ids("\n")[-1], ids("Yes")[0]), (colon, quotation), (quotation, said[0]), *pairwise(said)]
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "o_proj" in name or "down_proj" in name or "lm_head" in name:
                weights.zero_()
        embedded = torch.nn.functional.normalize(torch.randn(len(tokenizer), 128), dim=1)
        model.model.embed_tokens.weight.copy_(embedded)
        for before, after in followers:
            model.lm_head.weight[after] += 3 * embedded[before]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
