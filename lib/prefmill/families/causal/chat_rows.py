"""How rows of chats become what is trained, as configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from prefmill.core.config import StrictConfig, later
from prefmill.families.causal.image_limits import FrozenParts, ImageLimits
from prefmill.families.causal.templates import ChatTemplate
from prefmill.training.bad_rows import RowPolicy

TrainOn = Literal["completion", "last_turn", "all_assistant_turns"]


class RouterLoss(StrictConfig):
    """The balancing loss of a mixture of experts (Fedus et al. 2021, arXiv 2101.03961)."""

    # None rather than 0: before this key sft took the model's own value, and still does unless told otherwise.
    router_aux_loss_coef: float | None = later(
        None, ge=0, description="weight of the experts' balancing loss; none: in sft what the model says, in dpo 0"
    )


class ChatRows(ChatTemplate, ImageLimits, FrozenParts, RouterLoss, RowPolicy):
    """What `dpo` and `sft` say of their rows: the template, bounds on images and what they train, and of bad rows."""


class TrainedTurns(ChatRows):
    """`train_on`: the assistant's turns after the last user's (`completion`), the last one alone, or every one.

    They differ where a chat has several: the calls of tools before an answer, and the answers before the last one.
    """

    train_on: TrainOn = later(
        "completion",
        description="`completion`: the assistant's turns after the last user's; `last_turn`; `all_assistant_turns`",
    )

    def places(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Which turns of a chat are trained: none that its row gives the weight 0."""
        roles = [turn["role"] for turn in messages]
        after = max((place for place, role in enumerate(roles) if role == "user"), default=-1)
        first = {"completion": after, "last_turn": len(roles) - 2, "all_assistant_turns": -1}[self.train_on]
        trained = [role == "assistant" and turn.get("train", True) for role, turn in zip(roles, messages, strict=True)]
        return [place for place, is_trained in enumerate(trained) if is_trained and place > first]
