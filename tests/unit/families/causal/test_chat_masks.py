"""Which tokens of a chat are trained, beside TRL's templates for training, which mark the assistant's words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from prefmill.demo.tokenizer import train_chat_tokenizer
from prefmill.families.causal.chat import encode_turns

TOOL = {"type": "function", "function": {"name": "weather", "description": "It", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": "a city"}}, "required": ["city"],
}}}  # fmt: skip
CONTROL = re.compile(r"<\|\w+\|>|<(?:start|end)_of_turn>|</?s>")


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def calls(*cities: str) -> list[dict[str, Any]]:
    asked = ({"name": "weather", "arguments": {"city": city}} for city in cities)
    return [{"type": "function", "id": f"abcdefgh{place}", "function": call} for place, call in enumerate(asked)]


CHAT = [said("user", "Say yes."), said("assistant", "Yes."), said("user", "No?"), said("assistant", "No,\n\nnever.")]
RESULTS = [said("tool", text, name="weather", tool_call_id=f"abcdefgh{n}") for n, text in enumerate(("sun", "rain"))]
CALLED = [said("user", "Rome? Bonn?"), said("assistant", "", tool_calls=calls("Rome", "Bonn")), *RESULTS,
          said("assistant", "Sun and rain."), said("user", "Thanks."), said("assistant", "Bye.")]  # fmt: skip
CASES = {
    **dict.fromkeys(("cohere2", "gemma3", "llama3", "qwen2_5_vl"), ([CHAT], [])),
    **dict.fromkeys(("glm4moe", "lfm2_v2", "qwen3", "qwen3_instruct_2507", "qwen3_vl"), ([CHAT, CALLED], [TOOL])),
}


@pytest.mark.parametrize("name", CASES)
def test_every_assistant_turn_is_trained_as_trls_template_marks_it(name: str) -> None:
    import trl

    tokenizer: Any = train_chat_tokenizer(["Say yes. Yes, of course. No. Rome and Bonn, sun and rain"] * 3, 400)
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}_training.jinja").read_text("utf-8")
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(CONTROL.findall(template)) | {"<s>"})})
    tokenizer.bos_token, tokenizer.chat_template = "<s>", template
    chats, tools = CASES[name]
    for chat in chats:
        places = [place for place, turn in enumerate(chat) if turn["role"] == "assistant"]
        ids, trained = encode_turns(tokenizer, chat, places, tools)
        theirs = tokenizer.apply_chat_template(
            chat, tools=tools or None, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids == theirs["input_ids"][: len(ids)]
        assert trained == [bool(marked) for marked in theirs["assistant_masks"][: len(ids)]]
        assert not any(theirs["assistant_masks"][len(ids) :])
