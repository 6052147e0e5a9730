"""Where a chat server is and with which key: what cannot be sent or reached is named, and no key is shown."""

from __future__ import annotations

import logging
import os

import pytest

from prefmill.checklist import completions
from prefmill.core.errors import ConfigError, InputError
from tests.loopback import serving
from tests.unit.checklist.test_chat_engine import FINE, Judge, judge, outcome

__all__ = ["judge"]  # a fixture


@pytest.mark.parametrize("around", ["{}\n", " {} ", "{}\r\n"])
def test_space_around_a_key_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch, around: str) -> None:
    with serving(lambda *_: FINE) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", f" {server.url}\n")
        monkeypatch.setenv("OPENAI_API_KEY", around.format("sk-secret"))
        assert outcome().answers
        assert server.authorizations == {"Bearer sk-secret"}


@pytest.mark.parametrize("around", ["Bearer {}", '"{}"', "'{}'", "{}\nx", "{}\x00", "{}é"])
def test_a_key_that_no_header_holds_is_refused_without_its_value(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, around: str
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setattr(completions.os, "environ", {**os.environ, "OPENAI_API_KEY": around.format("sk-secret")})
    with caplog.at_level(logging.DEBUG), pytest.raises(ConfigError, match="the key cannot be sent") as error:
        outcome()
    assert "sk-secret" not in f"{error.value}{caplog.text}"


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999/v1", "http://127.0.0.1:x/v1", "http:///v1", "http://a\nb/v1"])
def test_what_is_no_url_is_said_to_be_none(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(ConfigError, match="OPENAI_BASE_URL is no URL"):
        outcome()


def test_a_proxy_or_certificates_that_cannot_be_used_are_named(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "socks9://user:pass@host:1")
    with pytest.raises(ConfigError, match="HTTP_PROXY") as error:
        outcome()
    assert "pass" not in str(error.value)
    monkeypatch.delenv("HTTP_PROXY")
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
    with pytest.raises(ConfigError, match="SSL_CERT_FILE"):
        outcome()


def test_https_to_a_plain_server_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda *_: FINE) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url.replace("http://", "https://"))
        with pytest.raises(ConfigError, match=r"speaks no TLS[\s\S]*SSL_CERT_FILE"):
            outcome()


def test_a_key_that_a_server_repeats_is_not_shown(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    judge.answer = lambda _: {"detail": "the account of sk-secret is closed"}
    with pytest.raises(InputError, match=r"did not answer every prompt[\s\S]*the account of \*\*\* is closed"):
        outcome()
    judge.answer = lambda _: {"choices": [{"message": {"refusal": "sk-secret may not ask this"}}]}
    assert outcome().failure == "the server withholds an answer: *** may not ask this"
