"""What is said on the command line about a stage's nested keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from prefmill.core.config import load, merge, read_yaml
from prefmill.core.errors import ConfigError
from prefmill.pipeline.manual_submission import stage_plan
from prefmill.pipeline.overrides import joined
from prefmill.pipeline.plan import make_plan, read_pipeline
from prefmill.training.config import LoraConfig, TrainingConfig
from prefmill.training.preference_config import PreferenceConfig


def test_a_dotted_key_is_set_alone_and_a_mapping_replaces_the_whole(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    file = tmp_path / "sft" / "own.yaml"
    file.write_text("lora: {r: 16, use_dora: true}\nreport_to: [tensorboard]\n")
    by_hand_too = ["inputs.datasets=d", "inputs.model=m"]
    path = tmp_path / "pipelines" / "p.yaml"
    path.parent.mkdir()
    stages = "{sft: {config: own, set: {lora.alpha: 64}, inputs: {datasets: d, model: m}}}"
    path.write_text(f"name: toy\nworkspace: {tmp_path}\nstages: {stages}\n")

    def lora(*overrides: str) -> tuple[int, float, bool]:
        config = make_plan(read_pipeline(path, overrides), path).tasks[0].config
        keys = [item[len("sft.") :] for item in overrides]
        by_hand = stage_plan("sft", [str(file), "lora.alpha=64", *by_hand_too, *keys])[0]
        assert by_hand.tasks[0].config == config
        assert isinstance(config, TrainingConfig)
        assert config.lora is not None
        return config.lora.r, config.lora.alpha, config.lora.use_dora

    assert lora() == (16, 64, True)
    assert lora("sft.lora.r=8") == (8, 64, True)
    assert lora("sft.lora.r=8", "sft.lora.alpha=4") == (8, 4, True)
    plain = LoraConfig(r=8)
    assert lora("sft.lora.use_dora=false", "sft.lora={r: 8}") == (8, plain.alpha, plain.use_dora)
    with pytest.raises(ConfigError, match=r"lora\.alpa: unknown key[\s\S]*did you mean"):
        lora("sft.lora.alpa=8")
    with pytest.raises(ConfigError, match=r"report_to = .*: Input should be"):
        lora("sft.report_to.0=wandb")


@pytest.mark.parametrize("entry", ["own", "[own]", "{set: 5}", "{set: [a]}"])
def test_an_override_of_a_stage_that_is_written_wrongly_is_answered_with_what_is_wrong(
    tmp_path: Path, entry: str
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(f"name: toy\nstages: {{sft: {entry}}}\n")
    with pytest.raises(ConfigError, match=r"stages\.sft.*Input should be"):
        read_pipeline(path, ["sft.seed=1"])


def test_a_text_keeps_its_line_breaks_and_yaml_of_several_lines_is_read() -> None:
    """A chat template is given so: folded into spaces, as YAML has it, it would write other prompts."""
    template = "{% for m in messages %}\n  {{ m.content }} \N{SNOWMAN} 'a' \"b\" \\n\n{% endfor %}\n"
    for text in (template, "plain\nlines"):
        assert merge({}, [f"chat_template={text}"]) == {"chat_template": text}
    assert merge({}, ["lora=r: 4\nalpha: 8"]) == {"lora": {"r": 4, "alpha": 8}}


@pytest.mark.parametrize("text", ["12:00:00", "1:30", "010", "-0_17", "1:30.5"])
def test_a_number_in_base_60_or_8_is_no_number_here(tmp_path: Path, text: str) -> None:
    """Slurm's 12:00:00 was 43200 minutes, a seed of 010 was 8, and nothing said so."""
    read = yaml.safe_load(text)
    assert isinstance(read, int | float)
    (tmp_path / "x.yaml").write_text(f"keys: {{minutes: {text}}}  # 12:00\n")
    for reading in (lambda: read_yaml(tmp_path / "x.yaml"), lambda: merge({}, [f"minutes={text}"])):
        with pytest.raises(ConfigError, match=re.escape(f"{text}, which it takes for {read}")):
            reading()
    (tmp_path / "x.yaml").write_text(f"minutes: '{text}'\n")
    assert read_yaml(tmp_path / "x.yaml") == merge({}, [f"minutes='{text}'"]) == {"minutes": text}


def test_what_has_a_colon_or_a_zero_in_it_is_left_alone(tmp_path: Path) -> None:
    texts = [
        "0",
        "0.5",
        "2024-07-26",
        "a:1:2",
        "http://localhost:8000/v1",
        "0x1f",
        "1e-05",
        "build_datasets:01",
        "v0.10",
    ]
    (tmp_path / "x.yaml").write_text("keys: [" + ", ".join(texts) + "]\n")
    assert len(read_yaml(tmp_path / "x.yaml")["keys"]) == len(texts)
    assert merge({}, [f"key={texts[4]}"]) == {"key": texts[4]}


@pytest.mark.parametrize("words", [["run=", "sft.seed=3"], ["sft.seed=3", "workspace="], ["run", "=", "sft.seed=3"]])
def test_an_empty_variable_of_the_shell_takes_no_other_key_as_its_value(words: list[str]) -> None:
    """`workspace=$WORK run=mine` with $WORK unset wrote all into a new folder `run=mine`."""
    with pytest.raises(ConfigError, match="an override without a value"):
        joined(words)


def test_a_word_is_a_list_of_one() -> None:
    keys = {"learning_rate": 1e-4}
    for word, key in (("sigmoid", "loss_type"), ("wandb", "report_to")):
        assert load(PreferenceConfig, keys, [f"{key}={word}"]) == load(PreferenceConfig, keys, [f"{key}=[{word}]"])
    assert load(PreferenceConfig, keys, ["report_to=none"]).report_to == []
    with pytest.raises(ConfigError, match="no objective 'sigmod'"):
        load(PreferenceConfig, keys, ["loss_type=sigmod"])
    with pytest.raises(ConfigError, match=r"loss_type = 5: Input should be a list, as in \[a, b\]"):
        load(PreferenceConfig, keys, ["loss_type=5"])


def test_a_stage_by_hand_takes_its_keys_as_a_pipeline_does() -> None:
    inputs = ["inputs.datasets=d", "inputs.policy=p"]
    (plain, named) = (stage_plan("dpo", [f"{name}beta=0.2", *inputs])[0].tasks[0] for name in ("", "dpo."))
    assert named.config == plain.config


def test_a_run_may_be_called_by_a_number(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("name: 2024\nstages: {ingest_reviews: {}}\n")
    assert (read_pipeline(path, ["run=1"]).run, read_pipeline(path).name) == ("1", "2024")
    with pytest.raises(ConfigError, match=r"revision = 1234567: Input should be a text: put it in quotes"):
        load(TrainingConfig, {"learning_rate": 1, "num_train_epochs": 1}, ["revision=1234567"])
    with pytest.raises(ConfigError, match="is not given"):  # read as the text that it is
        load(TrainingConfig, {"learning_rate": 1, "num_train_epochs": 1}, ["revision='1234567'"])
