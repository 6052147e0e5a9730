"""What people type on their first day: each is answered with words that, typed in turn, are accepted."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from prefmill.cli.doctor import check_python
from prefmill.cli.main import main
from prefmill.core.config import load
from prefmill.core.errors import PrefmillError
from prefmill.families.causal.loading import require_folder
from prefmill.families.mdlm.config import DiffusionPreferenceConfig
from prefmill.pipeline.checked_plan import closed, not_here, plan_to_run
from prefmill.pipeline.manual_submission import stage_plan
from prefmill.pipeline.plan import make_plan, read_pipeline
from prefmill.store.artifacts import read
from prefmill.training.preference_config import PreferenceConfig
from tests.conftest import REPOSITORY

DEMO, REVIEWS = (REPOSITORY / f"configs/pipelines/{name}.yaml" for name in ("demo", "demo_model"))


def _beta(words: list[str]) -> float:
    (task,) = (task for task in make_plan(read_pipeline(DEMO, words), DEMO).tasks if task.stage.name == "dpo")
    assert isinstance(task.config, PreferenceConfig)
    return task.config.beta


@pytest.mark.parametrize("words", [["beta=0.2"], ["dpo.beta", "0.2"], ["dpo:beta=0.2"], ["dpo/beta=0.2"]])
def test_a_key_written_in_another_way_is_answered_with_the_way_that_works(words: list[str]) -> None:
    with pytest.raises(PrefmillError) as refused:
        _beta(words)
    advice = re.findall(r"[\w.]+=[\w.]+", str(refused.value.details["fix"]))
    assert "dpo.beta=0.2" in advice
    assert _beta(["dpo.beta=0.2"]) == 0.2


def test_keys_are_taken_as_a_pipelines_file_has_them() -> None:
    """`dpo.set.beta` was told `did you mean 'subset'`, and `dpo.config` had no answer but all keys of the stage."""
    assert _beta(["dpo.set.beta=0.2"]) == 0.2
    assert read_pipeline(DEMO, ["dpo.config=own_pairs"]).stages["dpo"].config == "own_pairs"
    sweep = REPOSITORY / "configs/pipelines/sweep.yaml"  # has keys of both names
    given = read_pipeline(sweep, ["sweep.set.beta=0.2", "sweep.config=x.yaml"]).stages["sweep"].set
    assert (given["set.beta"], given["config"]) == (0.2, "x.yaml")


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--dpo.beta=0.2", "dpo.beta=VALUE"),
        ("--learning-rate=1", "STAGE.learning_rate=VALUE"),
        ("--lora.r=8", "STAGE.lora.r=VALUE"),
    ],
)
def test_a_flag_of_other_trainers_is_answered_with_the_form_of_a_key(
    flag: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["plan", str(DEMO), flag])
    assert f"after its stage: {told}" in capsys.readouterr().err


def test_an_input_of_a_stage_is_given_as_its_keys_are(tmp_path: Path) -> None:
    """`expected: inputs.policy=FOLDER` was told, and in a pipeline no such thing was accepted."""
    tasks = make_plan(read_pipeline(DEMO, [f"dpo.inputs.policy={tmp_path}"]), DEMO).tasks
    assert [task.inputs["policy"] for task in tasks if task.stage.name == "dpo"] == [(tmp_path,)]
    by_hand = stage_plan("dpo", [f"dpo.inputs.policy={tmp_path}", "inputs.datasets=d"])[0]
    assert by_hand.tasks[0].inputs["policy"] == (tmp_path,)


def test_a_stage_file_is_found_without_its_ending_and_named_where_it_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(REPOSITORY)
    inputs = ["inputs.policy=p", "dataset=d.jsonl"]
    plans = [stage_plan("dpo", [f"configs/dpo/own_pairs{ending}", *inputs])[0] for ending in ("", ".yaml")]
    assert plans[0].tasks[0].config == plans[1].tasks[0].config
    with pytest.raises(PrefmillError, match=r"did you mean 'configs/dpo/own_pairs\.yaml'"):
        stage_plan("dpo", ["own_pairs.yaml", *inputs])
    with pytest.raises(PrefmillError, match=r"did you mean 'configs/pipelines/demo\.yaml'"):
        read_pipeline(Path("demo.yaml"))


@pytest.mark.parametrize(
    ("kind", "keys", "told"),
    [
        (PreferenceConfig, "loss_type=dpo", "DPO of text is sigmoid"),
        (PreferenceConfig, "loss_type=spg", "'spg' is an objective of other stages"),
        (DiffusionPreferenceConfig, "loss_type=flow_dpo", "objectives are sigmoid, .*, espo"),
        (PreferenceConfig, "loss_type=[]", "give one weight for each objective"),
        (PreferenceConfig, "loss_type=[sigmoid,sft]", "give one weight for each objective"),
        (PreferenceConfig, "loss_type=robust", "set label_smoothing"),
        (PreferenceConfig, "save_steps=7 logging_steps=5", "take save_steps=10"),
    ],
)
def test_what_a_training_would_refuse_is_refused_before_it_is_queued(
    kind: type[PreferenceConfig], keys: str, told: str
) -> None:
    with pytest.raises(PrefmillError, match=told) as refused:
        load(kind, {}, keys.split())
    assert "mapo" not in str(refused.value)


def test_a_folder_beside_the_artifact_is_answered_with_the_artifact(tmp_path: Path) -> None:
    task = tmp_path / "tiny_model" / "all"
    task.mkdir(parents=True)
    (task / "manifest.json").write_text("{}")
    for folder, told in {"tiny_model": str(task), "tinymodel/all": "did you mean 'tiny_model'"}.items():
        with pytest.raises(PrefmillError, match=re.escape(told)):
            read(tmp_path / folder)


@pytest.mark.parametrize("given", ["pairs.jsonl", "pairs.jsonl/all"])
def test_a_file_of_ones_own_in_the_place_of_an_artifact_is_told_as_that(given: str, tmp_path: Path) -> None:
    """It was asked whether 'pairs.jsonl' was meant by 'pairs.jsonl', which the folder did not have."""
    (tmp_path / "pairs.jsonl").write_text("{}")
    with pytest.raises(PrefmillError, match=r"give a folder that a stage wrote; a file .*: pairs\.jsonl"):
        read(tmp_path / given)


@pytest.mark.parametrize("word", ["sft", "sft:clean"])
def test_a_stage_as_a_word_of_its_own_is_told_the_option_for_it(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The advice was `write sft=VALUE`, which is refused as well."""
    assert main(["run", str(DEMO), "--dry-run", word, "dpo"]) == 2
    assert f"take a stage or task as --only {word}\n" in capsys.readouterr().err
    assert main(["run", str(DEMO), "--dry-run", "--only", word]) == 0


