"""A server that speaks OpenAI's interface: requests with retries, and which trouble is whose."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.request import getproxies_environment, proxy_bypass

import httpx

from prefmill.checklist.engine import ServerConfig
from prefmill.core.errors import ConfigError, InputError, PrefmillError
from prefmill.core.figures import duration

LONGEST_WAIT_SECONDS = 60.0
# What OpenAI's own client asks again for, and 425 (too early, RFC 8470).
_TRANSIENT = {408, 409, 425, 429}  # and every 5xx
_SHOWN_CHARACTERS = 300
_KEY = re.compile(r"[!#-&(-~][!-~]*")  # what a header may hold, without the quotes that an env file leaves around it
_HIGHEST_PORT = 65535
_ERROR_STATUS = re.compile("[45][0-9]{2}")
# A gateway that looks at texts says 403 about one review, as it does about a key.
_WITHHELD = re.compile(r"moderation|input was flagged|content[ _-]?(filter|policy)", re.IGNORECASE)
_NO_RETRY_MENDS = re.compile("CERTIFICATE_VERIFY_FAILED|WRONG_VERSION_NUMBER")
_CLIENT_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")
_log = logging.getLogger(__name__)


class RefusedError(Exception):
    """The server will not answer this very request, however often it is asked."""


@dataclass
class Server:
    """Asks the server at `url`; `key` goes into no message. `giving_up` makes the attempts under way the last ones."""

    url: str
    key: str | None = field(repr=False)
    config: ServerConfig
    giving_up: bool = False
    _told: int = 0

    @classmethod
    def from_environment(cls, config: ServerConfig) -> Server:
        """The server whose URL and key are in the variables that `config` names; no key is sent where there is none.

        Raises ConfigError where the URL's variable is not set or holds no URL, or one with a secret in it, and where
        the key is none that a header can hold. Space around both is no part of them.
        """
        url = os.environ.get(config.base_url_env, "").strip().rstrip("/")
        if not _is_url(url):
            raise ConfigError(
                "no server to score with", got=f"{config.base_url_env} is {'no URL' if url else 'not set'}",
                expected="http://HOST:PORT/v1 or https://HOST/v1",
                fix=f"set {config.base_url_env} where the stage runs, or name another variable in engine.base_url_env",
            )  # fmt: skip
        if set("@?#") & set(url):  # httpx logs URLs
            raise ConfigError(
                "the server's URL contains more than its address", got=f"a user or query in {config.base_url_env}",
                expected="http://HOST:PORT/v1 or https://HOST/v1",
                fix=f"give the key in {config.api_key_env}; Azure's address without a query ends in /openai/v1",
            )  # fmt: skip
        key = os.environ.get(config.api_key_env, "").strip()
        if key and not _KEY.fullmatch(key):  # httpx would refuse it in words that hold it
            raise ConfigError(
                "the key cannot be sent", got=f"a quote, space or letter outside ASCII in {config.api_key_env}",
                expected="the key alone, on one line", fix=f"set {config.api_key_env} to the key alone",
            )  # fmt: skip
        return cls(url, key or None, config)

    @property
    def where(self) -> str:
        """The address, and the proxy on the way to it, which answers in the server's name."""
        url, proxies = httpx.URL(self.url), getproxies_environment()
        named = next((f"{name.upper()}_PROXY" for name in (url.scheme, "all") if name in proxies), None)
        if named is None or proxy_bypass(url.host):
            return self.url
        return f"{self.url} by the proxy in {named}, which may have said this (NO_PROXY={url.host} goes past it)"

    def client(self) -> httpx.AsyncClient:
        """A client for one event loop; redirects are not followed, so that the key goes to no other host.

        Raises ConfigError where the proxy or certificates that the environment names cannot be used.
        """
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        # As many connections as reviews in flight, and a long queue at the server is no failure to connect.
        timeout = httpx.Timeout(self.config.timeout_seconds, connect=min(30.0, self.config.timeout_seconds))
        limits = httpx.Limits(max_connections=self.config.reviews_in_flight)
        try:
            return httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits)
        except (ValueError, OSError, httpx.InvalidURL) as error:
            named = [name for name in _CLIENT_VARIABLES if name in os.environ or name.lower() in os.environ]
            raise ConfigError(
                "the environment names a proxy or certificates that cannot be used", where=", ".join(named),
                got=type(error).__name__, fix="correct these variables, or take them out",
            ) from None  # fmt: skip

    def get(self, path: str) -> dict[str, Any]:
        """The answer to one GET, with retries; ConfigError where the server refuses it."""

        async def ask() -> dict[str, Any]:
            async with self.client() as client:
                return await self.ask(client, "GET", path)

        try:
            return asyncio.run(ask())
        except RefusedError as refusal:
            raise self._nothing_there(str(refusal)) from None

    async def ask(self, client: httpx.AsyncClient, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The JSON that the server answers.

        Raises RefusedError where it will not answer this request, ConfigError where it would answer none, and
        PrefmillError where it cannot be reached or has trouble for longer than `num_retries` attempts.
        """
        attempt = 0
        while True:
            wait: float | None = None
            try:
                # In all: httpx's own limit begins again with every byte of an answer that drips.
                async with asyncio.timeout(self.config.timeout_seconds):
                    response = await client.request(method, f"{self.url}/{path}", json=body)
                content = _json(response)
                status = _status(response, content)
                if status not in _TRANSIENT and status < 500 and not _is_cut(response, content):
                    self._told = 0
                    return self._content(response, status, content)
                trouble, wait = self._said(response), retry_after(response.headers)
            except (httpx.TransportError, httpx.DecodingError, TimeoutError) as error:
                trouble = f"{type(error).__name__} {error}".strip()
                if _NO_RETRY_MENDS.search(trouble):
                    raise self._no_tls(trouble) from None
            # Where another request has given up, minutes of waiting here would only hold up its error.
            left = 0 if self.giving_up else self.config.num_retries - attempt
            if left <= 0 or (wait or 0.0) > LONGEST_WAIT_SECONDS * left:  # a limit a day, say: no attempt left meets it
                raise self._unreachable(trouble, attempt + 1, path, wait)
            # 1, 2, 4 and up to 60 s: the default of 8 retries outlasts a server that is back after three minutes.
            wait = min(LONGEST_WAIT_SECONDS, wait if wait is not None else 2.0**attempt)
            attempt += 1
            self._tell(attempt, trouble, wait)
            await asyncio.sleep(wait)

    def _content(self, response: httpx.Response, status: int, content: Any) -> dict[str, Any]:
        said = self._said(response)
        # Key and address are the same for every review, so these end the task in place of failing reviews one by one.
        if status in (401, 402, 403) and not _WITHHELD.search(said):
            raise ConfigError(
                "the server refuses the key", where=self.where, got=said,
                expected=f"its key in {self.config.api_key_env}, which is {'set' if self.key else 'not set'}",
                fix=f"set {self.config.api_key_env} where the stage runs, or name another in engine.api_key_env",
            )  # fmt: skip
        if status in (404, 405, 407) or 300 <= status < 400:
            raise self._nothing_there(said)
        if status >= 400:
            raise RefusedError(said)
        if not isinstance(content, dict):
            streams = "event-stream" in response.headers.get("content-type", "")
            raise InputError(
                "the server did not answer with JSON", where=self.where, got=said,
                fix="it streams what was not asked as a stream: turn that off there, or put LiteLLM before it"
                if streams
                else "check the URL in the variable that base_url_env names: it mostly ends in /v1",
            )  # fmt: skip
        return content

    def _said(self, response: httpx.Response) -> str:
        """The status and the start of what the server said, on one line."""
        # A redirect is mostly to the address that was meant: https, or with /v1.
        text = " ".join([*filter(None, [response.headers.get("location")]), *response.text.split()])
        return f"{response.status_code} {response.reason_phrase}: {self.shown(text)}"

    def shown(self, text: str) -> str:
        """The start of it without the key: a server may repeat that, and what is shown goes into logs."""
        return (text.replace(self.key, "***") if self.key else text)[:_SHOWN_CHARACTERS]

    def _tell(self, attempt: int, trouble: str, wait: float) -> None:
        """One line for all requests that wait for the same thing."""
        if attempt > self._told:
            self._told = attempt
            _log.warning(
                "the server has trouble (%s), attempt %d of %d in %g s",
                trouble, attempt + 1, self.config.num_retries + 1, wait,
            )  # fmt: skip

    def _nothing_there(self, said: str) -> ConfigError:
        return ConfigError(
            "the server has nothing at this address", where=self.where, got=said,
            expected="OpenAI's /models and /completions or /chat/completions below the URL, and the model named",
            fix=f"correct {self.config.base_url_env} (it usually ends in /v1), or the model's name where that is what "
            "the server does not find",
        )  # fmt: skip

    def _no_tls(self, trouble: str) -> ConfigError:
        return ConfigError(
            "the server cannot be trusted, or speaks no TLS", where=self.where, got=trouble,
            expected="https with a certificate that this machine knows, or plain http",
            fix="set SSL_CERT_FILE to the file of the authority that signed its certificate, or correct "
            f"{self.config.base_url_env}",
        )  # fmt: skip

    def _unreachable(self, trouble: str, attempts: int, path: str, asked: float | None) -> PrefmillError:
        # llama.cpp's server and LiteLLM's openai models fail so where a prompt is token ids.
        chat = "; where it takes no token ids as prompts, set engine.engine=chat" if path == "completions" else ""
        if asked and asked > LONGEST_WAIT_SECONDS:
            return PrefmillError(
                "the server asks to wait for long", where=self.where, got=f"{trouble}; {duration(asked)}",
                expected=f"at most a minute an attempt (engine.num_retries is {self.config.num_retries})",
                fix="rerun then, what is scored is kept; or wait for it with "
                f"engine.num_retries={math.ceil(asked / LONGEST_WAIT_SECONDS)}",
            )  # fmt: skip
        return PrefmillError(
            "the server did not answer", where=self.where, got=f"{trouble} (attempt {attempts})",
            expected=f"an answer within {self.config.num_retries + 1} attempts (engine.num_retries)",
            fix=f"look at {self.config.base_url_env} and the server's log, start it again and rerun: what is scored is "
            f"kept{chat}",
        )  # fmt: skip


def _is_url(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    return text.startswith(("http://", "https://")) and bool(url.host.strip()) and (url.port or 0) <= _HIGHEST_PORT


def _json(response: httpx.Response) -> Any:
    """What the answer holds; None where that is no JSON."""
    try:
        return response.json()
    except (ValueError, RecursionError):
        return None


def _status(response: httpx.Response, content: Any) -> int:
    """The status, or that of the error in an answer: gateways say 200 before they know.

    An error without a status is one of the request's own where it says so in OpenAI's words, else trouble.
    """
    # vLLM's errors had no `error` around them until 0.10.
    found = content if isinstance(content, dict) else {}
    error = found.get("error") or (found if found.get("object") == "error" else None)
    if "insufficient_quota" in str(error):  # OpenAI says 429, but waiting fills no account
        return 402
    if not error or not response.is_success:
        return response.status_code
    code = str(error.get("code") if isinstance(error, dict) else "")
    if _ERROR_STATUS.fullmatch(code):
        return int(code)
    return 400 if "invalid_request" in str(error) else 500


def _is_cut(response: httpx.Response, content: Any) -> bool:
    """Whether a good answer's JSON breaks off, as behind a proxy that lost its server: asked again, it may be whole."""
    text = response.text.strip()
    return response.is_success and content is None and (not text or text.startswith("{"))


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """The seconds a server asks to wait: `retry-after-ms`, or `Retry-After` as a number or a date (RFC 9110, 10.2.3).

    A date that has passed is no wait; None where there is none or it cannot be read.
    """
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        # float() reads "nan" and "inf" too.
        return max(0.0, seconds) if math.isfinite(seconds) else None
    try:
        then = parsedate_to_datetime(headers.get("retry-after", "")).timestamp()
    except (ValueError, TypeError):
        return None
    return max(0.0, then - (time.time() if now is None else now))
