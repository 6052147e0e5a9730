"""Pre-training a small causal model on chats, prompt and answer alike, with transformers' Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from prefmill.core.artifact import Artifact
from prefmill.core.errors import InputError
from prefmill.core.stage import Metrics, Task
from prefmill.families.causal.chat import encode
from prefmill.reviews.join import papers_with_reviews
from prefmill.reviews.prompt import Message, review_completion, review_messages
from prefmill.reviews.scale import scale_of
from prefmill.training.arguments import trainer_arguments
from prefmill.training.bad_rows import report_dropped
from prefmill.training.callbacks import StageCallback, check_every_step
from prefmill.training.checkpoints import newest_checkpoint
from prefmill.training.config import TrainingConfig
from prefmill.training.publish import save_finished

EncodedChat = dict[str, list[int]]  # `input_ids` and `labels`
_IGNORED = -100  # a label that takes no part in the loss


@dataclass(frozen=True)
class ReviewChat:
    """A request for a review and the review that answers it."""

    review_id: str
    messages: list[Message]
    answer: str


def training_chats(corpus: Artifact) -> list[ReviewChat]:
    """Every review of the corpus' train split, good or bad, in the form later stages train on.

    Raises InputError when there is none.
    """
    chats = [
        ReviewChat(review["review_id"], review_messages(paper, "clean"), review_completion(review, scale_of(paper)))
        for paper, reviews in papers_with_reviews(corpus)
        if paper["split"] == "train"
        for review in reviews
        if review["text"].strip()
    ]
    if not chats:
        raise InputError(
            "the corpus has no reviews to train on", where=corpus.path, expected="papers of the split 'train'",
            fix="raise the train share of ingest_reviews' splits, or add sources",
        )  # fmt: skip
    return chats


def chat_texts(chats: Iterable[ReviewChat]) -> Iterator[str]:
    """What a tokenizer for these chats learns from: every prompt once, every answer."""
    seen: set[str] = set()
    for chat in chats:
        for message in chat.messages:
            # A paper's prompt is the same for all of its reviews: repeated, it would count for too much in the merges.
            if message["content"] not in seen:
                seen.add(message["content"])
                yield message["content"]
        yield chat.answer


def encode_chats(
    chats: Sequence[ReviewChat], tokenizer: PreTrainedTokenizerBase, config: TrainingConfig, task: Task, on_prompt: bool
) -> list[EncodedChat]:
    """The chats as `input_ids` and `labels`; over-long ones are reported and dropped, or refused."""
    rows, dropped = [], []
    for chat in tqdm(chats, desc="tokenising reviews", unit=" rows"):
        prompt, answer = encode(tokenizer, chat.messages, chat.answer)
        if len(prompt) + len(answer) > config.max_length:
            dropped.append({"id": chat.review_id, "num_tokens": len(prompt) + len(answer)})
        else:
            labels = (prompt if on_prompt else [_IGNORED] * len(prompt)) + answer
            rows.append({"input_ids": prompt + answer, "labels": labels})
    report_dropped(task, dropped, len(rows), config)
    return rows


def pretrain(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[EncodedChat], config: TrainingConfig,
    task: Task,
) -> Metrics:  # fmt: skip
    """Train `model` on `rows`, resuming from the newest complete checkpoint, and write it as a Hugging Face folder."""
    # Chats differ much in length: group_by_length keeps padding from being much of the work.
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            **trainer_arguments(config, task, world_size=1), train_sampling_strategy="group_by_length"
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=_IGNORED),
        processing_class=tokenizer,
        callbacks=[StageCallback(task, config.save_minutes)],
    )
    check_every_step(trainer)
    trainer.train(resume_from_checkpoint=newest_checkpoint(task.output))
    save_finished(trainer.model, tokenizer, task.output, config, task)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {
        "steps": trainer.state.global_step,
        "train_rows": len(rows),
        "parameters": model.num_parameters(),
        "final_loss": losses[-1],
    }
