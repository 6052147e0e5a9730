"""The folder that a training publishes: the weights that were trained, finite, and loaded again as anyone would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from training_artifacts import make_checkpoint, make_datasets, make_task, publish_as

from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, PipelineError
from stages import dpo, sft
from tests.tiny import save_tiny_qwen2

CASES = Path(__file__).parents[3] / "shared" / "cases"

SETTINGS: dict[str, Any] = {
    "learning_rate": 2e-3, "num_train_epochs": 1, "precision": "fp32", "per_device_train_batch_size": 1,
    "effective_batch_size": 4, "max_length": 64, "logging_steps": 100, "save_steps": 100, "report_to": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_checkpoint(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_datasets(tmp_path_factory.mktemp("datasets"))


def train_dpo(folder: Path, start: Artifact, datasets: Artifact, **keys: Any) -> dict[str, Any]:
    config = validate(dpo.DpoConfig, {**SETTINGS, **keys})
    return dpo.run(config, make_task("dpo", folder, policy=start, datasets=datasets))


def train_sft(folder: Path, start: Artifact, datasets: Artifact, **keys: Any) -> dict[str, Any]:
    config = validate(sft.SftConfig, {**SETTINGS, **keys})
    return sft.run(config, make_task("sft", folder, model=start, datasets=datasets))


@pytest.mark.parametrize("train", [train_dpo, train_sft])
def test_a_training_that_is_lost_between_two_log_lines_publishes_nothing(
    train: Any, tmp_path: Path, start: Artifact, datasets: Artifact
) -> None:
    """At this learning rate the second step has no loss; logged are the first step and none of the others."""
    with pytest.raises(PipelineError, match="is no longer a number") as failure:
        train(tmp_path, start, datasets, learning_rate=1e30, max_grad_norm=1e9)
    assert "step 2" in str(failure.value)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def as_bf16(folder: Path) -> Artifact:
    """The tiny model as its publisher would have it: in bf16, with a generation_config.json that nothing can save."""
    import torch
    from transformers import AutoModelForCausalLM

    if not CASES.is_dir():
        pytest.skip("needs the cases beside the checkout (shared/cases/text)")
    save_tiny_qwen2(folder)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    shutil.copyfile(CASES / "text" / "generation_config.json", folder / "generation_config.json")
    return publish_as(folder, "checkpoint")


def test_a_short_training_on_bf16_weights_is_kept_and_its_adapter_loads(tmp_path: Path, datasets: Artifact) -> None:
    """Merged into bf16 weights, as before, most of it is lost: they have no numbers between them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    start, keys = as_bf16(tmp_path / "start"), {"learning_rate": 1e-4, "lora": {"r": 4, "alpha": 8}}
    lost = train_dpo(tmp_path / "bf16", start, datasets, save_dtype="bf16", **keys)
    kept = train_dpo(tmp_path / "auto", start, datasets, **keys)
    assert lost["saved_lost_share"] > 0.5
    assert (kept["saved_dtype"], kept["saved_lost_share"] < 0.01) == ("fp32", True)
    out = tmp_path / "auto" / "out"
    merged = AutoModelForCausalLM.from_pretrained(out)
    base = AutoModelForCausalLM.from_pretrained(start.path, dtype="float32")
    adapted = PeftModel.from_pretrained(base, out / "adapter").merge_and_unload()
    for name, value in merged.state_dict().items():
        assert (value - adapted.state_dict()[name]).abs().max() < 1e-6, name
    said = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == f"sha256:{start.manifest.content_digest}"
    told = [path for path in out.rglob("*.*") if path.suffix in (".json", ".md") and path.name != "trainer_state.json"]
    assert not [path for path in told if str(tmp_path) in path.read_text()]
    assert json.loads((out / "config.json").read_text())["use_cache"] is True
    assert json.loads((out / "generation_config.json").read_text())["do_sample"] is True


def test_a_bf16_base_gives_a_bf16_folder_where_it_holds_the_training(tmp_path: Path, datasets: Artifact) -> None:
    start = as_bf16(tmp_path / "start")
    metrics = train_sft(tmp_path / "long", start, datasets, learning_rate=2e-3)
    assert metrics["saved_dtype"] == "bf16"
    assert metrics["saved_lost_share"] < 0.1


def test_the_card_names_a_model_of_this_machine_without_its_place(tmp_path: Path, datasets: Artifact) -> None:
    """The same model elsewhere gave another card, and its content another digest."""
    for place in ("one", "other"):
        start = str(save_tiny_qwen2(tmp_path / place / "tiny"))
        config = validate(sft.SftConfig, {**SETTINGS, "model_name_or_path": start})
        sft.run(config, make_task("sft", tmp_path / place, datasets=datasets))
    one, other = ((tmp_path / place / "out" / "README.md").read_text() for place in ("one", "other"))
    assert '"model_name_or_path": "tiny"' in one
    assert one == other


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_that_trls_loss_would_read_past_is_refused(
    tied: bool, tmp_path: Path, start: Artifact, datasets: Artifact
) -> None:
    """TRL's own words came with a traceback; for tokens of a tied head it had none."""
    import peft
    from transformers import AutoModelForCausalLM

    lora: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"]}
    model = str(start.path)
    if tied:
        said = {**json.loads((start.path / "config.json").read_text()), "tie_word_embeddings": True}
        model = str(shutil.copytree(start.path, tmp_path / "tied"))
        (tmp_path / "tied" / "config.json").write_text(json.dumps(said))
        weights = load_file(start.path / "model.safetensors")
        weights.pop("lm_head.weight")  # a head of its own in the files would be trained as such
        save_file(weights, tmp_path / "tied" / "model.safetensors", {"format": "pt"})
        keys = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[5, 6])
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), keys).save_pretrained(tmp_path / "adapter")
        lora = {"start": str(tmp_path / "adapter")}
    config = validate(sft.SftConfig, {**SETTINGS, "model_name_or_path": model, "lora": lora})
    with pytest.raises(ConfigError, match="all-linear spares the head"):
        sft.run(config, make_task("sft", tmp_path, datasets=datasets))
