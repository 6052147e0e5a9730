"""The scoring engines: each opened from its configuration, its libraries imported only then."""

from __future__ import annotations

from prefmill.checklist.engine import AnyEngineConfig, ChatConfig, Engine, LexicalConfig, OpenAIConfig, VllmConfig
from prefmill.checklist.items import Checklist


def open_engine(config: AnyEngineConfig, checklist: Checklist, temperature: float | None = None) -> Engine:
    """The engine of `config`, ready to answer `checklist`; raises ConfigError or InputError where it cannot."""
    engine = _open(config, checklist)
    engine.temperature = temperature
    return engine


def _open(config: AnyEngineConfig, checklist: Checklist) -> Engine:
    if isinstance(config, LexicalConfig):
        from prefmill.checklist.lexical import LexicalEngine

        return LexicalEngine(config, checklist)
    if isinstance(config, VllmConfig):
        from prefmill.checklist.vllm_engine import VllmEngine

        return VllmEngine(config, checklist)
    if isinstance(config, OpenAIConfig):
        from prefmill.checklist.openai_engine import OpenAIEngine

        return OpenAIEngine(config, checklist)
    if isinstance(config, ChatConfig):
        from prefmill.checklist.chat_engine import ChatEngine

        return ChatEngine(config, checklist)
    from prefmill.checklist.transformers_engine import TransformersEngine

    return TransformersEngine(config, checklist)
