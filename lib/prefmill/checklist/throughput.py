"""How fast a shard is being scored, and how much of its prompts came from a cache: for people, not for the payload."""

from __future__ import annotations

import time

from prefmill.checklist.engine import Engine


class Pace:
    """Counts from `start` on, when the engine has been loaded; before that, and where nothing is left, it is empty."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._started = 0.0
        self._num_items = 0

    def start(self, engine: Engine) -> None:
        """Begin to count."""
        # Monotonic: the wall clock may be set back meanwhile.
        self._engine, self._started = engine, time.monotonic()

    def add(self, num_items: int) -> None:
        """So many items have been answered."""
        self._num_items += num_items

    def figures(self) -> dict[str, float]:
        """`items_per_second` of this attempt and, where the engine knows them, its tokens and `cache_hit_rate`."""
        if self._engine is None or not self._num_items:
            return {}
        figures = {"items_per_second": round(self._num_items / max(1e-9, time.monotonic() - self._started), 3)}
        if self._engine.num_prompt_tokens:
            figures["prompt_tokens"] = self._engine.num_prompt_tokens
        if self._engine.num_answer_tokens:
            figures |= {"requests": self._engine.num_requests, "answer_tokens": self._engine.num_answer_tokens}
        rate = self._engine.cache_hit_rate
        return figures if rate is None else {**figures, "cache_hit_rate": round(rate, 4)}

    def __str__(self) -> str:
        """The same on part of a line, as `59.6 items/s, 88 % cached`."""
        figures = self.figures()
        parts = [f"{figures['items_per_second']:.1f} items/s"] if figures else []
        parts += [f"{figures['cache_hit_rate']:.0%} cached".replace("%", " %")] if "cache_hit_rate" in figures else []
        return ", ".join(parts)
