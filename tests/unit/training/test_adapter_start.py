"""Training that goes on with an adapter, and a reference that is one; what is checked before a model is loaded."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.config import identity, validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.core.stage import Task
from prefmill.families.causal.other_reference import reference_parts
from prefmill.store.jsonl import read_jsonl
from prefmill.training.adapter import add_adapter
from prefmill.training.checkpoints import STEPS, read_curve
from prefmill.training.preference_config import PreferenceConfig
from stages.dpo import DpoConfig

SMALL: dict[str, Any] = {
    "learning_rate": 1e-3, "num_train_epochs": 1, "precision": "fp32", "effective_batch_size": 16,
    "logging_steps": 1, "save_steps": 2, "max_length": 64, "report_to": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> Path:
    """An adapter of PEFT's own making that changes what the tiny model says."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter") / "a"
    torch.manual_seed(3)  # before PEFT draws its part: the tests that ran earlier are no part of the adapter
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=5, lora_dropout=0.5, target_modules=["q_proj", "v_proj"]
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_qwen2), lora)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(folder)
    return folder


def train(folder: Path, pairs: Path, **keys: Any) -> Path:
    from prefmill.families.causal.dpo import train_dpo

    config = validate(PreferenceConfig, {**SMALL, **keys})
    (folder / "out").mkdir(parents=True)
    task = Task("r", "dpo", "clean", {}, {}, {}, folder / "out", folder / "logs")
    train_dpo(config, task, str(config.model_name_or_path), pairs, None)
    return folder


def first_loss(folder: Path) -> float:
    return float(next(row["loss"] for row in read_curve(folder / "logs" / STEPS) if "loss" in row))


def test_a_target_that_no_layer_is_called_by_is_refused(tiny_qwen2: Path) -> None:
    """PEFT passes it over: of LLaMA's names those that a model lacks were not trained, without a word."""
    from transformers import AutoModelForCausalLM

    config = validate(PreferenceConfig, {"learning_rate": 1e-3, "lora": {"target_modules": ["q_proj", "qkv_proj"]}})
    with pytest.raises(ConfigError, match="no layer called qkv_proj"):
        add_adapter(AutoModelForCausalLM.from_pretrained(tiny_qwen2), config)


def scores(base: Path, adapter: Path | None, pairs: Path) -> dict[str, list[float]]:
    """Log-likelihoods of both sides by transformers' model or PEFT's, one sequence at a time."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    model = peft.PeftModel.from_pretrained(model, adapter).eval() if adapter else model
    found: dict[str, list[float]] = {}
    for row in read_jsonl(pairs):
        asked = [{"role": "user", "content": row["conversations"][0]["value"]}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text)["input_ids"]
        for side in ("chosen", "rejected"):
            answer = tokenizer(row[side]["value"] + "<|im_end|>\n")["input_ids"]
            with torch.no_grad():
                logps = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            found.setdefault(row["id"], []).append(logps.gather(1, torch.tensor(answer)[:, None]).sum().item())
    return found


def margins(folder: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(folder / "logs" / "margins" / "margins_log.jsonl"))


@pytest.mark.slow
def test_an_adapter_is_gone_on_with_and_is_its_own_reference(
    tmp_path: Path, tiny_qwen2: Path, adapter: Path, pairs_file: Path
) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    made = train(tmp_path / "on", pairs_file, model_name_or_path=str(adapter), layout="group", learning_rate=1e-9)
    assert first_loss(made) == pytest.approx(math.log(2), abs=1e-6)
    expected = scores(tiny_qwen2, adapter, pairs_file)
    for row in margins(made):
        assert [row["ref_chosen_logps"], row["ref_rejected_logps"]] == pytest.approx(expected[row["pair_id"]], abs=1e-4)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, made / "out" / "adapter"))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    said = json.loads((made / "out" / "adapter" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["lora_dropout"]) == (3, 5.0, 0.0)
    whole, base = (AutoModelForCausalLM.from_pretrained(path) for path in (made / "out", tiny_qwen2))
    moved = (
        whole.state_dict()["model.layers.0.self_attn.q_proj.weight"]
        - base.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    )
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    assert torch.allclose(moved, before[key.format("B")] @ before[key.format("A")] * 5 / 3, atol=1e-5)


@pytest.mark.slow
def test_an_adapter_can_be_the_reference(tmp_path: Path, tiny_qwen2: Path, adapter: Path, pairs_file: Path) -> None:
    made = train(tmp_path / "ref", pairs_file, model_name_or_path=str(tiny_qwen2), ref_name=str(adapter))
    expected = scores(tiny_qwen2, adapter, pairs_file)
    for row in margins(made):
        assert [row["ref_chosen_logps"], row["ref_rejected_logps"]] == pytest.approx(expected[row["pair_id"]], abs=1e-4)
    assert abs(first_loss(made) - math.log(2)) > 0.01


def test_an_adapter_in_the_hubs_cache_is_found_by_its_name(
    adapter: Path, tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a policy to go on with, as lora.start and as a reference, without a network."""
    from huggingface_hub import constants

    cached = tmp_path / "hub" / "models--me--mine"
    shutil.copytree(adapter, cached / "snapshots" / "abc123")
    for name in ("main", "v2"):
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / name).write_text("abc123" if name == "main" else "gone")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    local = validate(PreferenceConfig, {"model_name_or_path": str(adapter), "ref_name": str(adapter)})
    named = validate(PreferenceConfig, {"model_name_or_path": "me/mine", "ref_name": "me/mine"})
    assert named.model_name_or_path == str(tiny_qwen2)
    assert identity(named)["lora"] == identity(local)["lora"]
    assert reference_parts(named) == (str(tiny_qwen2), None, cached / "snapshots" / "abc123")
    start = validate(PreferenceConfig, {"model_name_or_path": str(tiny_qwen2), "lora": {"start": "me/mine"}})
    assert identity(start)["lora"] == identity(local)["lora"]
    other = validate(PreferenceConfig, {"model_name_or_path": "me/mine", "revision": "v2"})
    assert other.lora is None, "another revision, which is not here"
    (cached / "refs" / "v2").write_text("abc123")
    assert validate(PreferenceConfig, {"model_name_or_path": "me/mine", "revision": "v2"}).revision is None
    config = cached / "snapshots" / "abc123" / "adapter_config.json"
    said = {**json.loads(config.read_text()), "base_model_name_or_path": "me/base", "revision": "r7"}
    config.write_text(json.dumps(said))
    found = validate(PreferenceConfig, {"model_name_or_path": "me/mine", "revision": "v2"})
    assert (found.model_name_or_path, found.revision) == ("me/base", "r7"), "v2 is of the adapter, not of its base"
    with pytest.raises(ConfigError, match="revision: only what is on the hub has revisions"):
        validate(PreferenceConfig, {"model_name_or_path": str(adapter), "revision": "v2"})


