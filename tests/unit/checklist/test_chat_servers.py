"""The chat engine before servers in the wild, each faked by its public documentation: used, refused or told."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefmill.checklist.engine import ChatConfig
from prefmill.checklist.engines import open_engine
from prefmill.checklist.items import Checklist, load_checklist
from prefmill.checklist.judge_probes import Sampled
from prefmill.checklist.judge_probes import ask as ask_probes
from prefmill.checklist.optimize.dev_scores import score_dev
from prefmill.checklist.throughput import Pace
from prefmill.core.errors import InputError, PrefmillError
from prefmill.evaluation.held_out import score_generations
from tests.loopback import Reply, serving

CHECKLIST = load_checklist()
FEW = Checklist(name="few", items=CHECKLIST.items[:2])
PAPER: Any = {"paper_id": "p0", "title": "Sparse masks", "abstract": "We study masks.", "text": ""}
REVIEW: Any = {"review_id": "r0", "paper_id": "p0", "text": "Fine. " * 2000}
Answer = Callable[[dict[str, Any]], tuple[int, Any]]


def likeliest(message: Any = None, first: str = "Yes", **more: Any) -> Any:
    top = [{"token": token, "logprob": math.log(share)} for token, share in ((first, 0.6), ("No", 0.2))]
    logprobs = {"content": [{"token": first, "top_logprobs": top}]}
    return {"choices": [{"message": message or {"content": "Yes"}, "logprobs": logprobs}], **more}


def sampled(*texts: str, **more: Any) -> Any:
    return {"choices": [{"message": {"content": text, **more}} for text in texts]}


def ask(
    monkeypatch: pytest.MonkeyPatch, answer: Answer, path: str = "", checklist: Checklist = CHECKLIST, **settings: Any
) -> Any:
    def respond(method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        status, content = answer(json.loads(body))
        return status, {"Retry-After": "0"}, json.dumps(content).encode()

    with serving(respond) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url + path)
        engine = open_engine(ChatConfig(model_name_or_path="judge", num_retries=1, **settings), checklist)
        (found,) = engine.score([(PAPER, [REVIEW])])
        return found


AZURE_FILTER = {
    "error": {
        "message": "The response was filtered due to the prompt", "type": None, "param": "prompt",
        "code": "content_filter", "status": 400, "innererror": {"code": "ResponsibleAIPolicyViolation"},
    }
}  # fmt: skip
FAILED: dict[str, tuple[int, Any, str]] = {
    "Azure: a filtered prompt": (400, AZURE_FILTER, "400.*was filtered"),
    "Azure: a filtered answer": (200, {"choices": [{"finish_reason": "content_filter", "message": {}}]}, "withholds"),
    "OpenRouter: a provider's error": (
        200,
        {"choices": [{"finish_reason": "error", "error": {"code": 502, "message": "gone"}, "message": {}}]},
        "withholds an answer.*gone",
    ),
    "TGI: too many likeliest tokens": (
        422,
        {"error": "Input validation error: `top_n_tokens` must be <= 5. Given: 20", "error_type": "validation"},
        "422.*top_n_tokens",
    ),
    "llama.cpp: too long": (
        400,
        {"error": {"code": 400, "message": "the request exceeds the available context size", "n_ctx": 4096}},
        "400.*context size",
    ),
    "SGLang: too long": (400, {"object": "error", "message": "The input (5000 tokens) is longer"}, "400.*longer"),
    "SGLang: a thought": (
        200,
        {"choices": [{"message": {"content": None, "reasoning_content": "Okay"}, "logprobs": None}]},
        "of the model's thought",
    ),
    "vLLM: a thought": (200, likeliest({"content": None, "reasoning": "Yes"}), "of the model's thought"),
}
STOPPED: dict[str, tuple[str, int, Any, str]] = {
    "Azure's older address": ("/openai/deployments/gpt?api-version=2024-10-21", 200, {}, "ends in /openai/v1"),
    "Azure: no version": ("/openai/deployments/gpt", 404, {"error": {"code": "404"}}, "nothing at this address"),
    "Azure: a key of another": ("", 401, {"error": {"code": "401"}}, "refuses the key"),
    "OpenRouter: an error in a 200": ("", 200, {"error": {"code": 502, "message": "Provider"}}, "did not answer"),
    "OpenRouter: null logprobs": ("", 200, {**sampled("Yes", reasoning=None)}, "gives no log-probabilities"),
    "TGI: overloaded": ("", 429, {"error": "Model is overloaded", "error_type": "overloaded"}, "did not answer"),
    "Ollama: no logprobs": ("", 200, {**sampled("Yes"), "object": "chat.completion"}, "gives no log-probabilities"),
    "Ollama: no such model": ("", 404, {"error": {"message": 'model "judge" not found'}}, "not found"),
    "llama.cpp: loading": ("", 503, {"error": {"code": 503, "message": "Loading model"}}, "did not answer"),
}


@pytest.mark.parametrize("server", FAILED)
def test_a_review_that_a_server_will_not_judge_says_why(monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    status, content, message = FAILED[server]
    found = ask(monkeypatch, lambda _: (status, content))
    assert not found.answers
    assert re.search(message, found.failure)


@pytest.mark.parametrize("server", STOPPED)
def test_a_server_that_judges_nothing_ends_the_stage(monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    path, status, content, message = STOPPED[server]
    with pytest.raises(PrefmillError, match=message):
        ask(monkeypatch, lambda _: (status, content), path)


@pytest.mark.parametrize(
    ("content", "settings"), [(likeliest(), {}), (sampled("Yes"), {"top_logprobs": 0, "votes": 2})]
)
def test_prompts_that_the_server_cuts_are_not_scored(
    monkeypatch: pytest.MonkeyPatch, content: Any, settings: dict[str, Any]
) -> None:
    """Ollama drops the beginning of what exceeds its context: the review was scored by its end, without a word."""
    cut = {**content, "usage": {"prompt_tokens": 2050}}
    assert "it cuts prompts to its context" in ask(monkeypatch, lambda _: (200, cut), **settings).failure

    def whole(body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {**content, "usage": {"prompt_tokens": len(body["messages"][0]["content"]) // 4}}

    assert ask(monkeypatch, whole, **settings).answers
    for count in (0, 17, None):  # what a gateway writes that does not count
        odd = {**content, "usage": {"prompt_tokens": count}}
        assert ask(monkeypatch, lambda _, odd=odd: (200, odd), **settings).answers


@pytest.mark.parametrize("num_items", [1, 2])
def test_a_checklist_of_any_length_shows_that_prompts_are_cut(monkeypatch: pytest.MonkeyPatch, num_items: int) -> None:
    """One item, or questions of one length, showed none: their prompts have one number of tokens when whole too."""
    first = CHECKLIST.items[0]
    alike = first.model_copy(update={"id": "again", "question": first.question.replace("what", "that")})
    few = Checklist(name="few", items=(first, alike)[:num_items])
    asked = []

    def answer(context: int) -> Answer:
        def cut(body: dict[str, Any]) -> tuple[int, Any]:
            asked.append(body["messages"][0]["content"])
            return 200, likeliest(usage={"prompt_tokens": min(context, len(asked[-1]) // 4)})

        return cut

    assert "it cuts prompts to its context" in ask(monkeypatch, answer(2050), checklist=few).failure
    asked.clear()
    assert ask(monkeypatch, answer(10**6), checklist=few).answers
    assert len(asked) == num_items + 1
    assert asked[-1].startswith(asked[-2])  # what the server has in its cache

    def strict(body: dict[str, Any]) -> tuple[int, Any]:
        whole = len(body["messages"][0]["content"]) <= len(asked[0])
        return (200, likeliest(usage={"prompt_tokens": 3000})) if whole else (400, {"error": "too long"})

    assert ask(monkeypatch, strict, checklist=few).answers


def test_several_providers_behind_one_model_are_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = itertools.cycle(["Together", "DeepInfra", "Novita"])
    assert ask(monkeypatch, lambda _: (200, likeliest(provider=next(names)))).answers
    assert caplog.text.count("several providers answer (DeepInfra, Together)") == 1
    caplog.clear()
    assert ask(monkeypatch, lambda _: (200, likeliest(provider="Together"))).answers
    assert "providers" not in caplog.text


@pytest.mark.parametrize("opening", ["<think>\n", ""])  # R1's template opens the thought in the prompt
def test_sampled_answers_stand_behind_a_thought_that_is_not_kept_apart(
    monkeypatch: pytest.MonkeyPatch, opening: str
) -> None:
    """As Ollama, llama.cpp and vLLM without a reasoning parser give them: all were refused."""
    said = f"{opening}No? The review does so.\n</think>\n\nYes."
    found = ask(monkeypatch, lambda _: (200, sampled(said, said)), top_logprobs=0, votes=2)
    assert found.answers["summary"]["p_yes"] == 1
    said = "<think>\nThe review"
    found = ask(monkeypatch, lambda _: (200, sampled(said, said)), top_logprobs=0, votes=2)
    assert "where the model thinks first, give it room" in found.failure


def test_an_answer_in_parts_is_that_of_its_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Mistral's models that think give them, and some gateways any: `[{'type'` was the word that was read."""
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "No? The review does so."}]}
    said: Any = [thought, {"type": "text", "text": "Yes."}]
    found = ask(monkeypatch, lambda _: (200, sampled(said, said)), top_logprobs=0, votes=2)
    assert found.answers["summary"]["p_yes"] == 1
    found = ask(monkeypatch, lambda _: (200, sampled([thought], [thought])), top_logprobs=0, votes=2)
    assert "where the model thinks first, give it room" in found.failure
    first = {"token": "No", "top_logprobs": [{"token": "No", "logprob": -0.1}, {"token": "Yes", "logprob": -3.0}]}
    body = {"choices": [{"message": {"content": said}, "logprobs": {"content": [first]}}]}
    assert "log-probabilities are of the model's thought" in ask(monkeypatch, lambda _: (200, body)).failure


