"""The openai engine's manners: what is retried, what is an error, whose failure it is, and a key that stays hidden."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefmill.checklist import completions
from prefmill.checklist.engine import OpenAIConfig as Config
from prefmill.checklist.engine import TransformersConfig
from prefmill.checklist.engines import open_engine
from prefmill.core.config import identity
from prefmill.core.errors import ConfigError, InputError, PrefmillError
from tests.loopback import Loopback, Reply, serving
from tests.unit.checklist.openai_judge import CHECKLIST, KEY, Judge, engine, p_yes, reply, reviews

PAPER: Any = {"paper_id": "p0", "title": "Sparse masks", "abstract": "We study masks.", "text": ""}


@pytest.fixture
def judge() -> Judge:
    return Judge()


@pytest.fixture
def server(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    with serving(judge) as loopback:
        monkeypatch.setenv("OPENAI_BASE_URL", loopback.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield loopback


def test_prompts_are_those_of_the_transformers_engine(
    server: Loopback, judge: Judge, tiny_judge: Path, corpus_texts: list[str]
) -> None:
    ours = engine(tiny_judge, include_paper="title_abstract")
    found = list(ours.score([(PAPER, reviews(corpus_texts[:5]))]))
    assert [outcome.review_id for outcome in found] == [f"r{n}" for n in range(5)]
    prompts = open_engine(
        TransformersConfig(model_name_or_path=str(tiny_judge), include_paper="title_abstract"), CHECKLIST
    ).prompts  # type: ignore[attr-defined]
    expected = [
        [[*prompts.shared(PAPER), *prompts.foreign(text), *question] for question in prompts.questions]
        for text in corpus_texts[:5]
    ]
    assert sorted(body["prompt"] for body in judge.bodies) == sorted(expected)
    assert all((body["max_tokens"], body["temperature"], body["model"]) == (1, 0, "judge") for body in judge.bodies)
    assert ours.num_requests == 5 * 24
    assert ours.cache_hit_rate is None  # this server does not tell
    assert server.authorizations == {f"Bearer {KEY}"}


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = completions.asyncio.sleep
    monkeypatch.setattr(completions.asyncio, "sleep", lambda _: sleep(0))


@pytest.mark.usefixtures("no_pauses")
def test_passing_trouble_is_retried_and_forgotten(
    server: Loopback, judge: Judge, tiny_judge: Path, corpus_texts: list[str]
) -> None:
    work = [(PAPER, reviews(corpus_texts[:4]))]
    expected = p_yes(list(engine(tiny_judge).score(work)))
    now = {"Retry-After": "0"}
    judge.trouble = [reply(503, {}, **now), reply(429, {}, **now), None, reply(500, "boom", **now)]
    # More retries than there is trouble: whichever request meets all of it goes on.
    assert p_yes(list(engine(tiny_judge, num_retries=4).score(work))) == expected
    assert sum(server.asked.values()) == 4 + 4 + 4


def test_waits_grow_and_the_server_may_ask_for_one(monkeypatch: pytest.MonkeyPatch, tiny_judge: Path) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(completions.asyncio, "sleep", sleep)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")  # nobody listens there
    with pytest.raises(PrefmillError, match=r"the server did not answer[\s\S]*ConnectError[\s\S]*attempt 9"):
        engine(tiny_judge, num_retries=8)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    asks = iter([reply(429, {}, **{"Retry-After": "7"})] * 2)
    with serving(lambda *_: next(asks)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        waits.clear()
        with pytest.raises(PrefmillError, match="429"):
            engine(tiny_judge, num_retries=1)
    assert waits == [7]


@pytest.mark.parametrize(("retries", "waited"), [(8, []), (60, [60.0])])
def test_a_limit_of_an_hour_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, tiny_judge: Path, retries: int, waited: list[float]
) -> None:
    """The server was asked nine times, a minute apart, though it had said that an hour must pass."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(completions.asyncio, "sleep", sleep)
    asks = iter([reply(429, {"error": "daily limit"}, **{"Retry-After": "3600"}), reply(404, {})])
    with serving(lambda *_: next(asks)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        told = r"asks to wait for long[\s\S]*daily limit[\s\S]*60 min[\s\S]*num_retries=60" if not waited else "404"
        with pytest.raises(PrefmillError, match=told):
            engine(tiny_judge, num_retries=retries)
    assert waits == waited


def test_what_was_still_answered_comes_before_the_error(
    server: Loopback, judge: Judge, tiny_judge: Path, corpus_texts: list[str]
) -> None:
    ours = engine(tiny_judge, num_retries=0, reviews_in_flight=4)
    judge.trouble = [reply(500, "boom")]
    found = []
    with pytest.raises(PrefmillError, match=r"the server did not answer[\s\S]*500") as error:  # noqa: PT012
        for outcome in ours.score_as_done([(PAPER, reviews(corpus_texts[:12]))]):
            found.append(outcome.review_id)
    assert not isinstance(error.value, InputError | ConfigError)
    assert len(found) == sum(server.answered.values()) == len(set(found)) > 0
    assert all(outcome.failure is None for outcome in ours.score([(PAPER, reviews(corpus_texts[:4]))]))


def test_a_request_the_server_refuses_fails_alone(
    server: Loopback, judge: Judge, tiny_judge: Path, corpus_texts: list[str]
) -> None:
    judge.trouble = [reply(400, {"message": "too long, says " + KEY})]
    found = list(engine(tiny_judge, reviews_in_flight=1).score([(PAPER, reviews(corpus_texts[:3]))]))
    assert [outcome.failure is None for outcome in found] == [False, True, True]
    assert "400" in (found[0].failure or "")
    assert KEY not in str(found)


def test_a_review_too_long_for_the_servers_model_is_not_sent(
    server: Loopback, judge: Judge, tiny_judge: Path, corpus_texts: list[str]
) -> None:
    judge.max_model_len = 300
    (outcome,) = engine(tiny_judge).score([(PAPER, reviews([" ".join(corpus_texts)]))])
    assert "of 299 beside" in (outcome.failure or "")
    assert not server.asked
    cut = engine(tiny_judge, truncate_reviews=True)
    (outcome,) = cut.score([(PAPER, reviews([" ".join(corpus_texts)]))])
    assert outcome.num_cut_tokens > 0
    assert max(len(ids) for ids in judge.bodies[0]["prompt"]) == 299


def test_evidence_is_a_second_request_for_each_yes(
    server: Loopback, judge: Judge, tiny_judge: Path, corpus_texts: list[str]
) -> None:
    judge.quote = "TABLE 3 shows  it"
    texts = [f"{corpus_texts[0]} Table 3 shows it.", corpus_texts[1]]
    plain = list(engine(tiny_judge).score([(PAPER, reviews(texts))]))
    judge.bodies.clear()
    ours = engine(tiny_judge, evidence=True, evidence_max_tokens=40)
    found = list(ours.score([(PAPER, reviews(texts))]))
    assert p_yes(found) == p_yes(plain)
    num_yes = [sum(answer["yes"] for answer in outcome.answers.values()) for outcome in found]
    assert min(num_yes) > 0
    quotes = [body for body in judge.bodies if "structured_outputs" in body]
    assert sorted(len(body["prompt"]) for body in quotes) == sorted(num_yes)
    assert all((body["max_tokens"], body["temperature"]) == (40, 0) for body in quotes)
    evidence = [[a.get("evidence") for a in outcome.answers.values() if a["yes"]] for outcome in found]
    assert evidence == [["Table 3 shows it"] * num_yes[0], [None] * num_yes[1]]
    assert not any("evidence" in a for outcome in found for a in outcome.answers.values() if not a["yes"])
    judge.quote = reply(400, {"message": "no structured outputs here"})
    (refused, *_) = ours.score([(PAPER, reviews(texts))])
    assert "no structured outputs here" in (refused.failure or "")  # told, not passed over


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": " 1.5 "}, 1.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}, 30.0),
        ({"retry-after": "Friday, 31-Dec-99 23:59:59 GMT"}, 30.0),
        ({"retry-after": "Fri Dec 31 23:59:29 1999"}, 0.0),
        ({"retry-after": "Fri, 31 Dec 1999 22:00:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({}, None),
    ],
)
def test_every_form_of_a_wait_is_read(headers: dict[str, str], seconds: float | None) -> None:
    now = 946684799.0 - 30.0  # half a minute before the end of 1999
    assert completions.retry_after(headers, now) == seconds


def test_an_answer_that_breaks_off_is_asked_for_again(
    server: Loopback, judge: Judge, tiny_judge: Path, corpus_texts: list[str]
) -> None:
    work = [(PAPER, reviews(corpus_texts[:2]))]
    expected = p_yes(list(engine(tiny_judge).score(work)))
    cut: list[Reply] = [(200, {"Retry-After": "0"}, text) for text in (b'{"choices": [{"index": 0, "te', b"")]
    judge.trouble = list(cut)
    assert p_yes(list(engine(tiny_judge).score(work))) == expected
    judge.trouble = [cut[0]] * 9
    with pytest.raises(PrefmillError, match=r"did not answer[\s\S]*200 OK: \{"):
        list(engine(tiny_judge).score(work))


def changed_to(value: Any) -> Any:
    def change(content: Any) -> Any:
        logprobs = content["choices"][0]["logprobs"]["top_logprobs"][0]
        content["choices"][0]["logprobs"]["top_logprobs"][0] = dict.fromkeys(logprobs, value)
        return content

    return change


def without(index: int) -> Any:
    def change(content: Any) -> Any:
        logprobs = content["choices"][-1]["logprobs"]["top_logprobs"][0]
        del logprobs[list(logprobs)[index]]
        return content

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(0), "log-probability is missing"),
        (without(1), "log-probability is missing"),
        (lambda content: {**content, "choices": content["choices"][1:]}, "did not answer every prompt"),
        (lambda content: {**content, "usage": {"prompt_tokens": 5}}, "read other prompts than were sent"),
        (
            lambda content: {**content, "choices": [{**c, "text": " the"} for c in content["choices"]]},
            "than was allowed",
        ),
        (lambda content: {**content, "choices": [{**c, "logprobs": None} for c in content["choices"]]}, "is missing"),
        (lambda content: [], "did not answer with JSON"),
        (changed_to(-9999.0), "log-probability is missing"),
        (changed_to(-1e9), "log-probability is missing"),
        (changed_to(float("nan")), "log-probability is missing"),
        (changed_to(0.7), "log-probability is missing"),
        (changed_to("-0.5"), "log-probability is missing"),
        (changed_to(-0.1), "log-probability is missing or none"),  # of base 10, say: together more than 1
        (lambda content: {**content, "choices": [{**c, "logprobs": [1]} for c in content["choices"]]}, "is missing"),
        (
            lambda content: {
                **content,
                "choices": [{**c, "logprobs": {"top_logprobs": {"Yes": 0}}} for c in content["choices"]],
            },
            "is missing",
        ),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error(
    server: Loopback, judge: Judge, tiny_judge: Path, corpus_texts: list[str], change: Any, message: str
) -> None:
    judge.change = change
    with pytest.raises(InputError, match=message):
        list(engine(tiny_judge).score([(PAPER, reviews(corpus_texts[:1]))]))


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (reply(401, {"error": KEY}), r"refuses the key[\s\S]*OPENAI_API_KEY, which is set"),
        (reply(404, {}), "nothing at this address"),
        (reply(302, {}, Location="http://127.0.0.1:9/"), "nothing at this address"),
    ],
)
def test_what_no_retry_mends_stops_at_once(
    server: Loopback, judge: Judge, tiny_judge: Path, corpus_texts: list[str], first: Reply, message: str
) -> None:
    ours = engine(tiny_judge)
    judge.trouble = [first]
    with pytest.raises(ConfigError, match=message) as error:
        list(ours.score([(PAPER, reviews(corpus_texts[:1]))]))
    assert KEY not in str(error.value)
    assert sum(server.asked.values()) == 1


