"""Texts tokenised by pieces, beside the tokenizer's own ids of the whole, for all kinds of tokenizers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prefmill.demo.tokenizer import train_chat_tokenizer
from prefmill.families.causal.chat import encode
from prefmill.families.causal.token_ids import token_ids
from prefmill.training.data import PreferencePair, group_by_prompt

CORPUS = ["Hello world, how are you? naïve café", "<|im_start|>user foo bar", "a b  c   d\n\n e ｆｕｌｌ"] * 5
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "<<s>>", "s><", "[INST]", "<s><t", "<t>"]  # some begin within others
WORDS = ["hello", "world ", " ", "  ", "\n", "é", "e\u0301", "ａ", "<", "|", "s", ">", "how are", "\u200b"]


def byte_level(add_prefix_space: bool) -> Tokenizer:
    """Qwen's and Llama 3's kind, and GPT-2's with a space in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return tokenizer


def metaspace(prepend_scheme: Any) -> Tokenizer:
    """Mistral's kind: a space before the text, before its first word or before none."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"]))
    return tokenizer


def prepend() -> Tokenizer:
    """Llama 2's kind: the space is a normalizer's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"]))
    return tokenizer


def unigram() -> Tokenizer:
    """T5's kind, which strips and composes letters."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=100, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": partial(byte_level, False), "gpt2": partial(byte_level, True), "prepend": prepend, "unigram": unigram,
    **{f"metaspace_{scheme}": partial(metaspace, scheme) for scheme in ("first", "always", "never")},
}  # fmt: skip


@pytest.mark.parametrize(
    "added",
    [
        [AddedToken(text, normalized=False) for text in SPECIAL],
        [AddedToken(text, normalized=False, rstrip=True) for text in SPECIAL],
        [AddedToken(text, normalized=False, lstrip=True) for text in SPECIAL],
        [AddedToken(text, normalized=False, single_word=True) for text in SPECIAL],
        [AddedToken(text, normalized=text in SPECIAL[::2]) for text in SPECIAL],
    ],
    ids=["plain", "rstrip", "lstrip", "single_word", "normalized"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_the_pieces_are_those_of_the_text(kind: str, added: Sequence[AddedToken]) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind]())
    tokenizer.add_tokens(added)
    chance = random.Random(kind)
    for _ in range(300):
        text = "".join(chance.choices(SPECIAL + WORDS, k=chance.randint(0, 9)))
        assert token_ids(tokenizer, text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_special_tokens_that_are_text_are_no_borders() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(False), split_special_tokens=True)
    tokenizer.add_special_tokens({"eos_token": AddedToken("world", normalized=False)})
    ids = tokenizer("Hello world", add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_token_id not in ids
    assert token_ids(tokenizer, "Hello world") == ids


def test_a_token_that_is_added_later_is_seen() -> None:
    tokenizer = train_chat_tokenizer(CORPUS, 300)
    before = token_ids(tokenizer, "hello <new>")
    tokenizer.add_tokens([AddedToken("<new>", normalized=False)])
    after = token_ids(tokenizer, "hello <new>")
    assert after != before
    assert after == tokenizer("hello <new>", add_special_tokens=False)["input_ids"]


def test_a_paper_is_tokenised_once_for_its_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each side was tokenised whole and up to its answer: twelve papers' worth for three pairs."""
    tokenizer, paper, seen = train_chat_tokenizer(CORPUS, 300), "how are you? " * 200, []
    own = type(tokenizer).__call__

    def count(self: Any, text: Any, *given: Any, **options: Any) -> Any:
        seen.append(len(text))
        return own(self, text, *given, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", count)
    pairs = [
        PreferencePair(f"{n}", "paper", [{"role": "user", "content": paper}], f"Good {n}.", f"Bad {n}.")
        for n in range(3)
    ]  # fmt: skip
    (group,) = group_by_prompt(pairs, partial(encode, tokenizer))
    assert len(group.responses) == 6
    assert len(paper) < sum(seen) < 1.5 * len(paper)
