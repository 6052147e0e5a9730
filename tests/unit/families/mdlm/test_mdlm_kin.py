"""LLaDA-MoE, LLaDA2, BERT, ModernBERT and EuroBERT: read, run, scored and written back as they are on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMaskedLM

from prefmill.core.config import validate
from prefmill.core.errors import InputError
from prefmill.families.mdlm.family import Drawing
from prefmill.families.mdlm.load_check import check_diffusion_model
from prefmill.families.mdlm.loading import load_diffusion_model
from prefmill.families.mdlm.scorer import encode_samples, patch_forward, score_batch
from prefmill.training.adapter import add_adapter, put_on
from stages.mdlm_sft import MdlmSftConfig
from tests.unit.families.mdlm.plain_models import PLAIN

SIZE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_act": "silu",
    "max_position_embeddings": 128, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
# As published in config.json, at a tiny size.
LLADA_MOE: dict[str, Any] = {
    **SIZE, "architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "num_key_value_heads": 4,
    "attention_bias": False, "clip_qkv": None, "dense_intermediate_size": 48, "expert_intermediate_size": 24,
    "moe_layer_freq": [1, 1, 1],
    "moe_router_enable_expert_bias": False, "moe_router_score_function": "softmax", "norm_topk_prob": None,
    "num_experts": 8, "num_experts_per_tok": 2, "partial_rotary_factor": 1, "qk_layernorm": True, "rms_norm_eps": 1e-5,
    "rope_scaling": None, "rope_theta": 50000, "routed_scaling_factor": 1, "router_num_group": None,
    "shared_expert_intermediate_size": None, "tie_word_embeddings": False, "mask_token_id": 5,
}  # fmt: skip
LLADA2: dict[str, Any] = {
    **SIZE, "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "num_key_value_heads": 2, "head_dim": 16,
    "first_k_dense_replace": 1, "intermediate_size": 48, "moe_intermediate_size": 24, "n_group": 4, "topk_group": 2,
    "norm_head": False, "norm_topk_prob": True, "num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-6, "rope_theta": 600000, "routed_scaling_factor": 2.5,
    "rope_scaling": None, "score_function": "sigmoid", "tie_word_embeddings": False, "use_bias": False,
    "use_qk_norm": True, "use_qkv_bias": False, "moe_router_enable_expert_bias": True,
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {**SIZE, "intermediate_size": 48, "hidden_act": "gelu"},
    "modernbert": {**SIZE, "intermediate_size": 48, "local_attention": 8, "global_attn_every_n_layers": 3},
    "eurobert": {**SIZE, "intermediate_size": 48, "num_key_value_heads": 2},
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published weight files."""
    h, is_2 = config["hidden_size"], config["model_type"] == "llada2_moe"
    d = config.get("head_dim") or h // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    expert = config["moe_intermediate_size" if is_2 else "expert_intermediate_size"]
    found: dict[str, tuple[int, ...]] = {"model.norm.weight": (h,), "lm_head.weight": (64, h)}
    found["model.word_embeddings.weight" if is_2 else "model.embed_tokens.weight"] = (64, h)

    def gated(name: str, width: int) -> None:
        found.update({f"{name}.{part}_proj.weight": (width, h) for part in ("gate", "up")})
        found[f"{name}.down_proj.weight"] = (h, width)

    for n in range(config["num_hidden_layers"]):
        name = f"model.layers.{n}"
        found |= {f"{name}.{part}.weight": (h,) for part in ("input_layernorm", "post_attention_layernorm")}
        if is_2:
            found |= {f"{name}.attention.{part}_layernorm.weight": (d,) for part in ("query", "key")}
            found |= {f"{name}.attention.query_key_value.weight": (q + 2 * kv, h)}
            found |= {f"{name}.attention.dense.weight": (h, q)}
        else:
            found |= {f"{name}.self_attn.{part}_norm.weight": (d,) for part in "qk"}
            found |= {
                f"{name}.self_attn.{part}_proj.weight": (size, h) for part, size in zip("qkv", (q, kv, kv), strict=True)
            }
            found |= {f"{name}.self_attn.o_proj.weight": (h, q)}
        if n < config.get("first_k_dense_replace", 0):
            gated(f"{name}.mlp", config["intermediate_size"])
            continue
        found |= {f"{name}.mlp.gate.weight": (8, h)} | ({f"{name}.mlp.gate.expert_bias": (8,)} if is_2 else {})
        for number in range(8):
            gated(f"{name}.mlp.experts.{number}", expert)
        if is_2:
            gated(f"{name}.mlp.shared_experts", expert)
    return found


