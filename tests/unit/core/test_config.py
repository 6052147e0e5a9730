"""Configurations refuse what they do not understand, and know what decides a task's content."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

from prefmill.core.config import ExternalPath, StrictConfig, flatten, identity, load, read_yaml, runtime, validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.core.stage import load_stage, stage_names
from tests.conftest import REPOSITORY


class Source(StrictConfig):
    path: ExternalPath
    columns: list[str] = ["text"]


class Example(StrictConfig):
    learning_rate: float = 1e-5
    num_train_epochs: int = 3
    sources: list[Source] = []
    output: Path = Path("out")
    num_workers: int = runtime(4)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("learning_rate: 1e-4\nnum_train_epochs: 2\n")
    config = load(Example, path, ["num_train_epochs=5"])
    assert (config.learning_rate, config.num_train_epochs) == (1e-4, 5)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learning_rat=1", ["learning_rat: unknown key", "did you mean 'learning_rate'", "num_train_epochs"]),
        ("num_train_epochs=two", ["num_train_epochs = 'two'", "valid integer"]),
        ("num_train_epochs=2.5", ["num_train_epochs = 2.5"]),
        ("learning_rate=.nan", ["learning_rate"]),
        ("sources=[{pth: a}]", ["sources[0].pth: unknown key", "did you mean 'path'", "sources[0].path: required"]),
        ("num_train_epochs", ["an override is written key=value", "num_train_epochs=VALUE"]),
        ("output=${oc.env:HOME}", ["no variables of the environment", "for a secret, give the variable's name"]),
        ("output=${ oc.env:HOME}", ["no variables of the environment"]),
        ("output=${nothing}", ["cannot merge", "no variables of the environment"]),
        ("sources=[{path: $WORK/a}]", ["sources[0].path = '$WORK/a'", "not read in configurations: write the path"]),
        ("sources=[{path: ~nobody.here/a}]", ["sources[0].path", "no user of that name"]),
    ],
)
def test_a_bad_override_names_key_value_and_fix(override: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(Example, {}, [override])
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", stage_names())
def test_a_home_that_nobody_has_is_no_traceback(name: str) -> None:
    config, file = load_stage(name).config, REPOSITORY / "configs" / name / "demo.yaml"
    for key in config.model_fields:
        with contextlib.suppress(ConfigError):
            load(config, file if file.is_file() else {}, [f"{key}=~nobody.here/a"])


@pytest.mark.parametrize("text", ["a: [1\n", "- 1\n", "a: 1\na: 2\n", "\xff"])
def test_a_bad_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        load(Example, path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load(Example, tmp_path / "none.yaml")
    (tmp_path / "demo.yaml").touch()
    with pytest.raises(ConfigError, match=r"no such configuration file \(did you mean 'demo.yaml'\?\)"):
        load(Example, tmp_path / "dmo.yaml")


def test_identity_follows_content_not_paths_or_runtime_keys(tmp_path: Path) -> None:
    def made(name: str, text: str, workers: int) -> dict[str, object]:
        (tmp_path / name).write_text(text)
        return identity(load(Example, {"sources": [{"path": str(tmp_path / name)}], "num_workers": workers}))

    assert made("a", "same", 1) == made("b", "same", 2)
    assert made("a", "same", 1) != made("a", "other", 1)


@pytest.mark.parametrize("name", ["a $(touch pwned)", "100$", "$HOME"])
def test_signs_of_a_shell_may_be_part_of_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may even be called $HOME, where there is one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$HOME").mkdir()
    assert Source(path=name).path == tmp_path / name  # type: ignore[arg-type]


def test_identity_of_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        identity(load(Example, {"sources": [{"path": str(tmp_path / "gone")}]}))


def test_identity_of_a_folder_is_its_names_and_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "x.txt").write_text("x")
    one, other = (identity(load(Source, {"path": str(tmp_path / name)})) for name in ("a", "b"))
    assert one == other
    (tmp_path / "b" / "sub" / "x.txt").rename(tmp_path / "b" / "sub" / "y.txt")
    assert identity(load(Source, {"path": str(tmp_path / "b")})) != one


def test_flatten_keeps_empty_mappings() -> None:
    assert dict(flatten({"a": {"b": 1, "c": {}}, "d": [1]})) == {"a.b": 1, "a.c": {}, "d": [1]}
    assert dict(flatten({"a": {"b": [{"c": 1}]}})) == {"a.b[0].c": 1}


@pytest.mark.parametrize(
    ("stage", "keys", "places"),
    [
        ("score_reviews", {"engine": {"engine": "vllm"}}, ["engine.model_name_or_path"]),
        ("ingest_reviews", {"sources": [{"format": "jsonl"}]}, ["sources[0].path"]),
        ("dpo", {"report_to": ["tensorboard", "x"]}, ["report_to[1]"]),
        ("dpo", {"lora": {"target_modules": [5]}}, ["lora.target_modules", "lora.target_modules[0]"]),
        ("mdlm_dpo", {"diffusion_steps": "x"}, ["diffusion_steps", "diffusion_steps"]),
        ("mdlm_sft", {"resume_from_checkpoint": 5}, ["resume_from_checkpoint", "resume_from_checkpoint"]),
        ("sdxl_dpo", {"reward_weights": {"a": "x"}}, ["reward_weights.a"]),
    ],
)
def test_an_error_names_the_key_as_it_is_written(stage: str, keys: dict[str, object], places: list[str]) -> None:
    """Told `engine.vllm.model_name_or_path: required` one gave that key, which was then unknown."""
    with pytest.raises(ConfigError) as caught:
        validate(load_stage(stage).config, keys)
    lines = str(caught.value).splitlines()
    assert [re.split(": | = ", line.strip())[0] for line in lines if line.startswith("    ")] == places


def test_a_wrong_key_of_a_tagged_section_is_told_where_it_was_given() -> None:
    with pytest.raises(ConfigError, match=r"engine\.x: unknown key[\s\S]*, given on the command line"):
        load(load_stage("score_reviews").config, {"engine": {"engine": "lexical"}}, ["engine.x=1"])


@pytest.mark.parametrize("key", ["Yes", "off"])
def test_a_key_that_yaml_takes_for_no_word_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"sources:\n- decision_words: {{{key}: accepted}}\n")
    with pytest.raises(ConfigError, match="in quotes"):
        read_yaml(path)
    path.write_text(f"sources:\n- decision_words: {{'{key}': accepted}}\n")
    assert read_yaml(path) == {"sources": [{"decision_words": {key: "accepted"}}]}


@pytest.mark.parametrize(
    ("rater", "said"),
    [
        ({"by": "person"}, r"rater = .*: by = 'person', expected one of 'people', 'reward', 'sharpness', 'brightness'"),
        ({"port": 1}, r"rater = .*: by is missing: it says what the other keys are"),
        (
            {"by": "people", "tie_margin": 1},
            r"rater\.tie_margin: unknown key; valid keys: by, port, raters_per_pair$",
        ),
    ],
)
def test_a_section_of_several_kinds_is_told_by_its_own(rater: dict[str, object], said: str) -> None:
    from prefmill.core.stage import load_stage

    with pytest.raises(ConfigError, match=f"(?m){said}"):
        load(load_stage("rate_images").config, {"rater": rater})


def test_what_does_not_fit_together_is_said_without_all_that_was_given() -> None:
    from prefmill.core.stage import load_stage

    with pytest.raises(ConfigError, match=r"(?m)^    one of dimensions stands there twice") as told:
        load(load_stage("rate_images").config, {"dimensions": ["overall", "overall"]})
    assert "{'dimensions'" not in str(told.value)
