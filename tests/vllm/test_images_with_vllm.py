"""Images through vLLM: tiny Qwen2.5-VL and Qwen3-VL say what transformers says, of the pixels that training sees.

Its name puts it before the engine's tests, as that of test_generation_with_vllm.py does.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.records import Modality
from prefmill.core.stage import load_stage
from prefmill.demo.text import Shape, create_qwen2_5_vl, generation_defaults, save, special_ids
from prefmill.demo.tokenizer import VISION_TOKENS, train_chat_tokenizer
from prefmill.distributed.isolation import in_own_process
from prefmill.evaluation.generators import GenerationEngine, TransformersGeneration, VllmGeneration
from prefmill.evaluation.held_out import read_held_out
from prefmill.evaluation.model_reviews import ModelSource, Writing, write_reviews
from prefmill.families.causal.generation import GenerationRequest, Sampling, encode_prompts
from prefmill.families.causal.image_limits import ImageLimits
from prefmill.families.causal.loading import load_model, load_tokenizer
from prefmill.families.causal.vision import ImageReader, with_images
from prefmill.families.causal.vision_families import open_reader
from prefmill.families.causal.vllm_loading import image_options, open_vllm
from prefmill.reviews.generated import generate
from tests.conftest import left_out
from tests.e2e.evaluation_artifacts import make_task, publish_as

pytestmark = pytest.mark.slow

Family = Literal["qwen2_5_vl", "qwen3_vl"]
SHAPE = Shape(hidden_size=128, max_position_embeddings=4096)  # heads of 32, the smallest that vLLM serves
TOLERANCE = 5e-5  # of a token's log-probability in float32; 3e-6 was measured
NUM_TOKENS = 12


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    if importlib.util.find_spec("vllm") is None:
        left_out("vllm", "vllm (make vllm)")


def create_qwen3_vl(tokenizer: Any) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    start, end, image, video = tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = {**SHAPE.model_dump(), **special_ids(tokenizer), "head_dim": 32, "vocab_size": len(tokenizer),
            "rope_parameters": rotary, "tie_word_embeddings": True}  # fmt: skip
    vision = {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 128,
              "patch_size": 16, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, vision_start_token_id=start, vision_end_token_id=end,
        image_token_id=image, video_token_id=video, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = generation_defaults(tokenizer)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    """Weights large enough that every picture is spoken of in its own words."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    texts = [row["review_text"] for row in generate(7, 40)]
    tokenizer = train_chat_tokenizer(texts, vocab_size=600, extra_special_tokens=VISION_TOKENS)
    folders: dict[Family, Path] = {}
    for family, model, patch in (
        ("qwen2_5_vl", create_qwen2_5_vl(tokenizer, SHAPE, 0), 14), ("qwen3_vl", create_qwen3_vl(tokenizer), 16),
    ):  # fmt: skip
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.15, generator=random)
        folders[family] = tmp_path_factory.mktemp(family)  # type: ignore[index]
        save(model, tokenizer, folders[family])  # type: ignore[index]
        size = {"shortest_edge": (2 * patch) ** 2, "longest_edge": 16 * (2 * patch) ** 2}
        Qwen2VLImageProcessorPil(patch_size=patch, size=size).save_pretrained(folders[family])  # type: ignore[index]
    return folders


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray[Any, Any]]:
    """Files, and the pixels [H, W, 3] that a person sees in them: plain, turned by EXIF, half transparent."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    seen = {name: random.integers(0, 256, (60, 150, 3), dtype=np.uint8) for name in ("plain", "turned", "clear")}
    Image.fromarray(seen["plain"]).save(folder / "plain.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned to the right by a quarter
    Image.fromarray(np.rot90(seen["turned"])).save(folder / "turned.png", exif=exif)
    hidden = np.full((60, 150), 255, dtype=np.uint8)
    hidden[:, 75:] = 0
    Image.fromarray(np.dstack([seen["clear"], hidden])).save(folder / "clear.png")
    seen["clear"][:, 75:] = 255
    return {str(folder / f"{name}.png"): pixels for name, pixels in seen.items()}


def reader_of(model: Path, limits: ImageLimits) -> ImageReader:
    reader = open_reader(str(model), load_tokenizer(str(model)), limits)
    assert reader is not None
    return reader


def request_with(reader: ImageReader, paths: list[str]) -> GenerationRequest:
    content = "Compare " + " with ".join("<image>" for _ in paths) + " and write a review."
    chat = with_images([{"role": "user", "content": content}], paths)
    return encode_prompts(reader.tokenizer, {"/".join(paths): chat}, 1, reader)[0]


def ask_vllm(model: Path, limits: ImageLimits, prompts: list[list[str]], folder: Path) -> None:
    """For each prompt the greedy tokens and their log-probabilities, left in `folder`."""
    reader = reader_of(model, limits)
    requests = [request_with(reader, paths) for paths in prompts]
    llm = open_vllm(
        str(model), precision="fp32", revision=None, trust_remote_code=False, tensor_parallel_size=1,
        kv_cache_gb=0.125, enforce_eager=True, max_model_len=512, max_num_seqs=4, **image_options(reader, requests),
    )  # fmt: skip
    from vllm import SamplingParams

    from prefmill.families.causal.vllm_generation import _prompt

    parameters = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, logprobs=1)
    found = {}
    for number, request in enumerate(requests):
        llm.llm_engine.add_request(str(number), _prompt(request, reader), parameters)
    while len(found) < len(requests):
        for output in llm.llm_engine.step():
            if output.finished:
                answer = output.outputs[0]
                logps = [of[token].logprob for of, token in zip(answer.logprobs, answer.token_ids, strict=True)]
                found[int(output.request_id)] = [list(answer.token_ids), logps]
    (folder / "found.json").write_text(json.dumps([found[number] for number in range(len(requests))]))


def transformers_logps(
    model: Any, reader: ImageReader, request: GenerationRequest, seen: list[np.ndarray[Any, Any]], answer: list[int]
) -> tuple[list[int], torch.Tensor]:
    """The likeliest token at each place of `answer`, and its own log-probability, by the model's own forward."""
    ids = torch.tensor([[*request.prompt_ids, *answer]])
    read = reader.processor(images=[Image.fromarray(pixels) for pixels in seen], return_tensors="pt")
    with torch.inference_mode():
        logits = model(input_ids=ids, mm_token_type_ids=(ids == reader.image_token).int(), **read).logits
    logps = logits[0, len(request.prompt_ids) - 1 : -1].log_softmax(-1)
    return logps.argmax(-1).tolist(), logps.gather(1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize(("family", "max_pixels"), [("qwen2_5_vl", None), ("qwen2_5_vl", 4 * 784), ("qwen3_vl", None)])
def test_tokens_and_log_probabilities_are_those_of_transformers(
    family: Family, max_pixels: int | None, models: dict[Family, Path], pictures: dict[str, Any], tmp_path: Path
) -> None:
    limits = ImageLimits(max_pixels=max_pixels)
    plain, turned, clear = pictures
    prompts = [[plain], [turned], [clear], [plain, turned, clear], [clear, plain]]
    in_own_process(tmp_path, ask_vllm, models[family], limits, prompts, tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    reader, model = reader_of(models[family], limits), load_model(str(models[family]), precision="fp32")
    differences = []
    for paths, (answer, logps) in zip(prompts, found, strict=True):
        request = request_with(reader, paths)
        seen = [pictures[path] for path in paths]
        likeliest, expected = transformers_logps(model, reader, request, seen, answer)
        assert likeliest == answer
        differences.append(float((expected - torch.tensor(logps)).abs().max()))
        if len(paths) == 1:  # the control: of another picture of the same size the same words are less or more likely
            other = [pictures[clear if paths == [plain] else plain]]
            changed = transformers_logps(model, reader, request, other, answer)[1]
            assert float((changed - torch.tensor(logps)).abs().max()) > 1000 * TOLERANCE
    print(f"{family}: log-probabilities differ by {max(differences):.1e} at most")
    assert max(differences) < TOLERANCE


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("workspace") / "data" / "run" / "ingest_reviews" / "all"
    stage = load_stage("ingest_reviews")
    config = validate(stage.config, {"sources": [{"format": "generated", "num_papers": 40, "images": True}]})
    stage.run(config, make_task("ingest_reviews", folder, {}))
    return publish_as(folder, "review_corpus")


@pytest.mark.parametrize(("family", "modality"), [("qwen2_5_vl", "clean_images"), ("qwen3_vl", "vision")])
def test_greedy_reviews_of_papers_with_images_are_those_of_transformers(
    family: Family, modality: Modality, models: dict[Family, Path], corpus: Artifact, tmp_path: Path
) -> None:
    papers = read_held_out(corpus, 3, 0, modality).papers

    def written(engine: GenerationEngine) -> list[Any]:
        folder = tmp_path / engine.engine
        folder.mkdir()
        sampling = Sampling(max_new_tokens=24, temperature=0.0, top_p=1.0, seed=0)
        writing = Writing(modality, corpus.path, ImageLimits(), 2, None, 2, sampling, engine)
        return write_reviews(ModelSource(str(models[family]), "fp32"), papers, writing, folder)

    found = written(VllmGeneration(kv_cache_gb=0.125, enforce_eager=True))
    assert found == written(TransformersGeneration())
    assert len({row["text"] for row in found}) == len(papers)
