"""What training a masked-diffusion model takes on one card: `python -m prefmill.families.mdlm.memory`."""

from __future__ import annotations

from dataclasses import dataclass

_GB = 1e9
_NF4_BYTES = 0.5 + 0.127 / 8  # 4 bits, and the block scales that are quantized too (QLoRA: 0.127 bits)
_ADAM_BYTES = 16  # fp32 weight, gradient and two moments
_LOGITS_AT_ONCE = 256  # as the scorer projects them


@dataclass(frozen=True)
class DiffusionShape:
    """The size of a transformer with gated feed-forward layers; embeddings are untied."""

    name: str
    hidden: int
    layers: int
    feed_forward: int
    key_value: int
    vocabulary: int

    @property
    def linear_parameters(self) -> int:
        """Weights of all layers' projections."""
        attention = 2 * self.hidden * (self.hidden + self.key_value)
        return self.layers * (attention + 3 * self.hidden * self.feed_forward)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the input and output embeddings."""
        return 2 * self.vocabulary * self.hidden

    def adapter_parameters(self, rank: int) -> int:
        """Weights of a rank-r adapter on every projection of the layers."""
        ends = 2 * (2 * self.hidden) + 2 * (self.hidden + self.key_value) + 3 * (self.hidden + self.feed_forward)
        return self.layers * rank * ends


LLADA_8B = DiffusionShape("LLaDA-8B", 4096, 32, 12_288, 4096, 126_464)
THREE_B = DiffusionShape("3B (Qwen2.5-3B's shape, untied)", 2048, 36, 11_008, 256, 151_936)


def estimate_memory(
    shape: DiffusionShape,
    *,
    tokens: int,
    rank: int = 16,
    forward_batch_size: int = 1,
    four_bit: bool = True,
    checkpoint_layers: bool = True,
) -> dict[str, float]:
    """GB of each part for rows of `tokens` tokens, and their `total`, whatever the number of draws.

    Embeddings stay in bf16, as bitsandbytes leaves them. A layer's activations are counted in bf16 with the adapter's
    fp32 inputs; with checkpoints one layer's are alive, and every layer's input. 1 GB is left to the CUDA context and
    fragmentation.
    """
    weights = shape.linear_parameters * (_NF4_BYTES if four_bit else 2) + shape.embedding_parameters * 2
    largest = shape.hidden * shape.feed_forward * 2 if four_bit else 0  # one projection at a time, in bf16
    layer = (10 * shape.hidden + 5 * shape.feed_forward) * 2 + (6 * shape.hidden + shape.feed_forward) * 4
    places = tokens * forward_batch_size
    kept = shape.layers * shape.hidden * 2 + layer if checkpoint_layers else shape.layers * layer
    parts = {
        "weights": weights + largest,
        "adapter": float(shape.adapter_parameters(rank) * _ADAM_BYTES),
        "activations": float(places * kept),
        "logits": float(3 * _LOGITS_AT_ONCE * shape.vocabulary * 4),
        "context": _GB,
    }
    found = {name: value / _GB for name, value in parts.items()}
    return {**found, "total": sum(found.values())}


def main() -> None:
    """Print the estimates as a Markdown table."""
    print("| model | base | tokens | weights | adapter | activations | logits | context | total GB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in (LLADA_8B, THREE_B):
        for four_bit, tokens in ((True, 1024), (True, 4096), (False, 1024)):
            parts = estimate_memory(shape, tokens=tokens, four_bit=four_bit)
            cells = " | ".join(f"{value:.2f}" for value in parts.values())
            print(f"| {shape.name} | {'4-bit' if four_bit else 'bf16'} | {tokens} | {cells} |")


if __name__ == "__main__":
    main()