def test_an_adapters_content_and_shape_are_the_configurations(adapter: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    named = validate(PreferenceConfig, {"model_name_or_path": str(adapter)})
    assert named.model_name_or_path == str(tiny_qwen2)
    assert named.lora is not None
    assert (named.lora.r, named.lora.alpha, named.lora.target_modules) == (3, 5.0, ["q_proj", "v_proj"])
    given = validate(PreferenceConfig, {"model_name_or_path": str(tiny_qwen2), "lora": {"start": str(adapter)}})
    assert given == named
    copy = shutil.copytree(adapter, tmp_path / "copy")
    assert identity(validate(PreferenceConfig, {"model_name_or_path": str(copy)})) == identity(named)
    assert "start" not in identity(validate(PreferenceConfig, {"lora": {"r": 2}}))["lora"]


@pytest.mark.parametrize(
    ("said", "lora", "why"),
    [
        ({"base_model_name_or_path": "sha256:abc"}, None, "give it as model_name_or_path"),
        ({"base_model_name_or_path": "/nowhere/model"}, None, "give it as model_name_or_path"),
        ({"peft_type": "IA3"}, None, "only plain LoRA"),
        ({"alora_invocation_tokens": [5]}, None, "alora_invocation_tokens: start from the base"),
        ({"init_lora_weights": "pissa_niter_16"}, None, "a base that was changed as its training began"),
        ({"init_lora_weights": "lora_ga"}, None, "save the merged model"),
        ({"target_modules": None}, None, "does not say target_modules or target_parameters"),
        ({}, {"r": 8}, "has another r"),
        ({"gone": True}, None, "nothing else is loaded"),
    ],
)
def test_adapters_that_cannot_be_gone_on_with_are_refused(
    said: dict[str, Any], lora: Any, why: str, adapter: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    if said.pop("gone", None):
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(config | said))
    with pytest.raises(ConfigError, match=why):
        validate(PreferenceConfig, {"model_name_or_path": str(folder), "lora": lora})


def test_a_config_beside_an_adapter_makes_no_model_of_it(adapter: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """Axolotl writes the base's config.json into the adapter's folder."""
    folder = shutil.copytree(adapter, tmp_path / "a")
    shutil.copy(tiny_qwen2 / "config.json", folder)
    config = validate(PreferenceConfig, {"model_name_or_path": str(folder)})
    assert config.model_name_or_path == str(tiny_qwen2)
    assert config.lora is not None
    assert config.lora.start == folder


def test_a_model_with_an_adapter_beside_it_is_refused(adapter: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """transformers adds the adapter to it, and vLLM does not."""
    from prefmill.families.causal.loading import load_model

    folder = shutil.copytree(tiny_qwen2, tmp_path / "m")
    for file in adapter.iterdir():
        shutil.copy(file, folder)
    with pytest.raises(InputError, match="a whole model and an adapter"):
        load_model(str(folder), precision="fp32")


@pytest.mark.parametrize("form", ["chat_template.jinja", "tokenizer_config.json"])
def test_chats_are_written_in_the_adapters_own_template(form: str, adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "a")
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    (folder / form).write_text(json.dumps({"chat_template": template}) if form.endswith("json") else template)
    for keys in ({"model_name_or_path": str(folder)}, {"lora": {"start": str(folder)}}):
        assert validate(DpoConfig, keys).chat_template == template
        assert validate(DpoConfig, {**keys, "chat_template": "{{ 1 }}"}).chat_template == "{{ 1 }}"
    (folder / form).unlink()
    assert validate(DpoConfig, {"model_name_or_path": str(folder)}).chat_template is None


def test_an_adapter_with_tokens_that_its_base_lacks_is_refused(adapter: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    from prefmill.families.causal.loading import load_tokenizer

    folder = shutil.copytree(adapter, tmp_path / "a")
    more = load_tokenizer(str(tiny_qwen2))
    more.save_pretrained(folder)
    load_tokenizer(str(tiny_qwen2), adapter=folder)
    more.add_tokens(["<|tool|>"], special_tokens=True)
    more.save_pretrained(folder)
    with pytest.raises(InputError, match=r"other tokens than its base's(.|\n)*<\|tool\|>"):
        load_tokenizer(str(tiny_qwen2), adapter=folder)


@pytest.mark.parametrize("saves_files", [True, False])
def test_several_templates_by_name_are_the_adapters_own(
    saves_files: bool, adapter: Path, tiny_qwen2: Path, tmp_path: Path
) -> None:
    """PEFT's folder with a tokenizer such as Command R's: its base's template was read in their place."""
    from transformers import AutoTokenizer

    from prefmill.families.causal.chat import encode
    from prefmill.families.causal.loading import load_tokenizer

    folder = shutil.copytree(adapter, tmp_path / "a")
    end = "<|im_end|>{% endfor %}"
    named = {
        "default": "{% for m in messages %}[{{ m.content }}]" + end,
        "tool_use": "{{ tools[0].name }}{% for m in messages %}({{ m.content }})" + end,
    }
    saved = AutoTokenizer.from_pretrained(tiny_qwen2)
    saved.chat_template = named
    saved.save_pretrained(folder, save_jinja_files=saves_files)
    theirs = AutoTokenizer.from_pretrained(folder)
    config = validate(DpoConfig, {"model_name_or_path": str(folder)})
    trained = load_tokenizer(config.model_name_or_path, template=config, adapter=config.lora_start)
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for read in (load_tokenizer(str(folder)), trained):
        assert read.chat_template == theirs.chat_template == named
        for tools in ([], [{"name": "t"}]):
            whole = theirs.apply_chat_template(chat, tools=tools or None, tokenize=False)
            prompt, answer = encode(read, chat[:1], "a", tools)
            assert read.decode(prompt + answer) == whole
    assert validate(DpoConfig, {"model_name_or_path": str(folder), "chat_template": "{{ 1 }}"}).chat_template


@pytest.mark.parametrize(
    ("keep", "renamed", "said", "named"),
    [
        ("layers.0", "", {}, "layers.1.self_attn.q_proj.lora_A.weight: not in the file"),
        ("", "other.", {}, "q_proj.lora_A.weight: not in the file"),
        ("", "", {"target_modules": ["q_proj"]}, "v_proj.lora_A.weight: no place for it"),
        ("", "", {"target_modules": ["q_proj", "k_proj", "v_proj"]}, "k_proj.lora_A.weight: not in the file"),
        ("", "", {"use_dora": True}, "lora_magnitude_vector: not in the file"),
    ],
)
def test_an_adapter_that_is_not_read_whole_is_refused(
    adapter: Path, tiny_qwen2: Path, tmp_path: Path, keep: str, renamed: str, said: dict[str, Any], named: str
) -> None:
    """PEFT warns of the one, says nothing of the other, and goes on with an adapter that does something else."""
    from safetensors.torch import load_file, save_file

    from prefmill.families.causal.loading import load_model
    from prefmill.training.adapter import put_on

    folder = Path(shutil.copytree(adapter, tmp_path / "a"))
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({renamed + k: v for k, v in weights.items() if keep in k}, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **said}))
    with pytest.raises(InputError, match=named):
        put_on(load_model(str(tiny_qwen2), precision="fp32"), folder)


def test_an_adapter_that_cannot_be_merged_or_says_too_little_is_refused_at_once(adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "a"))
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, named in (({"use_qalora": True}, "use_qalora"), ({"lora_alpha": None}, "does not say lora_alpha")):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ConfigError, match=named):
            validate(PreferenceConfig, {**SMALL, "model_name_or_path": "x", "lora": {"start": str(folder)}})
