"""What the stage generate_images does with a shard of the prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from prefmill.core.files import write_json, write_record
from prefmill.core.image_rows import ImagePrompt
from prefmill.core.stage import Metrics, Task
from prefmill.images.generation import cut_prompts, drawn_guidance, make_images, plan_jobs
from prefmill.images.sampling import ImageSampling
from prefmill.store.jsonl import write_jsonl


def generate_images(
    task: Task, prompts: Iterable[ImagePrompt], sampling: ImageSampling, label: str, open_model: Callable[[], Any],
    batch_size: int | None,
) -> Metrics:  # fmt: skip
    """Make the images of this shard's prompts and write the payload; the metrics are the summary's counts."""
    prompts = [row for row in prompts if task.shard.holds(row["prompt_id"])]
    jobs = plan_jobs(prompts, sampling.seeds)
    # In a file: a resumed task whose images are all there opens no model, and still has to report them.
    cut_file = task.work / "cut_prompts.json"

    def opened() -> Any:
        model = open_model()
        cut = cut_prompts(model, {row["prompt"] for row in prompts})
        write_record(cut_file, [row["prompt_id"] for row in prompts if row["prompt"] in cut])
        return model

    rows = make_images(opened, jobs, sampling, label, task.output, task.work, batch_size, task.advance)
    write_jsonl(task.output / "images.jsonl", rows)
    write_jsonl(task.output / "prompts.jsonl", prompts)
    summary = {
        "num_prompts": len(prompts),
        "num_images": len(rows),
        "seeds": sorted(sampling.seeds),
        "model": label,
        "guidance_scale": drawn_guidance(task.output / rows[0]["file"]) if rows else None,
        "cut_prompts": json.loads(cut_file.read_text()) if cut_file.is_file() else [],
    }
    write_json(task.output / "summary.json", summary)
    return {"num_prompts": len(prompts), "num_images": len(rows), "num_cut_prompts": len(summary["cut_prompts"])}
