"""The variance of a masked-diffusion score difference: balanced draws against iid (VRPO) and 1/t sampling.

    python -m benchmarks.mdlm_variance

Policy and reference share their draws, on joint distributions known by brute force and on a small model before and
after preference training. The variances of `systematic` (counts alone), VRPO and 1/t are exact, enumerated over every
mask and offset; that of `balanced`, the default, is sampled (4,000 times). Ratios are at the same number of forwards.
Targets at 8: 1.2 against VRPO, 3 against 1/t. The last line is for machines: the smallest ratio against VRPO at 8.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefmill.core.config import read_yaml, validate
from prefmill.core.stage import Task, load_stage
from prefmill.families.mdlm.estimator import draw
from prefmill.families.mdlm.exact import Floats, allocation_variances, estimate, exact_variances, near, random_joint

_CONFIGS = Path(__file__).parents[1] / "configs"
_SAMPLES = 4000


def main() -> int:
    """Measure both and print; returns 0."""
    ratios = [
        _show("exact joint, V = 3, L = 10, strong ties", _joint_differences(tilt=1.0)),
        _show("exact joint, V = 3, L = 10, weak ties", _joint_differences(tilt=0.5)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        ratios.append(_show("model before and after preference training, L = 7", _trained_differences(Path(folder))))
    print(f"ratio: {min(ratios):.2f}")
    return 0


def _show(title: str, differences: Sequence[tuple[Floats, Floats]]) -> float:
    """Print the variances, averaged over the sequences; returns the ratio against VRPO at 8 draws."""
    print(f"\n{title}: mean variance over {len(differences)} responses, nats squared")
    names = ("draws", "balanced", "systematic", "VRPO (iid)", "1/t", "VRPO ratio", "1/t ratio")
    print("".join(f"{name:>13}" for name in names))
    ratio = 0.0
    for num_draws in (2, 4, 8, 16):
        rows = [exact_variances(policy - reference, num_draws) for policy, reference in differences]
        mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        balanced = float(np.mean([_sampled(policy - reference, num_draws) for policy, reference in differences]))
        against = mean["iid"] / balanced, mean["inverse_t"] / balanced
        values = [balanced, mean["systematic"], mean["iid"], mean["inverse_t"]]
        cells = [*(f"{value:.6f}" for value in values), *(f"{value:.2f}" for value in against)]
        print("".join(f"{cell:>13}" for cell in (num_draws, *cells)))
        ratio = against[0] if num_draws == 8 else ratio
    table = [allocation_variances(policy, reference) for policy, reference in differences]
    cells = ", ".join(f"{name} {np.mean([row[name] for row in table]):.4f}" for name in table[0])
    print(f"mask counts / maskings a count (VRPO's table 2: 1.0, 2.2, 4.7, 7.3, 44.0, 2183.7): {cells}")
    return ratio


def _sampled(sums: Floats, num_draws: int) -> float:
    length, generator = len(sums).bit_length() - 1, np.random.default_rng(0)
    return float(np.var([estimate(draw(length, num_draws, "balanced", generator), sums) for _ in range(_SAMPLES)]))


def _joint_differences(tilt: float) -> list[tuple[Floats, Floats]]:
    found = []
    for seed in range(4):
        reference = random_joint(3, 10, seed, tilt)
        policy = near(reference, seed + 100, 0.1)
        place = np.random.default_rng(seed).choice(policy.table.size, p=policy.table.ravel())
        sequence = tuple(int(token) for token in np.unravel_index(place, policy.table.shape))
        found.append((policy.masked_sums(sequence), reference.masked_sums(sequence)))
    return found


def _trained_differences(folder: Path) -> list[tuple[Floats, Floats]]:
    """Every masked sum of held-out answers under the demo's tuned model and its reference."""
    from prefmill.families.causal.chat import encode
    from prefmill.families.mdlm.likelihood import all_masked_sums
    from prefmill.families.mdlm.loading import load_diffusion_model, load_diffusion_tokenizer, mask_token_of
    from prefmill.training.data import read_pairs

    toy = _run("toy_preferences", folder)
    sft = _run("mdlm_sft", folder, datasets=toy)
    dpo = _run("mdlm_dpo", folder, policy=sft, datasets=toy)
    tokenizer = load_diffusion_tokenizer(str(sft.path))
    reference, policy = (load_diffusion_model(str(item.path), precision="fp32") for item in (sft, dpo))
    mask = mask_token_of(reference, tokenizer)
    found = []
    for pair in list(read_pairs(toy.file("dpo_clean_val/data.jsonl")))[:10]:
        for answer in (pair.chosen, pair.rejected):
            row = encode(tokenizer, pair.messages, answer)
            found.append((all_masked_sums(policy, *row, mask), all_masked_sums(reference, *row, mask)))
    return found


def _run(name: str, folder: Path, **inputs: Any) -> Any:
    """A stage of the demo, by hand."""
    from prefmill.core.artifact import Provenance
    from prefmill.store.artifacts import publish

    stage = load_stage(name)
    output = folder / name
    output.mkdir()
    task = Task(
        "b", name, "all", {}, {}, {key: (item,) for key, item in inputs.items()}, output, folder / "logs" / name
    )
    stage.run(validate(stage.config, read_yaml(_CONFIGS / name / "demo.yaml")), task)
    return publish(output, stage.writes, Provenance("b", "all", name, {}, {}, "0", {}), {})


if __name__ == "__main__":
    sys.exit(main())
