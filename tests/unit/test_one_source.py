"""What a task would refuse hours later is refused before anything runs: two models to start from, or none."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefmill.core.errors import PipelineError
from prefmill.pipeline.checked_plan import plan_to_run
from prefmill.pipeline.manual_submission import stage_plan
from prefmill.pipeline.plan import read_pipeline
from tests.conftest import REPOSITORY

PIPELINES = REPOSITORY / "configs/pipelines"


def refusal(name: str, *overrides: str) -> PipelineError:
    source = PIPELINES / f"{name}.yaml"
    with pytest.raises(PipelineError) as caught:
        plan_to_run(read_pipeline(source, overrides), source)
    return caught.value


def test_two_models_are_refused_before_the_first_is_trained(tmp_path: Path) -> None:
    """LLaDA's pipelines were shipped so: mdlm_dpo named a model and had mdlm_sft's."""
    place = f"workspace={tmp_path}"
    error = refusal("mdlm_llada", place, "mdlm_dpo.model_name_or_path=GSAI-ML/LLaDA-8B-Instruct")
    assert "two sources of 'policy' (checkpoint) for mdlm_dpo:all" in str(error)
    assert f"inputs.policy={tmp_path}/checkpoints/mdlm_llada/mdlm_sft/all and model_name_or_path=GSAI" in str(error)
    fix = "mdlm_dpo.model_name_or_path=null"
    assert str(error).endswith(f"fix:      {fix}")
    plan_to_run(read_pipeline(PIPELINES / "mdlm_llada.yaml", [place, fix]), PIPELINES / "mdlm_llada.yaml")


@pytest.mark.parametrize(
    ("name", "override", "expected"),
    [
        ("demo_model", "run=a", "no source of 'model' (checkpoint) for sft:clean"),
        ("mdlm", "mdlm_sft.new_model=null", "no source of 'model'"),
        ("mdlm", "mdlm_sft.model_name_or_path=gpt2", "two sources of 'model'"),
        ("review", "dpo.dataset=someone/pairs", "two sources of 'datasets'"),
        ("mdlm", "mdlm_sft.sft_data_path=rows.jsonl", "two sources of 'datasets'"),
        ("sdxl", "evaluate_images.published_scorer=/models/pickscore", "two sources of 'scorer'"),
        ("sdxl", "rate_images.images=/pictures", "two sources of 'images'"),
        ("sdxl", "train_reward.model_name_or_path=null", "no source of 'clip'"),
    ],
)
def test_every_input_that_a_key_replaces(name: str, override: str, expected: str, tmp_path: Path) -> None:
    assert expected in str(refusal(name, f"workspace={tmp_path}", override))


SDXL, JUDGED = (
    ("model_name_or_path=a/b", "inputs.pairs=/p"),
    ("model_name_or_path=a/b", "published_scorer=/s", "inputs.tuned=/t"),
)


@pytest.mark.parametrize(
    ("stage", "keys", "said"),
    [
        ("sdxl_dpo", (*SDXL, "objective=dspo_rm"), ["no input 'reward'", "or another objective"]),
        ("sdxl_dpo", (*SDXL, "inputs.reward=/r"), ["an input 'reward' that nothing asks for", "set objective=dspo_rm"]),
        (
            "evaluate_images",
            (*JUDGED, "splits=[test]", "resolution=64"),
            ["splits, resolution", "inputs.pairs"],
        ),
        ("evaluate_images", (*JUDGED, "drift_draws=4"), ["keys of the input 'pairs'", "got:      drift_draws"]),
    ],
)
def test_an_input_and_its_keys_are_refused_without_each_other(
    stage: str, keys: tuple[str, ...], said: list[str], tmp_path: Path
) -> None:
    """The task was refused when it had its GPU; `drift_draws` without pairs never was, and did nothing."""
    with pytest.raises(PipelineError) as caught:
        stage_plan(stage, [f"workspace={tmp_path}", *keys])
    assert all(part in str(caught.value) for part in said), caught.value


@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        ("sdxl_dpo", (*SDXL, "objective=dspo_rm", "inputs.reward=/r")),
        ("evaluate_images", (*JUDGED, "drift_draws=0")),
        ("evaluate_images", (*JUDGED, "drift_draws=4", "inputs.pairs=/p")),
    ],
)
def test_an_input_and_its_keys_are_taken_together(stage: str, keys: tuple[str, ...], tmp_path: Path) -> None:
    stage_plan(stage, [f"workspace={tmp_path}", *keys])
