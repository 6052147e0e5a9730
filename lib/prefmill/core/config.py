"""Configuration: YAML merged with `key=value` by OmegaConf, checked by pydantic, reduced to an identity."""

from __future__ import annotations

import copy
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from operator import attrgetter
from pathlib import Path, PosixPath
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, core_schema

from prefmill.core.aliases import aliases_in, without_sections
from prefmill.core.errors import ConfigError, nearest
from prefmill.core.files import known_digest
from prefmill.core.revisions import require_hub_names
from prefmill.core.unknown_keys import explain, written
from prefmill.core.yaml_numbers import require_plain_numbers


class StrictConfig(BaseModel):
    """Base of every configuration: frozen, no unknown keys, no silent coercion, no NaN."""

    # Keys that nothing reads beside another one: by `key=value` as YAML writes it, or the key alone where it is given.
    unread_with: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    # NaN and infinity are no JSON, in which identities and manifests are written.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """A stage that gives a key another default keeps its description."""
        for name, field in cls.model_fields.items():
            inherited = (base.model_fields.get(name) for base in cls.__mro__[1:] if issubclass(base, StrictConfig))
            field.description = field.description or next((item.description for item in inherited if item), None)

    @model_validator(mode="after")
    def _revisions_are_of_the_hub(self) -> Self:
        require_hub_names(self)
        return self

    def changed(self, *keys: str) -> list[str]:
        """Those of `keys` that are not at their default; by value, as a job is handed every key of its plan."""
        fields = type(self).model_fields
        return [key for key in keys if getattr(self, key) != fields[key].get_default(call_default_factory=True)]

    def tell_unread(self, why: str, *keys: str, place: str = "") -> None:
        """Log those of `keys` that are not at their default: for `why`, nothing reads them."""
        if given := self.changed(*keys):
            logging.getLogger(__name__).warning("%s: no effect, %s", ", ".join(place + key for key in given), why)

    def tell_unread_with(self, place: str = "") -> None:
        """Log what `unread_with` says of this configuration, which is at `place`, and of its parts."""
        for beside, keys in self.unread_with.items():
            path, _, value = beside.partition("=")
            found = attrgetter(path)(self)
            if str(found).lower() == value if value else found:
                self.tell_unread(f"with {place}{beside}", *keys, place=place)
        for name, part in self:
            if isinstance(part, StrictConfig):
                part.tell_unread_with(f"{place}{name}.")

    def made_otherwise(self) -> dict[str, Any]:
        """Part of the identity beside the keys: what the same keys make now and did not make before."""
        return {}


COMMAND_LINE = "given on the command line"
ConfigT = TypeVar("ConfigT", bound=StrictConfig)


def _place(text: str) -> Path:
    """The absolute path of `text`, `~` at its start a home; ValueError for what only a shell reads."""
    if re.search(r"\$\{?\w", text) and not Path(text).exists():  # a folder of that very name would be made
        raise ValueError("variables of the environment are not read in configurations: write the path")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise ValueError("no user of that name has a home here: write the path") from None


# Path itself cannot be subclassed before Python 3.12.
class ExternalPath(PosixPath):
    """A file or folder from outside the pipeline: its content, not its path, is part of a task's identity.

    A relative path is read from the folder the command was given in.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(
            lambda text: cls(_place(text)),
            core_schema.str_schema(min_length=1),
            serialization=core_schema.to_string_ser_schema(),
        )


def runtime(default: Any = ..., formerly: str | None = None, **constraints: Any) -> Any:
    """A field that changes how a task runs but not what it makes; it is left out of the identity."""
    return Field(default, json_schema_extra={"identity": False, "formerly": formerly}, **constraints)


def later(default: Any, *, formerly: str | None = None, **constraints: Any) -> Any:
    """A field that came after artifacts were made: at its default it is left out of the identity, so that they stay."""
    return Field(default, json_schema_extra={"identity": "unless default", "formerly": formerly}, **constraints)


def renamed(former: str, default: Any, **constraints: Any) -> Any:
    """A field, at the top of a configuration, that was called `former`: accepted for a release, with a note."""
    return Field(default, json_schema_extra={"formerly": former}, **constraints)


def former_names(schema: type[BaseModel]) -> dict[str, str]:
    """Of fields that were renamed, the present name and the former one."""
    extras = {name: field.json_schema_extra for name, field in schema.model_fields.items()}
    said = {name: extra.get("formerly") for name, extra in extras.items() if isinstance(extra, dict)}
    return {name: str(former) for name, former in said.items() if former}


def modern(schema: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` under the present names of the schema's fields; raises ConfigError where one is given under both."""
    values = without_sections(schema.model_fields, values)
    former = {former: name for name, former in former_names(schema).items() if former in values}
    other = aliases_in(schema.model_fields, values)
    present = {**other, **former}
    for key, name in present.items():
        if name in values or list(present.values()).count(name) > 1:
            raise ConfigError(
                "one key under two names", where=schema.__name__, got=f"{key} and {name}",
                fix=f"leave out {key}, another name of {name}",
            )  # fmt: skip
        _tell(f"{key} is read as {name}" + ("; the next release refuses it" if key in former else ""))
    return {present.get(key, key): value for key, value in values.items()}


