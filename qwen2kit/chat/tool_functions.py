"""Python functions that a model may ask to be called: schemas from signatures, checked calls."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from qwen2kit.errors import ConfigError

if TYPE_CHECKING:
    from types import ModuleType

    from pydantic import TypeAdapter

_ARGUMENT = re.compile(r"^\s+(\w+)(?: \([^)]*\))?: (.+)$")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function on offer.

    Attributes:
        name: what the model calls it.
        schema: entry of a template's ``tools``: description and JSON schema of the arguments.
        function: what is run.
        arguments: checks and converts the model's arguments.
    """

    name: str
    schema: dict[str, Any]
    function: Callable[..., Any]
    arguments: TypeAdapter[dict[str, Any]]

    def run(self, arguments: Mapping[str, Any]) -> str:
        """The function's result as text for the model (JSON unless it is a string); what goes
        wrong becomes text too, leaving the interpreter (`sys.exit`) included."""
        from pydantic import ValidationError

        try:
            checked = self.arguments.validate_python(dict(arguments))
        except ValidationError as error:
            reasons = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            return f"error: wrong arguments: {'; '.join(reasons)}"
        try:
            result = self.function(**checked)
            text = result if isinstance(result, str) else _json(result)
        except (Exception, SystemExit) as error:  # the function is the user's
            text = f"error: {_told(error)}"
        return text.encode(errors="replace").decode()


def load_tools(path: Path) -> list[Tool]:
    """The public functions that a Python file defines; running the file is up to the user.

    Raises:
        ConfigError: the file cannot be run, holds no function, or one without type hints.
    """
    spec = importlib.util.spec_from_file_location(f"qwen2kit_tools_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file; tools are functions in one")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the file is the user's: it may raise anything
        reason = " ".join(_told(error).split())
        raise ConfigError(f"{path} does not run: {reason}") from None
    tools = [tool_of(function) for function in _functions(module)]
    if not tools:
        raise ConfigError(f"{path} defines no public function")
    return tools


def tool_of(function: Callable[..., Any]) -> Tool:
    """A function with type hints as a tool.

    The first paragraph of its docstring describes it, an ``Args:`` section its parameters.

    Raises:
        ConfigError: a parameter has no type hint, cannot be given by name, or has a type that JSON
            does not know; or the function is asynchronous.
    """
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter
    from pydantic.errors import PydanticInvalidForJsonSchema

    name = function.__name__
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"tool {name} is asynchronous; write an ordinary function")
    about, described = _documentation(function)
    fields = _fields(function, described)
    # A TypedDict, unlike a model class, has room for parameters of any name.
    shape = _typed_dict(name, fields)
    shape.__pydantic_config__ = ConfigDict(extra="forbid")
    try:
        adapter: TypeAdapter[dict[str, Any]] = TypeAdapter(shape)
        parameters = adapter.json_schema()
    except (PydanticUserError, PydanticInvalidForJsonSchema) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"tool {name}: a parameter's type is no JSON: {reason}") from None
    parameters.pop("title", None)
    for property_schema in parameters.get("properties", {}).values():
        property_schema.pop("title", None)
    described_function = {"name": name, "description": about, "parameters": parameters}
    return Tool(name, {"type": "function", "function": described_function}, function, adapter)


def _json(result: object) -> str:
    """Raises TypeError or ValueError for what JSON has no room for."""
    return json.dumps(result, ensure_ascii=False, default=str)


def _told(error: BaseException) -> str:
    """Kind and message of somebody else's exception, whose own text may fail too."""
    kind = type(error).__name__
    try:
        return f"{kind}: {error}"
    except Exception:
        return kind


def _functions(module: ModuleType) -> list[Callable[..., Any]]:
    """In the order of the file; what it imports is not offered."""
    return [
        item
        for name, item in vars(module).items()
        if inspect.isfunction(item) and item.__module__ == module.__name__ and name[0] != "_"
    ]


def _fields(function: Callable[..., Any], described: Mapping[str, str]) -> dict[str, Any]:
    """Annotation of every parameter, with description and default."""
    from typing import Annotated, NotRequired

    from pydantic import Field

    name = function.__name__
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise ConfigError(f"tool {name}: unknown type in a hint: {error}") from None
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(f"tool {name}: {parameter} cannot be given by name")
        if parameter.name not in hints:
            raise ConfigError(f"tool {name}: parameter {parameter.name} has no type hint")
        extra = {} if parameter.default in (parameter.empty, None) else _default(parameter.default)
        about = Field(description=described.get(parameter.name), json_schema_extra=extra or None)
        hint: Any = Annotated[hints[parameter.name], about]
        optional = parameter.default is not parameter.empty
        fields[parameter.name] = NotRequired[hint] if optional else hint
    return fields


def _default(value: object) -> dict[str, Any]:
    """The default as the schema shows it, where JSON can."""
    return {"default": value} if isinstance(value, bool | int | float | str) else {}


def _typed_dict(name: str, fields: Mapping[str, Any]) -> Any:
    from typing_extensions import TypedDict

    return TypedDict(name, dict(fields))  # type: ignore[operator]


def _documentation(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """First paragraph of the docstring, and the lines of its ``Args:`` section by parameter."""
    text = inspect.getdoc(function) or ""
    about = " ".join(text.partition("\n\n")[0].split())
    described: dict[str, str] = {}
    last = None
    for line in text.partition("Args:\n")[2].splitlines():
        if line and not line[0].isspace():
            break
        if found := _ARGUMENT.match(line):
            last, described[found[1]] = found[1], found[2].strip()
        elif last is not None and line.strip():
            described[last] += " " + line.strip()
    return about, described
