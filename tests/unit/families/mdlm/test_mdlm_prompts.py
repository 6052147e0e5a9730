"""mdlm_evaluate writes an answer to every held-out prompt, whatever turns it has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.config import validate
from prefmill.families.causal.chat import prompt_text
from prefmill.families.mdlm.evaluate_config import DiffusionEvaluationConfig
from prefmill.families.mdlm.evaluated_model import Loaded, WrittenAnswer
from prefmill.families.mdlm.evaluation import _generation_rows
from prefmill.store.missing import silent
from prefmill.training.data import PreferencePair
from tests.tiny import make_tokenizer

ASKED = {"role": "user", "content": "how is the table"}
CHATS: list[list[dict[str, Any]]] = [
    [ASKED],
    [{"role": "system", "content": "Be brief."}, ASKED],
    [ASKED],  # once more: answered once
    [ASKED, {"role": "assistant", "content": "old"}, {"role": "user", "content": "and the chair"}],
]


def test_prompts_of_several_turns_are_answered_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs with a system prompt or earlier turns were left out: no answers, no `ended share`, and not a word of it."""
    tokenizer, read = make_tokenizer(), []

    def continuations(_: Loaded, prompts: Sequence[list[int]], how: object) -> list[WrittenAnswer]:
        read.extend(tokenizer.decode(prompt) for prompt in prompts)
        return [WrittenAnswer(str(number), True) for number, _ in enumerate(prompts)]

    config = validate(DiffusionEvaluationConfig, {"samples_per_prompt": 2, "temperature": 1.0})
    monkeypatch.setattr(Loaded, "continuations", continuations)
    loaded = Loaded("model", None, tokenizer, 0, False, None, config, tmp_path, silent)
    pairs = [PreferencePair(str(place), "g", chat, "yes", "no") for place, chat in enumerate(CHATS)]
    rows = list(_generation_rows(loaded, pairs))
    wanted = [prompt_text(tokenizer, chat) for chat in (CHATS[0], CHATS[1], CHATS[3])]
    assert read == [text for text in wanted for _ in range(2)]
    assert [row["prompt"] for row in rows[:2]] == [ASKED["content"]] * 2
    assert len({row["prompt"] for row in rows}) == 3