@pytest.fixture(scope="module", params=["llada_moe", "llada2_moe", *ENCODERS])
def kin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A tiny random model in its form on disk."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    if name in ENCODERS:
        model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(name, **ENCODERS[name]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        return name, folder
    config = LLADA2 if name == "llada2_moe" else LLADA_MOE
    weights = {key: torch.randn(shape) * 0.3 for key, shape in shapes(config).items()}
    weights |= {key: 1 + value for key, value in weights.items() if "norm" in key}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return name, folder


def in_float64(folder: Path) -> Any:
    model = load_diffusion_model(str(folder), precision="fp32").double()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the kernel for all experts at once has no float64
    return model


IDS = [(7 * place * place + 3 * place) % 59 + 1 for place in range(24)]


def test_logits_are_those_of_a_plain_implementation(kin: tuple[str, Path]) -> None:
    name, folder = kin
    model = in_float64(folder)
    weights = {key: value.double() for key, value in load_file(folder / "model.safetensors").items()}
    config = {**model.config.to_dict(), **json.loads((folder / "config.json").read_text())}
    ids = torch.tensor(IDS)
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        expected = PLAIN[name](weights, config, ids)
    assert (logits - expected).abs().max() < 1e-9
    assert expected.std() > 0.1


def test_names_weights_and_keys_come_back_byte_by_byte(kin: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = kin
    load_diffusion_model(str(folder), precision="fp32").save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    keys, saved = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path))
    differing = {key for key in keys.keys() | saved.keys() if keys.get(key) != saved.get(key)}
    assert differing <= {"dtype", "transformers_version"}


def test_they_are_scored_as_a_single_pass_says(kin: tuple[str, Path]) -> None:
    _, folder = kin
    model = in_float64(folder)
    rows = [(IDS[:4], IDS[4:11]), (IDS[2:6], IDS[6:11])]
    batch = encode_samples(rows, [Drawing(4, "balanced", 0).of(*row, 0) for row in rows])
    expected = []
    with torch.no_grad():
        for row, end in enumerate(batch.ends):
            masked, clean = batch.masked[row, :, :end], batch.input_ids[row, :end]
            logps = model(input_ids=torch.where(masked, 5, clean)).logits.log_softmax(-1)
            found = logps.gather(-1, clean.expand_as(masked)[..., None])[..., 0]
            expected.append((batch.weights[row, :, :end] * found * masked).sum(1))
        values = score_batch(patch_forward(model, mask_token_id=5), batch)
    assert (values - torch.stack(expected)).abs().max() < 1e-6


def test_they_are_scored_block_by_block_as_their_own_logits_say(kin: tuple[str, Path]) -> None:
    name, folder = kin
    model = patch_forward(in_float64(folder), mask_token_id=5, block_length=4)
    check_diffusion_model(model, name, 5, False, torch.float64, 4)


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [(LLADA_MOE, "shared_expert_intermediate_size", 24), (LLADA2, "score_function", "softmax")],
)
def test_another_build_is_refused_by_its_key(config: dict[str, Any], key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(InputError, match=f"{key}: {value}"):
        load_diffusion_model(str(tmp_path), precision="fp32")


def test_an_adapter_is_put_on_whole_and_merged(kin: tuple[str, Path], tmp_path: Path) -> None:
    """PEFT renames the weights of models that transformers renames, and lost LLaDA's: it went on without them."""
    check_adapter(kin[1], tmp_path)


def check_adapter(base: Path, folder: Path) -> None:
    """An adapter of PEFT's own making says the same read again, and merged as a model; raises where not."""
    import peft

    model = load_diffusion_model(str(base), precision="fp32")
    config = validate(MdlmSftConfig, {"lora": {"r": 3, "alpha": 5}})
    made = add_adapter(model, config).eval()
    if hasattr(model, "prepare_inputs_for_generation"):
        assert made.peft_config["default"].task_type == peft.TaskType.CAUSAL_LM
    for name, value in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    made.save_pretrained(folder)
    said = json.loads((folder / "adapter_config.json").read_text())  # add_adapter has taken the place of the base out
    (folder / "adapter_config.json").write_text(json.dumps({**said, "base_model_name_or_path": str(base)}))
    ids = torch.arange(6, 30)[None]
    with torch.no_grad():
        expected = made(input_ids=ids).logits
        again = put_on(load_diffusion_model(str(base), precision="fp32"), folder).eval()
        assert torch.equal(again(input_ids=ids).logits, expected)
        merged = load_diffusion_model(str(folder), precision="fp32").eval()
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-3, rtol=1e-4)
    half = load_diffusion_model(str(folder), precision="bf16").state_dict()
    assert all(torch.equal(half[name], value.to(half[name].dtype)) for name, value in merged.state_dict().items())
    assert {value.dtype for value in half.values()} >= {torch.bfloat16}
    with pytest.raises(InputError, match="leave quantization out"):
        load_diffusion_model(str(folder), precision="bf16", quantization="4bit")
