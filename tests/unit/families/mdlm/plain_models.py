"""The forwards of masked-diffusion models written down plainly from their papers: one row, no batches, no caches.

Weights go by their published names. Norms, rotary angles and routers are in fp32, as published.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

Weights = Mapping[str, Tensor]
Config = Mapping[str, Any]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: Tensor, theta: float, share: float = 1.0) -> Tensor:
    """[heads, T, d] by its places; only the first `share` of d turns."""
    dim = int(x.shape[-1] * share)
    inverse = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * inverse
    cos, sin = (torch.cat([f(angles)] * 2, -1).to(x.dtype) for f in (torch.cos, torch.sin))
    turned, kept = x[..., :dim], x[..., dim:]
    half = torch.cat([-turned[..., dim // 2 :], turned[..., : dim // 2]], -1)
    return torch.cat([turned * cos + half * sin, kept], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """[heads, T, d] each, fewer heads of keys than of queries; [T, heads x d]."""
    k, v = (each.repeat_interleave(len(q) // len(each), 0) for each in (k, v))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    scores = scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def heads(x: Tensor, number: int) -> Tensor:
    return x.view(len(x), number, -1).transpose(0, 1)


def gated(x: Tensor, w: Weights, name: str) -> Tensor:
    up, gate = x @ w[f"{name}.up_proj.weight"].T, x @ w[f"{name}.gate_proj.weight"].T
    return (silu(gate) * up) @ w[f"{name}.down_proj.weight"].T


def mixed(x: Tensor, w: Weights, name: str, weights: Tensor, chosen: Tensor) -> Tensor:
    """The sum over each token's chosen experts [T, k] by their weights [T, k]."""
    rows = []
    for token, (ws, es) in enumerate(zip(weights, chosen, strict=True)):
        parts = [p * gated(x[token], w, f"{name}.experts.{e}") for p, e in zip(ws, es.tolist(), strict=True)]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def llada_moe(w: Weights, c: Config, ids: Tensor) -> Tensor:
    x, eps = w["model.embed_tokens.weight"][ids], c["rms_norm_eps"]
    for n in range(c["num_hidden_layers"]):
        name = f"model.layers.{n}"
        h = rms(x, w[f"{name}.input_layernorm.weight"], eps)
        number = {"q": c["num_attention_heads"], "k": c["num_key_value_heads"], "v": c["num_key_value_heads"]}
        q, k, v = (heads(h @ w[f"{name}.self_attn.{p}_proj.weight"].T, number[p]) for p in "qkv")
        q, k = (
            rotate(rms(each, w[f"{name}.self_attn.{p}_norm.weight"], eps), c["rope_theta"])
            for each, p in ((q, "q"), (k, "k"))
        )
        x = x + attend(q, k, v) @ w[f"{name}.self_attn.o_proj.weight"].T
        h = rms(x, w[f"{name}.post_attention_layernorm.weight"], eps)
        probabilities = (h @ w[f"{name}.mlp.gate.weight"].T).float().softmax(-1)
        weights, chosen = probabilities.topk(c["num_experts_per_tok"], -1)
        x = x + mixed(h, w, f"{name}.mlp", weights.to(h.dtype), chosen)
    return rms(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def llada2(w: Weights, c: Config, ids: Tensor) -> Tensor:
    x, eps, d = w["model.word_embeddings.weight"][ids], c["rms_norm_eps"], c["head_dim"]
    n_q, n_kv = c["num_attention_heads"], c["num_key_value_heads"]
    for n in range(c["num_hidden_layers"]):
        name = f"model.layers.{n}"
        h = rms(x, w[f"{name}.input_layernorm.weight"], eps)
        fused = h @ w[f"{name}.attention.query_key_value.weight"].T
        q, k, v = (heads(part, part.shape[1] // d) for part in fused.split([n_q * d, n_kv * d, n_kv * d], 1))
        q = rms(q, w[f"{name}.attention.query_layernorm.weight"], eps)
        k = rms(k, w[f"{name}.attention.key_layernorm.weight"], eps)
        q, k = (rotate(each, c["rope_theta"], c["partial_rotary_factor"]) for each in (q, k))
        x = x + attend(q, k, v) @ w[f"{name}.attention.dense.weight"].T
        h = rms(x, w[f"{name}.post_attention_layernorm.weight"], eps)
        if n < c["first_k_dense_replace"]:
            x = x + gated(h, w, f"{name}.mlp")
            continue
        scores = (h.float() @ w[f"{name}.mlp.gate.weight"].float().T).sigmoid()
        biased = scores + w[f"{name}.mlp.gate.expert_bias"]
        grouped = biased.view(len(h), c["n_group"], -1)
        best = grouped.topk(2, -1).values.sum(-1).topk(c["topk_group"], -1).indices
        open_groups = torch.zeros(len(h), c["n_group"], dtype=torch.bool).scatter(1, best, True)
        chosen = (
            grouped.masked_fill(~open_groups[..., None], -torch.inf).flatten(1).topk(c["num_experts_per_tok"]).indices
        )
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * c["routed_scaling_factor"]
        x = x + mixed(h, w, f"{name}.mlp", weights, chosen) + gated(h, w, f"{name}.mlp.shared_experts")
    return rms(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def eurobert(w: Weights, c: Config, ids: Tensor) -> Tensor:
    x, eps = w["model.embed_tokens.weight"][ids], c["rms_norm_eps"]
    for n in range(c["num_hidden_layers"]):
        name = f"model.layers.{n}"
        h = rms(x, w[f"{name}.input_layernorm.weight"], eps)
        number = {"q": c["num_attention_heads"], "k": c["num_key_value_heads"], "v": c["num_key_value_heads"]}
        q, k, v = (heads(h @ w[f"{name}.self_attn.{p}_proj.weight"].T, number[p]) for p in "qkv")
        q, k = (rotate(each, c["rope_parameters"]["rope_theta"]) for each in (q, k))
        x = x + attend(q, k, v) @ w[f"{name}.self_attn.o_proj.weight"].T
        x = x + gated(rms(x, w[f"{name}.post_attention_layernorm.weight"], eps), w, f"{name}.mlp")
    return rms(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def bert(w: Weights, c: Config, ids: Tensor) -> Tensor:
    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], c["layer_norm_eps"])

    e = "bert.embeddings"
    x = w[f"{e}.word_embeddings.weight"][ids] + w[f"{e}.position_embeddings.weight"][: len(ids)]
    x = norm(x + w[f"{e}.token_type_embeddings.weight"][0], f"{e}.LayerNorm")
    for n in range(c["num_hidden_layers"]):
        name = f"bert.encoder.layer.{n}"
        parts = (linear(x, f"{name}.attention.self.{part}") for part in ("query", "key", "value"))
        seen = attend(*(heads(part, c["num_attention_heads"]) for part in parts))
        x = norm(x + linear(seen, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm")
        wide = gelu(linear(x, f"{name}.intermediate.dense"))
        x = norm(x + linear(wide, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    t = "cls.predictions.transform"
    x = norm(gelu(linear(x, f"{t}.dense")), f"{t}.LayerNorm")
    return x @ w[f"{e}.word_embeddings.weight"].T + w["cls.predictions.bias"]


def modernbert(w: Weights, c: Config, ids: Tensor) -> Tensor:
    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], None, c["norm_eps"])

    places = torch.arange(len(ids))
    near = (places[:, None] - places).abs() <= c["local_attention"] // 2
    x = norm(w["model.embeddings.tok_embeddings.weight"][ids], "model.embeddings.norm")
    for n in range(c["num_hidden_layers"]):
        name, is_global = f"model.layers.{n}", n % c["global_attn_every_n_layers"] == 0
        h = x if n == 0 else norm(x, f"{name}.attn_norm")
        q, k, v = (heads(p, c["num_attention_heads"]) for p in (h @ w[f"{name}.attn.Wqkv.weight"].T).chunk(3, 1))
        theta = c["rope_parameters"]["full_attention" if is_global else "sliding_attention"]["rope_theta"]
        q, k = (rotate(each.float().to(x.dtype), theta) for each in (q, k))  # as published, unlike the others
        seen = attend(q, k, v, None if is_global else near)
        x = x + seen @ w[f"{name}.attn.Wo.weight"].T
        wide, gate = (norm(x, f"{name}.mlp_norm") @ w[f"{name}.mlp.Wi.weight"].T).chunk(2, 1)
        x = x + (gelu(wide) * gate) @ w[f"{name}.mlp.Wo.weight"].T
    x = norm(gelu(norm(x, "model.final_norm") @ w["head.dense.weight"].T), "head.norm")
    return x @ w["model.embeddings.tok_embeddings.weight"].T + w["decoder.bias"]


PLAIN: dict[str, Callable[[Weights, Config, Tensor], Tensor]] = {
    "llada_moe": llada_moe, "llada2_moe": llada2, "bert": bert, "modernbert": modernbert, "eurobert": eurobert,
}  # fmt: skip
