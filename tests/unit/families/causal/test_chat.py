"""What is trained of a chat: the whole conversation as the template writes it, or a refusal with both texts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.errors import InputError
from prefmill.demo.tokenizer import train_chat_tokenizer
from prefmill.families.causal.chat import encode, end_token_ids, prompt_text
from prefmill.families.causal.templates import ChatTemplate
from prefmill.families.causal.vision_parts import KeptProcessor
from tests.conftest import REPOSITORY

CASES = REPOSITORY.parent / "shared" / "cases" / "text"
USER = [{"role": "user", "content": "Say yes."}]
MakeTokenizer = Callable[..., Any]


@pytest.fixture(scope="module")
def make() -> MakeTokenizer:
    tokenizer = train_chat_tokenizer(["Say yes. Yes, of course. No."] * 3, 300)
    own = tokenizer.chat_template

    def with_template(template: str | None = None) -> Any:
        tokenizer.chat_template = template or own
        return tokenizer

    return with_template


def case(name: str) -> str:
    path = CASES / name
    if not path.is_file():
        pytest.skip("needs the cases beside the checkout (shared/cases/text)")
    return path.read_text()


def test_prompt_and_completion_are_the_whole_conversation(make: MakeTokenizer) -> None:
    tokenizer = make()
    prompt, completion = encode(tokenizer, USER, "Yes.")
    whole = tokenizer.apply_chat_template([*USER, {"role": "assistant", "content": "Yes."}], tokenize=False)
    assert prompt + completion == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(prompt) == prompt_text(tokenizer, USER)
    assert tokenizer.eos_token_id in completion


@pytest.mark.parametrize("kind", ["text", "Qwen2.5-VL"])
def test_a_base_models_folder_says_where_its_template_ends_answers(
    kind: str, make: MakeTokenizer, tmp_path: Path
) -> None:
    """Qwen2.5's base states the text's end alone, and its template ends turns: tuned, it wrote on for ever."""
    from transformers import GenerationConfig

    from prefmill.families.causal.qwen_vision import QwenReader

    tokenizer = make()
    end, text_end = tokenizer.eos_token_id, tokenizer.pad_token_id
    tokenizer.save_pretrained(tmp_path / "base")
    GenerationConfig(eos_token_id=text_end, temperature=0.7, do_sample=True).save_pretrained(tmp_path)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.pad_token
    reader: Any = QwenReader.__new__(QwenReader)
    reader.tokenizer, reader.processor = tokenizer, tokenizer
    (KeptProcessor(tokenizer, str(tmp_path / "base"), None) if kind == "text" else reader).save_pretrained(tmp_path)
    found = GenerationConfig.from_pretrained(tmp_path)
    assert (found.eos_token_id, found.temperature) == (sorted([end, text_end]), 0.7)
    assert end_token_ids(None, tokenizer) == sorted([end, text_end])


def test_the_last_control_token_ends_an_answer(make: MakeTokenizer) -> None:
    """gpt-oss opens an answer with control tokens too."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ '<|endoftext|>' if m.role == 'assistant' }}{{ m.content }}"
        "<|im_end|>{% endfor %}{{ '<|im_start|>assistant' if add_generation_prompt }}"
    )
    tokenizer = make(template)
    assert end_token_ids(None, tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_header_that_comes_unasked_is_not_trained(make: MakeTokenizer) -> None:
    tokenizer = make(case("template_extra_header.jinja"))
    prompt, completion = encode(tokenizer, USER, "Yes.")
    assert tokenizer.decode(completion).strip() == "Yes.<|im_end|>"
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant")


def test_lladas_own_template_ends_answers_at_their_end() -> None:
    from transformers import AutoTokenizer

    folder = CASES.parents[1] / "data" / "mdlm" / "llada-tiny"
    if not folder.is_dir():
        pytest.skip("needs the tiny models in published form beside the checkout (shared/data/mdlm)")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt, completion = encode(tokenizer, USER, "Yes.")
    assert tokenizer.decode(completion).endswith("<|eot_id|>")
    assert tokenizer.decode(completion).count("<|") == 1
    assert tokenizer.decode(prompt) == prompt_text(tokenizer, USER)


def test_contents_that_are_lists_of_parts_are_given_as_such(make: MakeTokenizer) -> None:
    tokenizer = make(case("template_list_content.jinja"))
    prompt, completion = encode(tokenizer, USER, "Yes.")
    assert "Say yes." in tokenizer.decode(prompt)
    assert tokenizer.decode(completion).startswith("Yes.<|im_end|>")


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("template_no_end.jinja", "Yes.", "learn no stop"),
        ("template_drops_thought.jinja", "<think>hm</think>Yes.", "rewrites the prompt"),
        ("template_open_thought.jinja", "Yes.", "rewrites the prompt"),
    ],
)
def test_templates_that_cannot_be_trained_are_refused_with_both_texts(
    name: str, answer: str, message: str, make: MakeTokenizer
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        encode(make(case(name)), USER, answer)
    assert caught.value.details["got"]
    assert caught.value.details["expected"]


@pytest.mark.parametrize(
    ("body", "answer", "message"),
    [
        ("{{ m.content.split('</think>')[-1] }}", "<think>hm</think>Yes.", "drops a part"),
        (
            "{% if m.role != 'user' %}<think></think>{% endif %}{{ m.content }}",
            "<think>hm</think>Yes.",
            "a thought before",
        ),
    ],
)
def test_an_answer_that_the_template_changes_is_refused(
    body: str, answer: str, message: str, make: MakeTokenizer
) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + body + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert encode(make(template), USER, "Yes.")
    with pytest.raises(InputError, match=message):
        encode(make(template), USER, answer)


def test_a_system_message_that_the_template_refuses_is_the_rows_fault(make: MakeTokenizer) -> None:
    tokenizer = make(case("template_no_system.jinja"))
    assert encode(tokenizer, USER, "Yes.")
    with pytest.raises(InputError, match="refuses these messages") as caught:
        encode(tokenizer, [{"role": "system", "content": "Be kind."}, *USER], "Yes.")
    assert "System role not supported" in str(caught.value)


@pytest.mark.parametrize("code", ["m.content.index('e')", "1 // (m.content | length - 2)"])
def test_a_row_on_which_the_templates_code_fails_is_the_rows_fault(code: str, make: MakeTokenizer) -> None:
    """It was a traceback, whatever `on_bad_row` said."""
    tokenizer = make("{% for m in messages %}{% set x = " + code + " %}{{ m.content }}<|im_end|>{% endfor %}")
    assert encode(tokenizer, USER, "Yes.")
    with pytest.raises(InputError, match="refuses these messages"):
        encode(tokenizer, [{"role": "user", "content": "no"}], "Yes.")


def test_a_prompt_that_is_templated_already_is_noticed(make: MakeTokenizer) -> None:
    row = json.loads(case("already_templated.jsonl").splitlines()[0])
    with pytest.raises(InputError, match="through a chat template already"):
        encode(make(), [{"role": "user", "content": row["prompt"]}], row["chosen"])


def test_a_split_that_whole_tokenisation_does_not_have_is_refused(make: MakeTokenizer) -> None:
    tokenizer = train_chat_tokenizer(["a\n\n\nb"] * 50, 300)
    tokenizer.chat_template = make().chat_template
    with pytest.raises(InputError, match="join the last token"):
        encode(tokenizer, USER, "\n\nYes.")


def test_sentencepiece_words_are_those_of_the_whole(tmp_path: Path) -> None:
    """A tokenizer that puts a space before every text: an answer tokenised alone would begin with another word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    pieces.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    pieces.train_from_iterator(["Say yes. Yes, of course. Yes No.", "\n"] * 20, trainer)
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]\n"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    prompt, completion = encode(tokenizer, USER, "Yes.")
    whole = tokenizer("[INST]Say yes.[/INST]\nYes.</s>", add_special_tokens=False)["input_ids"]
    assert prompt + completion == whole


ONE = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
LOOP = "{% for m in messages %}BODY{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("{% if m.role != 'system' %}" + ONE + "{% endif %}", "role system"),
        ("{% if m.role != 'tool' %}" + ONE + "{{ m.tool_calls }}{% endif %}", "role tool"),
        (ONE, "role assistant"),  # the call of the tool
        (ONE.replace("m.content", "m.content[:9]") + "{{ m.tool_calls }}", "role user"),
        (ONE.replace("m.content", "m.content | e") + "{{ m.tool_calls }}", "role user"),
        ("{% if loop.index > 2 or m.role == 'system' %}" + ONE + "{{ m.tool_calls }}{% endif %}", "role user"),
    ],
)
def test_a_template_that_leaves_out_a_part_of_the_prompt_is_refused(make: MakeTokenizer, body: str, named: str) -> None:
    turns = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it <b>cold</b> there?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "3 degrees"},
    ]  # fmt: skip
    with pytest.raises(InputError, match=named):
        encode(make(LOOP.replace("BODY", body)), turns, "Yes.")


def test_a_result_written_as_json_and_an_earlier_thought_are_no_loss(make: MakeTokenizer) -> None:
    body = ONE.replace("m.content", "m.content | tojson if m.role == 'tool' else m.content.split('</think>')[-1]")
    turns = [
        *USER, {"role": "assistant", "content": "<think>Hm.</think>Yes.", "tool_calls": [CALL]},
        {"role": "tool", "content": 'It is "cold"\nthere.'},
    ]  # fmt: skip
    prompt, _ = encode(make(LOOP.replace("BODY", body + "{{ m.tool_calls }}")), turns, "Yes.")
    assert prompt


def test_an_answer_that_holds_its_own_end_and_a_header_that_is_left_out_are_refused(make: MakeTokenizer) -> None:
    for answer in ("Yes.<|im_end|>", "Yes.<|im_end|>No."):
        with pytest.raises(InputError, match="holds the token that ends it"):
            encode(make(), USER, answer)
    with pytest.raises(InputError, match="leaves out of a prompt"):
        encode(make("{% for m in messages %}" + ONE + "{% endfor %}"), USER, "Yes.")
    # Of the model and not of its rows, which `on_bad_row: drop` would leave out one by one.
    with pytest.raises(InputError, match=r"no Jinja(.|\n)*where: +a/model"):
        ChatTemplate().put_on(make("{% for m in messages %}"), "a/model")