# Once a process: a sweep checks the same keys for every trial.
@cache
def _tell(note: str) -> None:
    print(f"note: {note}", file=sys.stderr)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, before interpolation; raises ConfigError naming the line otherwise."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        # A reference may point at a key that an override is yet to set.
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        require_plain_numbers(path.read_text("utf-8-sig"), path)
    except FileNotFoundError:
        near = _near(path)
        raise ConfigError(f"no such configuration file{near}", where=path, fix="check the path; see configs/") from None
    except IsADirectoryError:
        files = ", ".join(map(str, sorted(path.glob("[!.]*.yaml")))) or "(none)"
        raise ConfigError("a folder, not a file", where=path, expected=files, fix="name one of its files") from None
    except UnicodeDecodeError as error:
        raise ConfigError("no text in UTF-8", where=path, got=str(error), fix="save the file as UTF-8") from None
    except RecursionError:
        raise ConfigError("an alias that refers to itself", where=path, fix="write the value in its place") from None
    except (YAMLError, OmegaConfBaseException, OSError) as error:
        raise ConfigError("unreadable YAML", where=path, got=str(error), fix="correct the file at that line") from None
    if not isinstance(loaded, dict):
        raise ConfigError(
            "a configuration file contains keys and values", where=path, got=type(loaded).__name__,
            fix="write `key: value` lines, as in the files under configs/",
        )  # fmt: skip
    if wrong := [key for key in _keys(loaded) if isinstance(key, bool)]:
        raise ConfigError(
            "a key that is no word to YAML", where=path, got=f"{wrong[0]} (it reads yes, no, on and off as such)",
            fix="put the key in quotes, as in 'Yes': 1",
        )  # fmt: skip
    return {str(key): value for key, value in loaded.items()}


def _keys(value: Any) -> Iterator[Any]:
    """All keys, at any depth."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        yield from _keys(item)


def _near(path: Path) -> str:
    """The file that may be meant: of that name in `configs`, a pipeline first, or beside it with a name like it."""
    name = path.name if path.suffix else f"{path.name}.yaml"
    known = sorted(Path("configs").rglob(name), key=lambda file: file.parent.name != "pipelines")
    beside = [other.name for other in path.parent.glob("*.yaml")]
    return f" (did you mean '{known[0]}'?)" if known else nearest(path.name, beside)


def merge(base: Mapping[str, Any], overrides: Sequence[str] = (), where: object = None) -> dict[str, Any]:
    """`base` with dotted `key=value` overrides laid over it and its interpolations resolved.

    Environment values are refused: configs are recorded in manifests, and secrets must not be.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from omegaconf.resolvers import oc
    from yaml import YAMLError

    overrides = [_with_its_lines(override) for override in overrides]
    OmegaConf.clear_resolver("oc.env")  # its name can be written in too many ways to look for: ${${a}.env:X}
    try:
        # from_dotlist reads what stands after = as YAML: 0.1 is a number there and null is nothing.
        merged = OmegaConf.merge(OmegaConf.create(dict(base)), OmegaConf.from_dotlist(list(overrides)))
        resolved = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(
            # OmegaConf's further lines are about its own objects, YAML's first one names no place.
            "cannot merge the configuration", where=where,
            got=" ".join(str(error).split()) if isinstance(error, YAMLError) else str(error).splitlines()[0],
            fix="check the overrides and ${...} references, which name other keys and no variables of the environment; "
            "for a secret, give the variable's name and let the stage read it",
        ) from None  # fmt: skip
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _with_its_lines(override: str) -> str:
    """`key=value` with the line breaks of a text, as of a template, quoted: YAML would fold them into spaces."""
    from yaml import YAMLError, safe_load

    key, text = split_override(override)
    try:
        is_text = "\n" in text and isinstance(safe_load(text), str)
        require_plain_numbers(text, COMMAND_LINE)
    except YAMLError:  # `merge` says so of a line
        is_text = "\n" in text
    return f"{key}={json.dumps(text, ensure_ascii=False)}" if is_text else override