def test_a_path_that_is_misspelt_is_told_before_the_stages_that_come_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reviews were ingested and scored for hours before the training said that its file is not there."""
    misspelt = tmp_path / "template.jinga"
    few = "ingest_reviews.sources=[{format: generated, num_papers: 40}]"
    words = [str(DEMO), f"workspace={tmp_path}", few, f"sft.chat_template={misspelt}"]
    assert main(["run", *words]) == 2
    assert f"sft:clean: {misspelt}" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
    for words_of_a_look in (
        ["plan"],
        ["submit", "--dry-run", "--cluster", str(REPOSITORY / "configs/clusters/test.yaml")],
    ):
        assert main([*words_of_a_look, *words]) == 0
        assert f"! sft:clean is to read {misspelt}" in capsys.readouterr().out
    # The advice is accepted, and so is the file once it is there.
    assert main(["run", *words, "--only", "ingest_reviews"]) == 0
    misspelt.write_text("{{ messages }}")
    assert main(["run", *words, "--only", "ingest_reviews"]) == 0


def test_a_model_in_a_folder_that_is_not_there_is_told_and_names_of_the_hub_and_of_servers_are_not(
    tmp_path: Path,
) -> None:
    def missed(words: list[str]) -> list[tuple[str, Path]]:
        plan = make_plan(read_pipeline(REVIEWS, [f"workspace={tmp_path}", *words]), REVIEWS)
        return [(key, path) for key, path in not_here(plan, plan.tasks) if key.startswith(("sft", "score"))]

    assert missed([f"sft.model_name_or_path={tmp_path}/qwen"]) == [("sft:clean", tmp_path / "qwen")]
    served = "score_reviews.engine={engine: chat, model_name_or_path: /models/judge}"
    assert missed(["sft.model_name_or_path=Qwen/Qwen3-4B", served]) == []


def test_a_file_that_a_task_of_the_plan_makes_is_not_missed(tmp_path: Path) -> None:
    made = f"score_reviews.checklist={tmp_path}/data/demo/judge_quality/all/checklist.json"
    other = f"score_reviews.checklist={tmp_path}/data/other/judge_quality/all/checklist.json"
    plans = [make_plan(read_pipeline(DEMO, [f"workspace={tmp_path}", given]), DEMO) for given in (made, other)]
    assert [len(list(not_here(plan, plan.tasks))) for plan in plans] == [0, 2]


def test_an_output_by_its_real_path_is_of_the_plan_where_the_workspace_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "scratch").symlink_to(tmp_path / "disk")
    made = f"score_reviews.checklist={tmp_path}/disk/data/demo/judge_quality/all/checklist.json"
    plan = make_plan(read_pipeline(DEMO, [f"workspace={tmp_path}/scratch", made]), DEMO)
    assert list(not_here(plan, plan.tasks)) == []


def test_a_path_that_cannot_be_looked_at_is_told_like_one_that_is_not_there(tmp_path: Path) -> None:
    too_long = tmp_path / ("t" * 300)
    plan = make_plan(read_pipeline(DEMO, [f"workspace={tmp_path}", f"sft.chat_template={too_long}"]), DEMO)
    assert {path for _, path in not_here(plan, plan.tasks)} == {too_long}


def test_a_closed_folder_is_no_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in a colleague's closed folder was `not there`, and its path to be corrected."""

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", refuse)
        told = closed(Path("/home/her/reviews.csv"))
    assert told == " (no access: Permission denied)"
    assert closed(Path("/no/such/reviews.csv")) == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["status", "--run", "mine"], "a run's name stands alone: prefmill status NAME"),
        (["advance", "--run=mine"], "a run's name stands alone: prefmill advance NAME"),
        (["rerun", "sft", "mine"], "a run is given as --run mine"),
    ],
)
def test_a_run_that_is_named_in_another_commands_way(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert told in capsys.readouterr().err


def test_a_model_that_is_missing_is_told_with_keys_that_a_pipeline_takes(tmp_path: Path) -> None:
    """`inputs.model=FOLDER` and `model_name_or_path=...` were told: neither is a key of a pipeline."""
    given = [f"workspace={tmp_path}", "evaluate.model_name_or_path=q"]
    with pytest.raises(PrefmillError) as refused:
        plan_to_run(read_pipeline(REVIEWS, given), REVIEWS)
    advice = re.findall(r"sft\.[\w.]+=", str(refused.value.details["fix"]))
    assert advice == ["sft.inputs.model=", "sft.model_name_or_path="]
    for key in advice:
        plan_to_run(read_pipeline(REVIEWS, [*given, f"{key}{tmp_path}"]), REVIEWS)


def test_a_pipeline_that_is_run_from_another_folder_says_where_its_configurations_were_sought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline of one's own, outside configs/, named one missing file beside itself, where nobody had put one."""
    (tmp_path / "mine").mkdir()
    pipeline = tmp_path / "mine" / "own.yaml"
    pipeline.write_text("name: own\nstages:\n  ingest_reviews: { config: demmo }\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PrefmillError, match=r"no configuration 'demmo' of stage ingest_reviews\n") as refused:
        make_plan(read_pipeline(pipeline), pipeline)
    assert f"{tmp_path}/configs/ingest_reviews/demmo.yaml" in str(refused.value.details["expected"])
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(PrefmillError, match=r"did you mean 'demo'"):
        make_plan(read_pipeline(pipeline), pipeline)


def test_a_workspace_that_is_a_link_to_nothing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A scratch disk that is not mounted left the link: a traceback (`File exists`)."""
    (tmp_path / "scratch").symlink_to(tmp_path / "disk")
    command = ["run", str(DEMO), f"workspace={tmp_path}/scratch", "--only", "ingest_reviews"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "a link that leads nowhere" in told
    assert f"make the folder that it names, {tmp_path}/disk" in told


def test_the_command_that_compiles_works_in_a_folder_with_a_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place := tmp_path / "my project").mkdir()
    (place / "module.py").touch()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(place))
    not_compiled = SimpleNamespace(cached=str(place / "torch.pyc"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: not_compiled)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    uncompiled = SimpleNamespace(cached=str(tmp_path / "none.pyc"))  # whatever this environment has
    monkeypatch.setattr("importlib.util.find_spec", lambda name: uncompiled)
    (fix,) = (str(found.fix) for found in check_python() if "compile once" in str(found.fix))
    command = shlex.split(fix.partition("compile once: python ")[2])
    assert subprocess.run([sys.executable, *command], cwd=tmp_path, check=False).returncode == 0
    assert list(place.glob("__pycache__/module.*.pyc"))


def test_a_stage_alone_of_a_run_without_the_ones_before_it_names_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was asked to check the path of a folder that it had not named."""
    few = "ingest_reviews.sources=[{format: generated, num_papers: 40}]"
    command = ["run", str(DEMO), f"workspace={tmp_path}", few, "--only"]
    assert main([*command, "build_datasets"]) == 2
    told = capsys.readouterr().out
    assert "got:      not finished: ingest_reviews:all, score_reviews:shard0, score_reviews:shard1\n" in told
    assert "begin with --only ingest_reviews\n" in told
    assert main([*command, "ingest_reviews"]) == 0
    assert main([*command, "score_reviews"]) == 0


@pytest.mark.parametrize("inside", ["my model", "snapshots/0a1b"])
def test_the_folder_around_a_model_is_answered_with_the_models(inside: str, tmp_path: Path) -> None:
    """It was told to be damaged, and to download it again."""
    (tmp_path / inside).mkdir(parents=True)
    (tmp_path / inside / "config.json").write_text("{}")
    with pytest.raises(PrefmillError, match="in folders inside it") as refused:
        require_folder(str(tmp_path))
    require_folder(str(refused.value.details["fix"]).removeprefix("give "))
