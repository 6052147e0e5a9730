"""Tokenizers made on the spot, in the forms of Qwen2.5, CLIP and T5."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers.pre_tokenizers import ByteLevel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"
MASK = "<|mask|>"
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_ROLE_TOKEN = "<|im_start|>"  # noqa: S105
_CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_WORD_END = "</w>"


def train_chat_tokenizer(
    texts: Iterable[str], vocab_size: int, extra_special_tokens: Iterable[str] = (), mask_token: str | None = None
) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with Qwen2's pre-tokenisation and a ChatML template, learnt from `texts`.

    Any text can be encoded and comes back unchanged: the 256 bytes are in the vocabulary, which has at most
    `vocab_size` tokens (fewer where the texts have no more pairs to merge). Deterministic.
    """
    from transformers import Qwen2Tokenizer

    untrained = Qwen2Tokenizer(eos_token=END_OF_TURN, pad_token=PADDING, unk_token=None, mask_token=mask_token)
    special = [_ROLE_TOKEN, *extra_special_tokens]
    tokenizer = untrained.train_new_from_iterator(texts, vocab_size, new_special_tokens=special, show_progress=False)
    tokenizer.chat_template = (Path(__file__).parent / "chatml.jinja").read_text(encoding="utf-8")
    return tokenizer


def train_clip_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerBase:
    """A CLIP tokenizer (lower-case BPE on bytes) learnt from `texts`; any text can be encoded. Deterministic."""
    from transformers import CLIPTokenizer

    # CLIP's own normalisation and splitting, so that training and reading cut words alike.
    pieces = CLIPTokenizer().backend_tokenizer
    words: Counter[str] = Counter()
    for text in texts:
        normal = pieces.normalizer.normalize_str(text)
        words.update(word for word, _ in pieces.pre_tokenizer.pre_tokenize_str(normal))
    alphabet = [*sorted(ByteLevel.alphabet()), *(f"{char}{_WORD_END}" for char in sorted(ByteLevel.alphabet()))]
    merges = learn_merges(words, vocab_size - len(alphabet) - len(_CLIP_SPECIAL))
    # In the order of CLIP's own vocabulary; its end token is the last, as the largest id is where the text is read.
    tokens = [*alphabet, *("".join(merge) for merge in merges), *_CLIP_SPECIAL]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def letter_tokenizer() -> PreTrainedTokenizerBase:
    """A T5 tokenizer whose tokens are the printable ASCII characters."""
    from transformers import T5Tokenizer

    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    letters = [("\u2581", -1.0), *((chr(code), -2.0) for code in range(33, 127))]  # the first begins a word
    return T5Tokenizer(vocab=[*special, *letters], extra_ids=0, model_max_length=512)


def learn_merges(words: Mapping[str, int], num_merges: int) -> list[tuple[str, str]]:
    """The first `num_merges` byte-pair merges of `words` (word: count), whose last symbol carries CLIP's word end.

    tokenizers' own trainer numbers such symbols in the order of a hash table, which differs from run to run; here
    ties go to the pair that sorts first. Fewer merges come back where every word is whole before.
    """
    symbols = {word: (*word[:-1], word[-1] + _WORD_END) for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < num_merges:
        counts: Counter[tuple[str, str]] = Counter()
        for word, parts in symbols.items():
            for pair in pairwise(parts):
                counts[pair] += words[word]
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        symbols = {word: _merge(parts, best) for word, parts in symbols.items()}
    return merges


def _merge(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """`parts` with every occurrence of `pair`, from the left, made one symbol."""
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)