def score_dev_reviews(engine: Any, folder: Path) -> None:
    """One review more at each attempt."""
    review: Any = {**REVIEW, "rating": 5.0, "confidence": None}
    paper: Any = {**PAPER, "decision": None}
    (folder / f"attempt-{len(list(folder.glob('attempt-*')))}").touch()
    ids = [path.name for path in sorted(folder.glob("attempt-*"))]
    papers = [(paper, [{**review, "review_id": name} for name in ids])]
    score_dev(papers, lambda: engine, 0.0, folder / "score.journal", folder, lambda *_: None)


def score_written(engine: Any, folder: Path) -> None:
    rows: Any = [{"paper_id": f"p{number}", "sample": 0, "text": "Fine.", "rating": 5.0} for number in range(33)]
    papers: Any = {row["paper_id"]: {**PAPER, "paper_id": row["paper_id"]} for row in rows}
    kept = sorted(folder.glob("scored-*"))
    for path in kept[1:]:  # as of an attempt that ended behind its first block
        path.unlink()
    score_generations(rows, papers, engine, FEW.ids, folder)


def probe(engine: Any, folder: Path) -> None:
    kept = sorted(folder.glob("probes-*"))
    for path in kept[1:]:
        path.unlink()
    reviews: Any = [Sampled(PAPER, {**REVIEW, "text": "Fine.", "review_id": f"r{number}"}, {}) for number in range(9)]
    ask_probes(reviews, FEW, lambda: engine, 0, folder, lambda *_: None)


