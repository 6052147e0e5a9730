"""Adapters by kohya's and LyCORIS' keys, merged into a pipeline: LoRA, LoCon, LoHa, LoKr, whole differences, DoRA.

diffusers reads LoRA alone, and without an error drops DoRA's magnitudes and, where they differ, most modules' alphas.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prefmill.core.errors import InputError
from prefmill.families.sdxl.joined_layers import Layer, original_layers
from prefmill.families.sdxl.whole import unfitting

DORA_NORM = "prefmill_dora_norm"
DoraNorm = Literal["base", "merged"]
Factors = Mapping[str, Tensor]
_KEYS = ("lora_unet_", "lora_transformer_", "lora_te", "diffusion_model.", "lycoris_", "text_encoders.")
# Other starts of names, as kohya's: ComfyUI's, LyCORIS' and diffusers'.
_STARTS = {
    "diffusion_model.": "lora_unet_", "lycoris_": "lora_unet_", "text_encoders.clip_l.transformer.": "lora_te1_",
    "text_encoders.clip_g.transformer.": "lora_te2_", "text_encoders.t5xxl.transformer.": "lora_te3_",
    "unet.": "lora_unet_", "transformer.": "lora_transformer_", "text_encoder.": "lora_te1_",
    "text_encoder_2.": "lora_te2_", "text_encoder_3.": "lora_te3_",
}  # fmt: skip
# kohya counts T5 as the third, whichever it is here; a transformer's layers are `transformer` by diffusers' names.
_PARTS = {
    "unet": ("unet",), "transformer": ("transformer", "unet"), "text_encoder": ("te", "te1"),
    "text_encoder_2": ("te2", "te3"), "text_encoder_3": ("te3",),
}  # fmt: skip
_FACTORS = {
    "alpha", "dora_scale", "lora_down.weight", "lora_mid.weight", "lora_up.weight", "diff", "hada_w1_a", "hada_w1_b",
    "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a",
    "lokr_w2_b", "lokr_t2",
}  # fmt: skip
# By diffusers' names of modules it reads none of these, or passes them over without an error.
_UNREAD = tuple(f".{name}" for name in (*_FACTORS, "default.weight"))
_PEFTS = {
    **{f"{name}.weight": "lora_down.weight" for name in ("lora_A", "lora_A.default", "lora.down")},
    **{f"{name}.weight": "lora_up.weight" for name in ("lora_B", "lora_B.default", "lora.up")},
    "lora_linear_layer.down.weight": "lora_down.weight", "lora_linear_layer.up.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale", "lora_magnitude_vector.default.weight": "dora_scale",
}  # fmt: skip
_SETTINGS = "lora_adapter_metadata"
_TUCKER = "ijhw,ip,jr->prhw"  # a convolution's core between factors that mix channels
_OUTER = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_INSIDE = {
    "resnets.conv1": "0.in_layers.2", "resnets.conv2": "0.out_layers.3", "resnets.time_emb_proj": "0.emb_layers.1",
    "resnets.conv_shortcut": "0.skip_connection", "downsamplers.conv": "0.op", "upsamplers.conv": "2.conv",
}  # fmt: skip


def read_factors(file: Path) -> tuple[dict[str, dict[str, Tensor]], DoraNorm]:
    """The tensors of a file by such keys, by module and factor, and DoRA's rule; none of another file."""
    from safetensors import SafetensorError, safe_open

    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    try:
        with safe_open(file, "pt") as opened:
            keys, said = sorted(opened.keys()), opened.metadata() or {}
            # Where the head says alpha it is for diffusers to read.
            unread = () if _SETTINGS in said else [key for key in keys if key.endswith(_UNREAD)]
            if any(key.startswith(_KEYS) for key in keys) or any(key.startswith((*_STARTS,)) for key in unread):
                for key in keys:
                    module, factor = _module_and_factor(key)
                    modules[module][factor] = opened.get_tensor(key)
    except SafetensorError as error:
        fix = "download it again" if file.suffix == ".safetensors" else "give it as .safetensors: no pickle is opened"
        raise InputError("cannot load the adapter", where=file, got=str(error), fix=fix) from None
    if keys and keys[0].startswith("base_model.model."):
        raise InputError(
            "an adapter by PEFT's own keys", where=file, got=keys[0], expected="diffusers' or kohya's, which say alpha",
            fix="merge it once, in Python, PART being the pipeline's unet or transformer: peft.PeftModel."
            "from_pretrained(PART, 'FOLDER OF THE ADAPTER').merge_and_unload(), and save the pipeline",
        )  # fmt: skip
    return modules, "base" if said.get(DORA_NORM) == "base" else "merged"


