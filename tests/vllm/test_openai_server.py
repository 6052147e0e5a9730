"""The openai engine with vLLM's own server: equal to the transformers engine, and what dies in the middle goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefmill.checklist.engine import ChatConfig, OpenAIConfig, TransformersConfig
from prefmill.checklist.engines import open_engine
from prefmill.checklist.items import load_checklist
from prefmill.checklist.prompts import plain_prompt
from prefmill.core.artifact import Provenance
from prefmill.core.errors import ConfigError
from prefmill.store.artifacts import publish
from prefmill.store.jsonl import read_jsonl, write_jsonl
from tests.conftest import REPOSITORY
from tests.loopback import Loopback, Reply, forward, serving
from tests.vllm.judging import HOSTILE, TOLERANCE, close, p_yes, papers
from tests.vllm.vllm_server import KEY, NAME, VllmServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

NUM_REVIEWS = 20
IN_FLIGHT = 4


@pytest.fixture(scope="module")
def server(judge: Path, vllm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = VllmServer(judge, port, tmp_path_factory.mktemp("server") / "log")
    try:
        running.start()
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="module")
def expected(judge: Path, texts: list[str]) -> dict[str, list[float]]:
    """What the transformers engine answers."""
    other = open_engine(TransformersConfig(model_name_or_path=str(judge)), load_checklist())
    return p_yes(list(other.score(papers(texts[:NUM_REVIEWS]))))


@pytest.fixture
def proxy(server: VllmServer) -> Iterator[Loopback]:
    """What counts on the way to the server."""
    with serving(forward(server.url)) as loopback:
        yield loopback


@pytest.fixture
def engine(proxy: Loopback, judge: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("OPENAI_BASE_URL", proxy.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    config = OpenAIConfig(model_name_or_path=str(judge), served_model_name=NAME, reviews_in_flight=IN_FLIGHT)
    return open_engine(config, load_checklist())


def test_it_equals_the_transformers_engine(
    engine: Any, proxy: Loopback, texts: list[str], expected: dict[str, list[float]]
) -> None:
    outcomes = list(engine.score(papers(texts[:NUM_REVIEWS])))
    found = p_yes(outcomes)
    assert list(found) == list(expected) == [f"r{n}" for n in range(NUM_REVIEWS)]
    assert all(close(found[name], expected[name]) for name in expected)
    spread = [value for values in expected.values() for value in values]
    assert min(spread) < 0.2 < 0.8 < max(spread)  # else equality would say nothing
    assert sum(proxy.asked.values()) == NUM_REVIEWS  # a request a review
    assert engine.num_requests == NUM_REVIEWS * 24
    assert 0.4 < engine.cache_hit_rate < 1


@pytest.mark.parametrize("top_logprobs", [20, 5])
def test_chat_equals_the_models_own_next_token(
    proxy: Loopback, judge: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, top_logprobs: int
) -> None:
    """The oracle is the model's forward of the chat as its tokenizer writes it, over all spellings of an answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("OPENAI_BASE_URL", proxy.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    checklist, data = load_checklist(), papers(texts[:2])
    config = ChatConfig(model_name_or_path=NAME, top_logprobs=top_logprobs)
    found = [outcome.answers for outcome in open_engine(config, checklist).score(data)]
    tokenizer, model = AutoTokenizer.from_pretrained(judge), AutoModelForCausalLM.from_pretrained(judge)
    for (paper, review), answers in zip(((paper, item) for paper, rows in data for item in rows), found, strict=True):
        for item in checklist.items:
            content = plain_prompt(paper, review["text"], item.question, "none")
            chat = [{"role": "user", "content": content}]
            inputs = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                top = model(**inputs).logits[0, -1].double().softmax(-1).topk(top_logprobs)
            words = [tokenizer.decode([index]).strip().lower() for index in top.indices.tolist()]
            yes, no = (
                sum(share for share, word in zip(top.values.tolist(), words, strict=True) if word == answer)
                for answer in ("yes", "no")
            )
            assert answers[item.id]["p_yes"] == pytest.approx(yes / (yes + no), abs=TOLERANCE)
            assert answers[item.id]["mass"] == pytest.approx(yes + no, abs=TOLERANCE)


def test_hostile_text_moves_no_other_score(engine: Any, texts: list[str], expected: dict[str, list[float]]) -> None:
    ((paper, reviews),) = papers(texts[:4])
    for name, text in HOSTILE.items():
        between = [item for review in reviews for item in (review, {**review, "review_id": "h", "text": text})]
        found = p_yes(list(engine.score([(paper, between)])))
        assert all(close(found[review["review_id"]], expected[review["review_id"]]) for review in reviews), name
        assert all(0 <= value <= 1 for value in found["h"])


def test_an_over_long_review_fails_alone(engine: Any, texts: list[str]) -> None:
    ((paper, reviews),) = papers([texts[0], "word " * 3000, texts[1]])
    first, long, last = engine.score([(paper, reviews)])
    assert "of 1500 beside" in (long.failure or "")
    assert [first.failure, last.failure] == [None, None]


