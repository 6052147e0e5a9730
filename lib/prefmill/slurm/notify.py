"""Tells a webhook, once, that a run has ended; its address is a secret and appears nowhere."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefmill.core.files import digest_json, read_record, write_record
from prefmill.slurm.cluster import ClusterFile, read_secrets

ANNOUNCED = "announced.json"
_SECONDS = 10.0


def announce(folder: Path, cluster: ClusterFile, outcome: Mapping[str, Any]) -> str | None:
    """Post `outcome` as JSON to the webhook that `cluster` names, unless that was done; returns what to say of it.

    `folder` keeps what was announced. A webhook that does not answer is no failure of the run.
    """
    if cluster.webhook is None:
        return None
    # By its content: a run that was told as stopped and is then completed is told again.
    marker, digest = folder / ANNOUNCED, digest_json(dict(outcome))
    if read_record(marker).get("digest") == digest:
        return None
    address = _address(cluster, cluster.webhook)
    if address is None:
        return f"no webhook called: {cluster.webhook} is neither a secret nor in the environment"
    problem = _post(address, outcome)
    if problem is not None:
        return f"the webhook in {cluster.webhook} was not reached ({problem})"
    # After the post: a kill in between then tells it twice; the other order would not tell it at all.
    write_record(marker, {"digest": digest})
    return f"told the webhook in {cluster.webhook}"


def _address(cluster: ClusterFile, name: str) -> str | None:
    if cluster.secrets is not None and name in cluster.secrets.names:
        return read_secrets(cluster.secrets)[name]
    return os.environ.get(name)


def _post(address: str, outcome: Mapping[str, Any]) -> str | None:
    """What went wrong, without the address; None where nothing did."""
    if not address.startswith(("http://", "https://")):
        return "it is no http address"
    body = json.dumps(dict(outcome) | {"text": _text(outcome)}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})  # noqa: S310 - checked above
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS):  # noqa: S310
            return None
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except (OSError, ValueError) as error:
        # Not the error's text, which may hold the address.
        return type(error).__name__


def _text(outcome: Mapping[str, Any]) -> str:
    """The outcome in a line, under the key that chat services show."""
    stopped = ", ".join(outcome["stopped"])
    return f"prefmill run {outcome['run']}: {outcome['state']}" + (f"; stopped: {stopped}" if stopped else "")