def _module_and_factor(key: str) -> tuple[str, str]:
    """A key's module by kohya's name, and its factor; most other tools' names have the modules' own dots."""
    start = next((start for start in _STARTS if key.startswith(start)), "")
    name = key.removeprefix(start)
    if start.endswith("."):
        known = next((factor for factor in (*_FACTORS, *_PEFTS) if key.endswith(f".{factor}")), key.rpartition(".")[2])
        name = name.removesuffix(f".{known}").replace(".", "_") + f".{known}"
    module, _, factor = f"{_STARTS.get(start, '')}{name}".partition(".")
    return module, _PEFTS.get(factor, factor)


def merge(pipeline: Any, file: Path, factors: Mapping[str, Factors], norm: DoraNorm, scale: float) -> None:
    """Change the weights that the modules of `read_factors` name, in fp32; `scale` times the whole change is added.

    Raises InputError for a key that has no place or no meaning here.
    """
    for name, given in factors.items():
        if unknown := sorted(set(given) - _FACTORS):
            raise _of_another_kind(file, name, ", ".join(unknown))
    places = dict(_places(pipeline))
    lost = sorted(set(factors) - set(places))
    if lost:
        raise unfitting(file, f"{len(lost)} modules it lacks, as {lost[0]}", "modules of this pipeline")
    for name, given in factors.items():
        parts = [part.data for part in places[name]]
        weight = torch.cat(parts).float()
        try:
            new = adapted(weight, given, norm, scale)
            for part, changed in zip(parts, torch.split(new, [len(part) for part in parts]), strict=True):
                part.copy_(changed)
        except KeyError as error:
            raise _of_another_kind(file, name, str(error)) from None
        except RuntimeError as error:
            got = str(error).splitlines()[0]
            raise unfitting(f"{file}: {name}", got, f"factors of a weight of {[*weight.shape]}") from None


def _of_another_kind(file: Path, module: str, got: str) -> InputError:
    return InputError(
        "an adapter of another kind", where=f"{file}: {module}", got=got,
        expected="LoRA, LoCon, LoHa, LoKr, a whole difference or DoRA of this pipeline",
        fix="merge it into its base with the tool that made it, and give that pipeline",
    )  # fmt: skip


def adapted(weight: Tensor, given: Factors, norm: DoraNorm, scale: float) -> Tensor:
    """`weight` and `scale` times an adapter's change of it, as LyCORIS computes that; `base` is ComfyUI's DoRA."""
    kinds = {name.partition("_")[0] for name in given} - {"alpha", "dora"}
    if len(kinds) > 1:
        raise KeyError(*sorted(kinds))
    given = {name: value.float() for name, value in given.items()}
    change, rank = _change(given)
    strength = given["alpha"].item() / rank if rank and "alpha" in given else 1.0
    new = weight + strength * change.reshape(weight.shape)
    if "dora_scale" in given:
        magnitude = given["dora_scale"]
        magnitude = magnitude.reshape(*magnitude.shape, *[1] * (weight.dim() - magnitude.dim()))
        axes = [axis for axis, size in enumerate(magnitude.shape) if size == 1]
        measured = weight if norm == "base" else new
        new = new * magnitude / torch.linalg.vector_norm(measured, dim=axes, keepdim=True)
    return weight + scale * (new - weight)