def test_another_key_is_refused(engine: Any, judge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    with pytest.raises(ConfigError, match="refuses the key"):
        open_engine(OpenAIConfig(model_name_or_path=str(judge), served_model_name=NAME), load_checklist())


def test_evidence_is_json_of_the_schema(
    engine: Any, proxy: Loopback, judge: Path, texts: list[str], expected: dict[str, list[float]]
) -> None:
    written: list[str] = []
    passed_on = proxy.respond

    def respond(method: str, path: str, headers: dict[str, str], body: bytes) -> Reply | None:
        reply = passed_on(method, path, headers, body)
        if b"structured_outputs" in body and reply is not None:
            assert reply[0] == 200, reply
            written.extend(choice["text"] for choice in json.loads(reply[2])["choices"])
        return reply

    proxy.respond = respond
    config = OpenAIConfig(model_name_or_path=str(judge), served_model_name=NAME, evidence=True, evidence_max_tokens=200)
    found = list(open_engine(config, load_checklist()).score(papers(texts[:2])))
    assert all(close(values, expected[name]) for name, values in p_yes(found).items())
    assert len(written) == sum(answer["yes"] for outcome in found for answer in outcome.answers.values()) > 0
    assert all(text.startswith('{"quote":') for text in written)
    whole = [json.loads(text, strict=False) for text in written if text.endswith("}")]
    assert all(list(content) == ["quote"] and len(content["quote"]) <= 300 for content in whole)


class Shard:
    """The stage as a user starts it, over and over, in a workspace of its own."""

    def __init__(self, folder: Path, judge: Path, url: str, texts: list[str]) -> None:
        corpus = folder / "corpus"
        rows = papers(texts[:NUM_REVIEWS])
        write_jsonl(corpus / "papers.jsonl", [paper for paper, _ in rows])
        self.reviews = sorted(
            (r for _, reviews in rows for r in reviews), key=lambda r: (r["paper_id"], r["review_id"])
        )
        write_jsonl(corpus / "reviews.jsonl", self.reviews)
        publish(corpus, "review_corpus", Provenance("s", "all", "f", {}, {}, "0", {}), {})
        self.folder, self.output = folder, folder / "data/mine/score_reviews/all"
        self.journal = self.output / "work/outcomes.journal"
        self.command = [
            sys.executable, "-m", "stages.score_reviews", "run=mine", f"workspace={folder}", f"inputs.corpus={corpus}",
            "engine.engine=openai", f"engine.model_name_or_path={judge}", f"engine.served_model_name={NAME}",
            f"engine.reviews_in_flight={IN_FLIGHT}", "engine.num_retries=1",
            "judge={min_answer_mass: 0, max_same_answer: 1}",
        ]  # fmt: skip
        self.environment = os.environ | {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": KEY}
        self.printed = ""

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command, env=self.environment, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    def end(self, process: subprocess.Popen[str]) -> int:
        self.printed += process.communicate(timeout=1200)[0]
        self.printed += (self.folder / "logs/mine/score_reviews/all.log").read_text()
        return process.returncode

    def journaled(self) -> list[str]:
        """The reviews in the journal, in the order they were done."""
        if not self.journal.is_file():
            return []
        lines = self.journal.read_bytes().split(b"\n")[:-1]
        return [json.loads(line.split(b"\t", 1)[1])["review_id"] for line in lines]

    def check_result(self, expected: dict[str, list[float]]) -> None:
        """Every review is there once and right, in the corpus's order, and the key nowhere."""
        rows = list(read_jsonl(self.output / "review_evaluations.jsonl"))
        assert [row["review_id"] for row in rows] == [review["review_id"] for review in self.reviews]
        for row in rows:
            assert close([answer["p_yes"] for answer in row["answers"].values()], expected[row["review_id"]])
        assert KEY not in self.printed
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        assert len(files) > 8
        assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_a_killed_shard_asks_only_for_what_is_missing(
    tmp_path: Path, judge: Path, proxy: Loopback, texts: list[str], expected: dict[str, list[float]]
) -> None:
    shard = Shard(tmp_path, judge, proxy.url, texts)
    process = shard.start()

    def kill_in_the_middle() -> None:
        if len(shard.journaled()) >= 7:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)

    proxy.after_answer = kill_in_the_middle
    assert shard.end(process) == -signal.SIGKILL
    kept, asked_before = shard.journaled(), sum(proxy.asked.values())
    assert 7 <= len(kept) < NUM_REVIEWS
    assert asked_before <= len(kept) + IN_FLIGHT
    proxy.after_answer = lambda: None
    assert shard.end(shard.start()) == 0, shard.printed
    assert sum(proxy.asked.values()) - asked_before == NUM_REVIEWS - len(kept)
    assert len(proxy.asked) == NUM_REVIEWS  # none missing
    shard.check_result(expected)


def test_a_dying_server_is_retried_then_told_and_nothing_is_scored_twice(
    tmp_path: Path, judge: Path, server: VllmServer, proxy: Loopback, texts: list[str], expected: dict[str, list[float]]
) -> None:
    shard = Shard(tmp_path, judge, proxy.url, texts)

    def kill_in_the_middle() -> None:
        if sum(proxy.answered.values()) >= 7:
            server.kill()

    proxy.after_answer = kill_in_the_middle
    assert shard.end(shard.start()) == 2
    assert "the server has trouble" in shard.printed
    assert "the server did not answer" in shard.printed
    assert "what is scored is kept" in shard.printed
    kept = shard.journaled()
    assert 7 <= len(kept) == sum(proxy.answered.values()) < NUM_REVIEWS
    assert not (shard.output / "review_evaluations.jsonl").exists()
    assert sum(proxy.asked.values()) > len(kept)  # with retries
    proxy.after_answer = lambda: None
    server.start()
    proxy.asked.clear()
    assert shard.end(shard.start()) == 0, shard.printed
    assert sum(proxy.asked.values()) == NUM_REVIEWS - len(kept)
    assert len(proxy.answered) == NUM_REVIEWS  # none missing
    assert set(proxy.answered.values()) == {1}  # none twice
    shard.check_result(expected)
