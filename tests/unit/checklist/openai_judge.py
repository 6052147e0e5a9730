"""A server that judges as an OpenAI completions server does, and an engine that asks it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefmill.checklist.engine import OpenAIConfig as Config
from prefmill.checklist.engine import Outcome
from prefmill.checklist.engines import open_engine
from prefmill.checklist.items import load_checklist
from tests.loopback import Reply

CHECKLIST = load_checklist()
KEY = "sk-very-secret-0815"


def reviews(texts: list[str]) -> list[Any]:
    return [{"review_id": f"r{n}", "paper_id": "p0", "text": text} for n, text in enumerate(texts)]


def reply(status: int, content: Any, **headers: str) -> Reply:
    return status, headers, json.dumps(content).encode()


class Judge:
    """Answers as a completions server does, with log-odds that follow from a prompt's tokens; `trouble` comes first."""

    def __init__(self) -> None:
        self.trouble: list[Reply | None] = []
        self.max_model_len: int | None = 1500
        self.change = lambda content: content
        self.bodies: list[dict[str, Any]] = []
        self.quote: str | Reply = ""

    def __call__(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Reply | None:
        if method == "GET":
            return reply(200, {"data": [{"id": "judge", "max_model_len": self.max_model_len}, {"id": "other"}]})
        if self.trouble:
            return self.trouble.pop(0)
        asked = json.loads(body)
        self.bodies.append(asked)
        if "structured_outputs" in asked:
            return self.quote if isinstance(self.quote, tuple) else reply(200, self._quotes(asked["prompt"]))
        yes, no = asked["allowed_token_ids"]
        choices = [
            {
                "index": index,
                "text": "Yes",
                "logprobs": {"top_logprobs": [{f"token_id:{yes}": -1.0, f"token_id:{no}": -1.0 - sum(ids) % 97 / 40}]},
            }
            for index, ids in enumerate(asked["prompt"])
        ]
        tokens = {"prompt_tokens": sum(map(len, asked["prompt"]))}
        return reply(200, self.change({"choices": choices[::-1], "usage": tokens}))

    def _quotes(self, prompts: list[list[int]]) -> Any:
        written = json.dumps({"quote": self.quote})
        return {"choices": [{"index": index, "text": written} for index in range(len(prompts))]}


def engine(model: Path, **settings: Any) -> Any:
    settings = {"served_model_name": "judge", "num_retries": 2, "reviews_in_flight": 3, **settings}
    return open_engine(Config(model_name_or_path=str(model), **settings), CHECKLIST)


def p_yes(outcomes: list[Outcome]) -> list[list[float]]:
    return [[answer["p_yes"] for answer in outcome.answers.values()] for outcome in outcomes]