@pytest.mark.parametrize("phase", [score_dev_reviews, score_written, probe])
def test_a_later_attempt_meets_no_other_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, phase: Callable[[Any, Path], None]
) -> None:
    """As an alias that means a newer model since: of two models' answers one checklist, score or bias was made."""
    answers = ["judge-05"]

    def respond(*_: Any) -> Reply:
        return 200, {}, json.dumps(likeliest(model=answers[-1])).encode()

    with serving(respond) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        for name in ("judge-05", "judge-05", "judge-11"):
            answers.append(name)
            engine = open_engine(ChatConfig(model_name_or_path="judge"), FEW)
            if name == "judge-05":
                phase(engine, tmp_path)
                assert engine.label == "chat (judge-05)"
            else:
                with pytest.raises(
                    InputError, match=r"another model answers[\s\S]*judge-11[\s\S]*judge-05[\s\S]*--force"
                ):
                    phase(engine, tmp_path)


def test_what_a_paid_server_counts_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a thought most tokens are answers, which were told nowhere; of evaluate and optimize_checklist none were."""
    usage = {"prompt_tokens": 100, "completion_tokens": 7}
    with serving(lambda *_: (200, {}, json.dumps(likeliest(usage=usage)).encode())) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        engine = open_engine(ChatConfig(model_name_or_path="judge"), FEW)
        score_dev_reviews(engine, tmp_path)
        assert "chat was asked 2 times: 200 tokens of prompts, 14 of answers" in capsys.readouterr().out
        pace = Pace()
        pace.start(engine)
        pace.add(2)
        assert pace.figures().items() >= {"requests": 2, "prompt_tokens": 200, "answer_tokens": 14}.items()
        score_written(engine, tmp_path)
        assert f"asked {2 + 66} times" in capsys.readouterr().out
        probe(engine, tmp_path)
        assert "of answers" in capsys.readouterr().out


def test_votes_are_drawn_of_all_tokens_whatever_the_servers_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM and Ollama take the model's own 0.8 or 0.9 where a request names no `top_p`: of P(yes) 0.85 all said yes."""
    bodies: list[dict[str, Any]] = []

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        bodies.append(body)
        may_be_no = body.get("top_p", 0.8) > 0.85
        return 200, sampled(*["No" if may_be_no and number % 20 < 3 else "Yes" for number in range(body["n"])])

    settings: dict[str, Any] = {"top_logprobs": 0, "votes": 20, "checklist": FEW}
    assert ask(monkeypatch, answer, **settings).answers["summary"]["p_yes"] == 0.85
    found = ask(monkeypatch, answer, **settings, extra_body={"top_p": 0.8})  # as a user wants it
    assert found.answers["summary"]["p_yes"] == 1


