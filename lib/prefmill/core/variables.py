"""Environment variables that a configuration names: never their values, as configurations are recorded."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

HIDDEN = "hidden_value"  # a kind of error whose value is not shown, as it may be the secret itself
_NAME = re.compile(r"(?!hf_)[A-Za-z_]\w*", re.ASCII)  # a token of the hub would be one


def _variable_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise PydanticCustomError(HIDDEN, "no name of an environment variable; write its name, never its value")
    return name


VariableName = Annotated[str, AfterValidator(_variable_name)]