def test_a_server_that_refuses_to_name_its_models_is_named(tiny_judge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for status in (400, 405, 422):
        with serving(lambda *_, status=status: reply(status, {})) as other:
            monkeypatch.setenv("OPENAI_BASE_URL", other.url)
            with pytest.raises(ConfigError, match=f"nothing at this address[\\s\\S]*{status}"):
                engine(tiny_judge)


def test_settings_are_explained(
    server: Loopback, tiny_judge: Path, spelling_judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"does not serve this model[\s\S]*judge, other"):
        engine(tiny_judge, served_model_name="another")
    with pytest.raises(InputError, match="in several tokens"):
        engine(spelling_judge)
    with pytest.raises(ConfigError, match="max_length exceeds"):
        engine(tiny_judge, max_length=1500)
    with pytest.raises(ConfigError, match="ELSEWHERE is not set"):
        engine(tiny_judge, base_url_env="ELSEWHERE")
    for secret in (f"http://user:{KEY}@127.0.0.1/v1", f"http://127.0.0.1/v1?key={KEY}"):
        monkeypatch.setenv("ELSEWHERE", secret)
        with pytest.raises(ConfigError, match="contains more than its address") as error:
            engine(tiny_judge, base_url_env="ELSEWHERE")
        assert KEY not in str(error.value)
    monkeypatch.setenv("ELSEWHERE", "localhost:8000")
    with pytest.raises(ConfigError, match="ELSEWHERE is no URL"):
        engine(tiny_judge, base_url_env="ELSEWHERE")


@pytest.mark.usefixtures("no_pauses")
def test_the_key_stands_in_no_message(
    judge: Judge, tiny_judge: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with caplog.at_level(logging.DEBUG), serving(judge) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        ours = engine(tiny_judge, num_retries=1)
        judge.trouble = [reply(500, {"echo": KEY})] * 2
        with pytest.raises(PrefmillError) as error:
            list(ours.score([(PAPER, reviews(["Fine."]))]))
        shown = f"{error.value} {error.value.__cause__} {ours._server}"
    assert "has trouble" in caplog.text
    assert KEY not in shown + caplog.text


def test_where_the_server_is_does_not_make_other_scores() -> None:
    here = Config(model_name_or_path="m", base_url_env="A", api_key_env="B", reviews_in_flight=1, num_retries=0)
    assert identity(here) == identity(Config(model_name_or_path="m"))
    assert identity(here) != identity(Config(model_name_or_path="n"))
