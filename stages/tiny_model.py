"""Trains a small language model from scratch on the unfiltered reviews: a base model for demos."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from prefmill.core.precision import Precision
from prefmill.core.stage import Metrics, Reads, Stage, Task
from prefmill.demo.text import Shape
from prefmill.training.config import TrainingConfig


class TinyModelConfig(TrainingConfig):
    """`shape` is the model's size, `vocab_size` its tokenizer's at most; `train_on_prompt` teaches it to copy."""

    can_shard: ClassVar[bool] = False

    shape: Shape = Field(
        default_factory=Shape,
        description="hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size",
    )
    vocab_size: int = Field(1536, ge=300, description="most tokens of the byte-level BPE tokenizer")
    initializer_range: float = Field(0.05, gt=0, description="standard deviation of the initial weights")
    train_on_prompt: bool = Field(
        True, description="count the prompt in the loss too, which teaches a small model to copy from it"
    )
    precision: Precision = "fp32"
    learning_rate: float = Field(3e-3, gt=0)
    num_train_epochs: int = Field(2, ge=1)
    warmup_steps: float = Field(0.1, ge=0)

    @model_validator(mode="after")
    def _starts_from_nothing(self) -> TinyModelConfig:
        if self.model_name_or_path is not None or self.lora is not None:
            raise ValueError("this stage builds its own model and trains all of it: leave out model_name_or_path, lora")
        return self


def run(config: TinyModelConfig, task: Task) -> Metrics:
    """Learn a tokenizer, build a Qwen2, train it, and write both as a plain Hugging Face folder."""
    from prefmill.demo.pretrain import chat_texts, encode_chats, pretrain, training_chats
    from prefmill.demo.text import create_qwen2
    from prefmill.demo.tokenizer import train_chat_tokenizer

    chats = training_chats(task.input("corpus"))
    tokenizer = train_chat_tokenizer(chat_texts(chats), config.vocab_size)
    rows = encode_chats(chats, tokenizer, config, task, on_prompt=config.train_on_prompt)
    model = create_qwen2(tokenizer, config.shape, config.seed, config.initializer_range)
    return {"vocab_size": len(tokenizer), **pretrain(model, tokenizer, rows, config, task)}


STAGE = Stage(
    name="tiny_model",
    config=TinyModelConfig,
    run=run,
    root="checkpoints",
    writes="checkpoint",
    reads={"corpus": Reads("review_corpus", "ingest_reviews")},
    preload=("torch", "transformers", "transformers.trainer"),
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
