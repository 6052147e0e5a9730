"""sft on datasets that build_datasets did not make: chats in every form, and the chosen side of preferences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from training_artifacts import make_datasets, make_task, publish_as

from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError, PipelineError
from prefmill.pairs.chats import CHAT_FORMS, ChatSource, write_chats
from prefmill.pairs.formats import FORMS, detect
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.store.row_files import file_rows
from prefmill.training.checkpoints import STEPS, read_curve
from stages.sft import SftConfig, run
from tests.conftest import REPOSITORY
from tests.unit.pairs.test_formats import SAME

USER, SYSTEM = {"role": "user", "content": "Q?"}, {"role": "system", "content": "Be brief."}
GOOD = {"role": "assistant", "content": "good"}
# Every row says the same: system "Be brief.", user "Q?", answer "good".
CHATS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [SYSTEM, USER, GOOD], "prompt": "Q?", "prompt_id": "x"},
    "conversations": {
        "system": "Be brief.", "conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "good"}],
    },
    "prompt_completion": {"system": "Be brief.", "prompt": "Q?", "completion": "good"},
    "instruction_output": {"system": "Be brief.", "instruction": "Q?", "input": "", "output": "good"},
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3, "num_train_epochs": 1, "precision": "fp32", "effective_batch_size": 4, "logging_steps": 1,
    "per_device_train_batch_size": 4, "max_length": 2048, "on_overlong": "drop", "save_steps": 50, "report_to": [],
}  # fmt: skip


def written(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> list[dict[str, Any]]:
    write_jsonl(folder / "rows.jsonl", rows)
    source = validate(ChatSource, {"dataset": str(folder / "rows.jsonl"), **keys})
    train, _ = write_chats(source, folder / "own", folder / "bad_rows.json")
    return list(read_jsonl(train))


@pytest.mark.parametrize("form", [*CHATS, *SAME])
def test_the_same_answer_in_every_form(form: str, tmp_path: Path) -> None:
    row = {**SAME, **CHATS}[form]
    assert detect(row, "f:1", CHAT_FORMS) == form
    assert written(tmp_path, [{**row, "id": "a"}]) == [{"id": "a", "messages": [SYSTEM, USER, GOOD]}]


def test_every_form_has_its_test() -> None:
    assert set(CHAT_FORMS) == {*FORMS, *CHATS}


def test_an_answer_counts_once_and_bad_ones_not_at_all(tmp_path: Path) -> None:
    pairs = [{"prompt": "Q?", "chosen": "good", "rejected": bad} for bad in ("bad", "worse")]
    rows = written(tmp_path, [*pairs, {"prompt": "Q?", "chosen": "fine", "rejected": "bad"}])
    assert [row["messages"][-1]["content"] for row in rows] == ["good", "fine"]
    judged = [{"prompt": "Q?", "completion": text, "label": text == "good"} for text in ("good", "bad")]
    assert [row["messages"][-1]["content"] for row in written(tmp_path, judged)] == ["good"]


def test_all_turns_but_the_last_are_the_prompt(tmp_path: Path) -> None:
    turns = [USER, GOOD, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "that"}]
    assert written(tmp_path, [{"messages": turns}])[0]["messages"] == turns
    with pytest.raises(InputError, match="must be one assistant turn, but is: user"):
        written(tmp_path, [{"messages": turns[:3]}])


def test_images_of_shared_chats(shared_data: Path, tmp_path: Path) -> None:
    """Chats with images in several turns; the pictures themselves are not part of the sample."""
    path = shared_data / "pairs" / "llamafactory_v1_multimodal_demo.jsonl"
    rows = [row.values for row in file_rows(path)]
    named = {part["value"] for row in rows for turn in row["messages"] for part in turn["content"]
             if part["type"] == "image_url"}  # fmt: skip
    for name in named:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 60)).save(tmp_path / name)
    found = written(tmp_path, rows, image_folder=str(tmp_path))
    assert len(found) == len({json.dumps(row) for row in rows})
    for row in found:
        assert sum(turn["content"].count("<image>") for turn in row["messages"]) == len(row["images"])
        assert all(Path(image).is_file() for image in row["images"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    from prefmill.demo.tiny_models import build

    return publish_as(build("qwen2", tmp_path_factory.mktemp("base")), "checkpoint")


def sft(folder: Path, base: Artifact, **keys: Any) -> dict[str, Any]:
    return run(validate(SftConfig, {**SETTINGS, **keys}), make_task("sft", folder, model=base))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llamafactory_dpo_en_demo.json", "llamafactory_v1_dpo_demo.jsonl"])
def test_it_trains_on_shared_pairs(name: str, shared_data: Path, base: Artifact, tmp_path: Path) -> None:
    """The rows trained on are the distinct chosen answers among the shortest, by a count of the test's own."""
    path = shared_data / "pairs" / name
    text = path.read_text()
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    rows = sorted(rows, key=lambda row: len(json.dumps(row)))[:24]
    answers = {json.dumps([row.get("conversations"), row.get("chosen", row.get("chosen_messages"))]) for row in rows}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    metrics = sft(tmp_path, base, dataset=str(tmp_path / "rows.json"), val_fraction=0.2)
    held_out = list(read_jsonl(tmp_path / "out" / "work" / "chats" / "sft_val" / "data.jsonl"))
    assert metrics["train_rows"] + len(held_out) == len(answers)
    assert held_out
    assert metrics["val_loss"] is not None
    losses = [row["loss"] for row in read_curve(tmp_path / "logs" / STEPS) if "loss" in row]
    assert losses[-1] < losses[0]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_examples_configuration_trains(base: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefmill.core.config import load

    monkeypatch.chdir(REPOSITORY)
    config = load(SftConfig, REPOSITORY / "configs" / "sft" / "own_chats.yaml")
    metrics = run(config, make_task("sft", tmp_path, model=base))
    assert metrics["steps"] > 0


def test_what_it_refuses(base: Artifact, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no dataset to train on"):
        sft(tmp_path, base)
    write_jsonl(tmp_path / "rows.jsonl", [CHATS["messages"]])
    with pytest.raises(PipelineError, match="two datasets to train on"):
        run(
            validate(SftConfig, {**SETTINGS, "dataset": str(tmp_path / "rows.jsonl")}),
            make_task("sft", tmp_path, model=base, datasets=make_datasets(tmp_path / "data")),
        )
    with pytest.raises(InputError, match="this form of preference data is not known"):
        written(tmp_path, [{"text": "only text"}])
    with pytest.raises(InputError, match="no answers to train on"):
        written(tmp_path, [{"prompt": "Q?", "completion": "bad", "label": False}])
    with pytest.raises(ConfigError, match="did you mean 'messages'"):
        validate(ChatSource, {"dataset": "some/name", "pair_format": "message"})
