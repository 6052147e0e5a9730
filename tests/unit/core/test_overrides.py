"""What is said on the command line about a stage's nested keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefmill.core.config import merge
from prefmill.core.errors import ConfigError
from prefmill.pipeline.manual_submission import stage_plan
from prefmill.pipeline.plan import make_plan, read_pipeline
from prefmill.training.config import LoraConfig, TrainingConfig


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