def original_name(module: str, layers_per_block: int | Sequence[int]) -> str | None:
    """A layer's name in SDXL's original code, `input_blocks.4.1...`; None for a module that has none there."""
    block, *parts = module.split(".")
    if block not in ("down_blocks", "mid_block", "up_blocks"):
        return _OUTER.get(module)
    kind, number, *layer = parts if block == "mid_block" else parts[1:]
    inside = ".".join(["1", *layer]) if kind == "attentions" else _INSIDE.get(f"{kind}.{layer[0]}")
    if block == "mid_block":
        # Its three entries are one list: residual block, attention, residual block.
        entry = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
        return inside and f"{entry}.{inside.partition('.')[2]}"
    # Down, a block has its layers and a downsampler as entries; up, it has one layer more than down.
    layers = [layers_per_block] * 9 if isinstance(layers_per_block, int) else layers_per_block
    layers, at = layers if block == "down_blocks" else layers[::-1], int(parts[0])
    place = sum(layers[:at]) + at + (layers[at] if "sampler" in kind else int(number))
    # The first entry of the way down is the convolution in front of all blocks.
    return inside and (f"input_blocks.{place + 1}." if block == "down_blocks" else f"output_blocks.{place}.") + inside


def _change(given: Factors) -> tuple[Tensor, int | None]:
    """The change of a weight before its strength, and the rank that alpha is divided by."""
    if "diff" in given:
        return given["diff"], None
    if "hada_w1_a" in given:
        return _product(given, "hada_", "1") * _product(given, "hada_", "2"), len(given["hada_w1_b"])
    if "lora_up.weight" in given:
        up, down = (given[f"lora_{side}.weight"].flatten(1) for side in ("up", "down"))
        mid = given.get("lora_mid.weight")
        return up @ down if mid is None else torch.einsum(_TUCKER, mid, up.T, down), len(down)
    # In one piece: torch.kron views what einsum may leave in strides.
    small, large = (_product(given, "lokr_", side).contiguous() for side in "12")
    small = small.reshape(*small.shape, *[1] * (large.dim() - small.dim()))
    ranks = [len(given[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in given]
    return torch.kron(small, large), ranks[0] if ranks else None


def _product(given: Factors, kind: str, side: str) -> Tensor:
    """One of LoHa's or LoKr's two matrices: whole, of two factors, or of two and a core."""
    if f"{kind}w{side}" in given:
        return given[f"{kind}w{side}"]
    a, b, core = given[f"{kind}w{side}_a"], given[f"{kind}w{side}_b"], given.get(f"{kind}t{side}")
    return a @ b if core is None else torch.einsum(_TUCKER, core, a, b)


def _places(pipeline: Any) -> Iterator[Layer]:
    """The weights of a pipeline's layers by each name that a file may give those."""
    for part, prefixes in _PARTS.items():
        model: Any = getattr(pipeline, part, None)
        for name, weights in [] if model is None else _layers(part, model):
            yield from ((f"lora_{prefix}_{name.replace('.', '_')}", weights) for prefix in prefixes)


def _layers(part: str, model: Any) -> Iterator[Layer]:
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    for name, module in modules.items():
        yield name, (module.weight,)
        if part.startswith("text"):  # transformers 5 has no `text_model.` before the first encoder's names, files do
            yield f"text_model.{name}", (module.weight,)
    if part == "unet":
        yield from ((known, (modules[name].weight,)) for known, name in original_unet_names(model))
    if part == "transformer":
        yield from original_layers(model)


def original_unet_names(unet: Any) -> Iterator[tuple[str, str]]:
    """Names of a UNet's original code, and its layers' own."""
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            known = original_name(name, unet.config.layers_per_block)
            # Behind the residual block alone where a block has no attention, as SD 1.5's first on the way up.
            others = (known, known.replace(".2.conv", ".1.conv") if "upsampler" in name else known) if known else ()
            yield from ((other, name) for other in dict.fromkeys(others))