def split_override(override: str) -> tuple[str, str]:
    """The key of `key=value` and the text after it; raises ConfigError where there is none."""
    key, sign, text = override.partition("=")
    if not sign:
        raise ConfigError("an override is written key=value", got=repr(override), fix=f"write {override}=VALUE")
    return key, text


def lay_over(base: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `keys` laid over it: `lora.r` sets that key and leaves its neighbours, `lora` replaces them all."""
    laid = copy.deepcopy(dict(base))
    for dotted, value in keys.items():
        *path, last = dotted.split(".")
        inner = laid
        for part in path:
            if not isinstance(inner.get(part), dict):
                inner[part] = {}
            inner = inner[part]
        inner[last] = value
    return laid


def validate(
    schema: type[ConfigT], values: Mapping[str, Any], where: object = None, origins: Mapping[str, object] = {}
) -> ConfigT:
    """`values` as a `schema`; raises ConfigError naming every wrong key, its value and what was expected.

    `origins` says of keys, dotted where they are nested, where each was given.
    """
    values = modern(schema, values)
    try:
        # JSON mode keeps strictness while text may become a path and a list a tuple.
        return schema.model_validate_json(json.dumps(dict(values), default=str))
    except ValidationError as error:
        problems = explain(schema, error, values, origins)
        raise ConfigError(
            f"invalid configuration ({schema.__name__})", where=where, got="\n".join(["", *problems]),
            fix="correct these keys where they are given; `--help` of a stage explains each of its keys",
        ) from None  # fmt: skip


def load(
    schema: type[ConfigT],
    source: Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    where: object = None,
    origins: Mapping[str, object] = {},
) -> ConfigT:
    """A YAML file or mapping, with overrides, as a checked `schema`; `origins` as for `validate`."""
    values = read_yaml(source) if isinstance(source, Path) else source
    where = where or (source if isinstance(source, Path) else None)
    said = {split_override(item)[0]: COMMAND_LINE for item in overrides}
    return validate(schema, merge(values, overrides, where), where, {**origins, **said})


def identity(config: BaseModel, digest: Callable[[Path], Any] = known_digest) -> dict[str, Any]:
    """What decides a task's content: every field but runtime ones and later ones unset, external files by `digest`."""
    given = {name: (field, getattr(config, name)) for name, field in type(config).model_fields.items()}
    counted = {name: _identity_value(value, digest) for name, (field, value) in given.items() if _counts(field, value)}
    return counted | (config.made_otherwise() if isinstance(config, StrictConfig) else {})


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf, for comparing two configurations; as errors name it."""
    for key, value in values.items():
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            yield from flatten({written((key, index)): item for index, item in enumerate(value)}, prefix)
        elif isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _counts(field: Any, value: Any) -> bool:
    extra = field.json_schema_extra
    said = extra.get("identity", True) if isinstance(extra, dict) else True
    return bool(value != field.default if said == "unless default" else said)


def _identity_value(value: Any, digest: Callable[[Path], Any]) -> Any:
    if isinstance(value, ExternalPath):
        return digest(value)
    if isinstance(value, BaseModel):
        return identity(value, digest)
    if isinstance(value, dict):
        return {str(key): _identity_value(item, digest) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_identity_value(item, digest) for item in value]
    return str(value) if isinstance(value, Path) else value
