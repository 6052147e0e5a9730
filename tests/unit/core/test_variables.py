"""Secrets in place of their variables' names: refused, and shown nowhere."""

from __future__ import annotations

from typing import Any

import pytest

from prefmill.checklist.engine import ChatConfig
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError
from prefmill.slurm.cluster import ClusterFile


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"api_key_env": "sk-secret"}, "api_key_env: no name of an environment variable"),
        ({"api_key_env": "hf_secret"}, "api_key_env: no name of an environment variable"),
        ({"base_url_env": "https://secret.example/v1"}, "base_url_env: no name of an environment variable"),
        ({"extra_body": {"Api-Key": "sk-secret"}}, "extra_body: Api-Key would be recorded"),
    ],
)
def test_a_secret_in_place_of_its_variables_name_is_refused_and_not_shown(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(ChatConfig, {"engine": "chat", "model_name_or_path": "judge", **keys})
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_webhooks_address_in_place_of_its_name_is_not_shown() -> None:
    with pytest.raises(ConfigError, match="webhook: no name of an environment variable") as caught:
        validate(ClusterFile, {"webhook": "https://hooks.example/secret"})
    assert "hooks.example" not in str(caught.value)