def test_models_that_take_no_top_p_are_asked_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the words of OpenAI's reasoning models; Claude's name it beside the temperature."""
    asked: list[bool] = []

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        asked.append("top_p" in body)
        error = {"message": "Unsupported parameter: 'top_p' is not supported with this model.", "param": "top_p"}
        return (400, {"error": error}) if asked[-1] else (200, sampled(*["Yes"] * body["n"]))

    settings: dict[str, Any] = {"top_logprobs": 0, "votes": 2, "checklist": FEW}
    assert ask(monkeypatch, answer, **settings).answers["summary"]["p_yes"] == 1
    assert asked == [True, False, False]
    assert "is not supported with this model" in ask(monkeypatch, answer, **settings, extra_body={"top_p": 1}).failure


def test_null_takes_a_key_out_that_a_model_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of o3-mini, which takes no temperature: every review was refused, and nothing took ours out."""

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        refused = "temperature" in body or "max_tokens" in body
        return (400, {"error": "Unsupported parameter"}) if refused else (200, sampled(*["Yes"] * body["n"]))

    settings: dict[str, Any] = {"top_logprobs": 0, "votes": 2, "checklist": FEW}
    assert not ask(monkeypatch, answer, **settings).answers
    for extra in (
        {"max_tokens": None},
        {"max_completion_tokens": 99},
        {"max_tokens": None, "max_completion_tokens": 9},
    ):
        assert ask(monkeypatch, answer, **settings, extra_body={"temperature": None, **extra}).answers


def test_a_stream_that_nobody_asked_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = json.dumps({"choices": [{"delta": {"content": "Yes"}}]})
    content = f"data: {chunk}\n\ndata: [DONE]\n\n".encode()
    with serving(lambda *_: (200, {"Content-Type": "text/event-stream; charset=utf-8"}, content)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        engine = open_engine(ChatConfig(model_name_or_path="judge"), FEW)
        with pytest.raises(InputError, match=r"did not answer with JSON[\s\S]*it streams"):
            list(engine.score([(PAPER, [REVIEW])]))
