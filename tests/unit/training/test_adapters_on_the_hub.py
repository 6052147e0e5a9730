"""An adapter that is on the hub alone: refused with the command that fetches it, which then is enough."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.loopback import Reply, serving
from tests.unit.training.test_adapter_start import adapter

__all__ = ["adapter"]  # a fixture

COMMIT = "a" * 40
# Every way in, in one process: what the first one fetched must not change what the next ones say.
TRY = """
from datetime import date
from prefmill.core.config import validate
from prefmill.core.errors import PrefmillError
from prefmill.families.causal.layout import choose_layout
from prefmill.families.causal.loading import load_model, load_tokenizer
from prefmill.families.causal.other_reference import reference_parts
from prefmill.training.preference_config import PreferenceConfig

named = {"model_name_or_path": "me/mine"}
for way in (
    lambda: load_tokenizer("me/mine"),
    lambda: load_model("me/mine", precision="fp32"),
    lambda: choose_layout(validate(PreferenceConfig, named), "me/mine"),
    lambda: load_tokenizer(reference_parts(validate(PreferenceConfig, {**named, "ref_name": "me/mine"}))[0]),
    lambda: validate(PreferenceConfig, {**named, "lora": {"start": "me/mine"}}),
):
    try:
        way()
        print("WAY taken")
    except PrefmillError as error:
        print("WAY", " ".join(str(error).split()))
"""


def hub_of(repository: Path) -> Callable[[str, str, dict[str, str], bytes], Reply]:
    """As much of the hub as fetching files of `me/mine` needs."""

    def respond(method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        file = repository / path.rpartition("/")[2]
        if path.startswith("/me/mine/resolve/") and file.is_file():
            content = file.read_bytes()
            return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}, content
        code = "EntryNotFound" if path.startswith("/me/mine/") else "RepoNotFound"
        return 404, {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, b""

    return respond


@pytest.mark.slow
def test_it_is_told_how_to_fetch_it(adapter: Path, tmp_path: Path) -> None:
    """It was asked for as a model, and the name, the network and the access were to be checked."""
    with serving(hub_of(adapter)) as hub:
        variables = {**os.environ, "HF_ENDPOINT": hub.url.removesuffix("/v1"), "HF_HOME": str(tmp_path)}
        variables["HF_HUB_OFFLINE"] = "0"

        def python(text: str) -> list[str]:
            made = subprocess.run([sys.executable, "-c", text], env=variables, capture_output=True, text=True)
            assert made.returncode == 0, made.stderr
            return [line for line in made.stdout.splitlines() if line.startswith("WAY")]

        said = python(TRY)
        assert len(said) == 5
        assert all("`hf download me/mine`" in line for line in said), said
        for file in adapter.iterdir():
            python(f"from huggingface_hub import hf_hub_download; hf_hub_download('me/mine', {file.name!r})")
        taken = python(TRY)
    assert taken[:4] == ["WAY taken"] * 4
    assert "are both adapters" in taken[4]
