"""Which chat template writes a model's chats, as configuration: another than its own, its variables, its clock."""

from __future__ import annotations

import logging
from datetime import date
from typing import TYPE_CHECKING, Any

from pydantic import field_validator, model_validator

from prefmill.core.config import ExternalPath, StrictConfig, later
from prefmill.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_CLOCK = "strftime_now"  # transformers gives it to templates
_NAMES_GIVEN_BY_US = {"messages", "tools", "add_generation_prompt", _CLOCK}


class ChatTemplate(StrictConfig):
    """`chat_template` replaces the model's own: Jinja text, or a file, which becomes `chat_template_file`.

    `chat_template_kwargs` are variables of the template, such as `enable_thinking`; `template_date` (YYYY-MM-DD) is the
    day for one that reads the clock. A trained model is published with the template and these values as defaults.
    """

    chat_template: str | None = later(None, description="Jinja text or a file; none: the model's own")
    chat_template_file: ExternalPath | None = later(
        None, description="set from `chat_template` where that names a file; its content counts"
    )
    chat_template_kwargs: dict[str, Any] = later(
        {}, description="variables of the template, such as {enable_thinking: false}"
    )
    template_date: str | None = later(None, description="YYYY-MM-DD, for a template that reads the clock")

    @model_validator(mode="before")
    @classmethod
    def _text_or_file(cls, values: Any) -> Any:
        """A file's path says nothing of what is in it; a template without a brace would say the same of every chat."""
        given = values.get("chat_template") if isinstance(values, dict) else None
        if not isinstance(given, str) or "{" in given:
            return values
        if values.get("chat_template_file") is not None:
            raise ValueError("give chat_template or chat_template_file, not both")
        return {**values, "chat_template": None, "chat_template_file": given}

    @field_validator("chat_template_kwargs")
    @classmethod
    def _are_variables(cls, given: dict[str, Any]) -> dict[str, Any]:
        wrong = sorted(name for name in given if not name.isidentifier() or name in _NAMES_GIVEN_BY_US)
        if wrong:
            raise ValueError(f"no variables of a template that can be set: {', '.join(wrong)}")
        return given

    @field_validator("template_date")
    @classmethod
    def _is_a_day(cls, given: str | None) -> str | None:
        if given is not None:
            date.fromisoformat(given)
        return given

    def put_on(self, tokenizer: PreTrainedTokenizerBase, name: str, today: date | None = None) -> None:
        """Have `tokenizer` write chats as said here, on `today` unless a date is given.

        Raises InputError for a tokenizer without a template or with one that is no Jinja, and for one that reads the
        clock where no day is known.
        """
        own = tokenizer.chat_template if self._text is None else self._text
        if own is None:
            raise InputError(
                "the model has no chat template", where=name,
                fix="use an instruction-tuned model, or give the file of one with chat_template=FILE",
            )  # fmt: skip
        # Some checkpoints have several templates by name (Command R: one for tools, one for documents).
        texts = own if isinstance(own, dict) else {"default": own}
        if "default" not in texts:
            raise InputError(
                "the model has chat templates by name, and none of them for every chat", where=name,
                got=", ".join(sorted(texts)), expected="one called default",
                fix="write the one you mean into a file, and give it with chat_template=FILE",
            )  # fmt: skip
        for text in texts.values():
            _require_jinja(text, name)
        if unread := [key for key in self.chat_template_kwargs if not any(key in text for text in texts.values())]:
            _log.warning("chat_template_kwargs: no effect, %s's template reads no %s", name, ", ".join(unread))
        written = {key: self._defaults + text for key, text in texts.items()}
        tokenizer.chat_template = written if isinstance(own, dict) else written["default"]
        if not any(_CLOCK in text for text in texts.values()):
            self.tell_unread(f"{name}'s template reads no clock", "template_date")
        day = today if self.template_date is None else date.fromisoformat(self.template_date)
        if day is None and any(_CLOCK in text for text in texts.values()):
            raise InputError(
                "the chat template reads the clock: tomorrow's prompts would be others", where=name, got=_CLOCK,
                fix=f"set template_date={date.today().isoformat()}",
            )  # fmt: skip
        # Not written into the template, as variables are: a published model is to say the day on which it is used.
        tokenizer.__dict__["_prefmill_day"] = day

    @property
    def _text(self) -> str | None:
        if self.chat_template_file is None:
            return self.chat_template
        try:
            return self.chat_template_file.read_text("utf-8-sig")  # a byte order mark would begin each prompt
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                "cannot read the chat template", where=self.chat_template_file, got=error, fix="correct chat_template"
            ) from None

    @property
    def _defaults(self) -> str:
        """Jinja that sets the variables unless the caller does: whoever uses the published model gets the same text.

        Each line ends with a block, whose newline transformers trims: the template after it still begins a line.
        """
        # ascii() of JSON's values is an expression of Jinja's too
        return "".join(
            f"{{% if {name} is not defined %}}{{% set {name} = {value!a} %}}{{% endif %}}\n"
            for name, value in sorted(self.chat_template_kwargs.items())
        )


def _require_jinja(text: str, name: str) -> None:
    from jinja2.exceptions import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(text)
    except TemplateSyntaxError as error:
        raise InputError(
            "the chat template is no Jinja that can be read", where=name, got=f"line {error.lineno}: {error}",
            fix="correct it, or give the file of another one with chat_template=FILE",
        ) from None  # fmt: skip


def recorded_day(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The metric `template_date` where the template reads the clock: what to set to write the same text again."""
    day = tokenizer.__dict__.get("_prefmill_day")
    return {"template_date": day.isoformat()} if day and _CLOCK in str(tokenizer.chat_template) else {}


def stop_clock(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have the template, compiled once for all who have its text, read the day of `put_on` from now on."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    if (day := tokenizer.__dict__.get("_prefmill_day")) is not None:
        own = tokenizer.chat_template
        # Not as a variable: since 5.20 transformers makes text of all that is no plain data.
        for text in own.values() if isinstance(own, dict) else [own]:
            _compile_jinja_template(text).globals[_CLOCK] = day.strftime
