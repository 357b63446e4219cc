"""Converts JSON schemas to the form from which llama.cpp can make a grammar. Pure.

llama.cpp rejects a whole request for one keyword that it does not know, and silently ignores others. Keywords
with an equivalent form are rewritten (other names of types, nulls, references to the root, patterns). Others
are left unconstrained and reported: the caller decides whether that is a warning or an error.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

from sollold.api.grammar.keywords import DEFINITIONS, Schema, type_of
from sollold.api.grammar.pattern import Unsupported, convertible_pattern
from sollold.api.grammar.pointer import anchors_in, at_pointer
from sollold.api.grammar.problem import SchemaProblem, escaped
from sollold.api.grammar.rewrite import Rewriter, TooLarge
from sollold.api.grammar.schema_width import TooWide, check_schema
from sollold.api.grammar.values import Effort
from sollold.facts import dataclass

_TYPES = {
    "string": ("str", "text", "char", "varchar", "date", "datetime", "time", "uuid", "url", "uri", "email"),
    "integer": (
        *("int", "long", "short", "bigint", "int8", "int16", "int32", "int64"),
        *("uint", "uint8", "uint16", "uint32", "uint64"),
    ),
    "number": ("float", "double", "decimal", "float32", "float64", "real", "numeric"),
    "boolean": ("bool",),
    "object": ("dict", "map", "struct", "record", "mapping", "json"),
    "array": ("list", "tuple", "set", "sequence"),
    "null": ("none", "nil", "void"),
}
_TYPE_OF = {word: name for name, words in _TYPES.items() for word in (name, *words)}
_ANY_TYPE = ("any", "", "mixed", "unknown", "variant")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
_MAY_BE_BOOL = ("additionalProperties", "additionalItems", "unevaluatedProperties", "unevaluatedItems")
_SINGLES = ("items", *_MAY_BE_BOOL, "not", "if", "then", "else", "contains", "propertyNames")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_ROOT = "root"
_MAX_DEPTH = 64


@dataclass(slots=True)
class ConvertedSchema:
    """A schema that llama.cpp accepts, and what it does not enforce of the given one."""

    schema: Schema
    problems: list[SchemaProblem] = field(default_factory=list)
    notes: list[SchemaProblem] = field(default_factory=list)
    """Parts that are only partly enforced."""


def convert_schema(raw: Any, effort: Effort | None = None, *, formats: bool = True) -> ConvertedSchema:
    """Return ``raw`` rewritten; the argument is not changed.

    ``effort``: the budget, reduced by what is used. ``formats``: set their patterns, which are long.
    """
    effort = effort or Effort()
    converter = _Converter(raw, effort)
    schema = converter.document()
    rewritten = _rewrite(schema, effort, formats)
    if rewritten is not None and rewritten.schema != schema and converter.refers_to_places:
        # The targets of references may have moved: name them.
        renamed = _Converter(raw, effort, name_places=True)
        rewritten = _rewrite(renamed.document(), effort, formats)
    reason = "it is too large to enforce the keywords beside its choices"
    if rewritten is not None and rewritten.schema != schema and _is_too_wide(rewritten.schema):
        if formats and not _is_too_wide(schema):
            return convert_schema(raw, formats=False)
        reason, rewritten = "an engine would hang on a form that enforces more of it", None
    if rewritten is None:
        return ConvertedSchema(schema, converter.problems, [SchemaProblem("", "schema", reason)])
    return ConvertedSchema(rewritten.schema, [*converter.problems, *rewritten.problems], rewritten.notes)


def _is_too_wide(schema: Schema) -> bool:
    try:
        check_schema(schema)
    except TooWide:
        return True
    return False


def _rewrite(schema: Schema, effort: Effort, formats: bool) -> ConvertedSchema | None:
    rewriter = Rewriter(schema, effort, formats=formats)
    try:
        return ConvertedSchema(rewriter.document(), rewriter.problems, rewriter.notes)
    except TooLarge:
        return None


class _Converter:
    """One pass over a schema."""

    def __init__(self, document: Any, effort: Effort, *, name_places: bool = False) -> None:
        """``name_places``: give each target of a reference a name if it has none."""
        self._document = document
        self._effort = effort
        self._name_places = name_places
        self.refers_to_places = False
        self.problems: list[SchemaProblem] = []
        self.refers_to_root = False
        defs = document.get("$defs") if isinstance(document, dict) else None
        self.root_name = _ROOT
        while isinstance(defs, dict) and self.root_name in defs:
            self.root_name += "_"
        self._named: dict[int, tuple[str, str, Schema]] = {}
        """Targets of references that llama.cpp does not follow: identity → (new name, reference, schema)."""
        self._anchors: dict[str, Schema] | None = None

    def document(self) -> Schema:
        """Convert the whole document."""
        schema = self.node(self._document, "", 0)
        defs = self.further_definitions()
        if self.refers_to_root:
            defs[self.root_name] = {key: value for key, value in schema.items() if key not in DEFINITIONS}
        return {**schema, "$defs": {**schema.get("$defs", {}), **defs}} if defs else schema

    def further_definitions(self) -> dict[str, Schema]:
        """Convert the targets in `_named`; return them by their new names."""
        definitions: dict[str, Schema] = {}
        while len(definitions) < len(self._named):
            for name, target, node in tuple(self._named.values()):
                if name not in definitions:
                    definitions[name] = self.node(node, target.removeprefix("#"), 0)
        return definitions

    def _problem(self, pointer: str, keyword: str, reason: str) -> None:
        self.problems.append(SchemaProblem(pointer, keyword, reason))

    def node(self, raw: Any, pointer: str, depth: int) -> Schema:
        """Convert the schema at ``pointer``; to an empty one if anything is allowed."""
        if raw is None or raw is True or raw == []:
            return {}
        if isinstance(raw, str) and raw.lower() in (*_TYPE_OF, *_ANY_TYPE):
            raw = {"type": raw}
        if not isinstance(raw, dict):
            self._problem(pointer, "schema", "it is not an object")
            return {}
        if depth > _MAX_DEPTH:
            self._problem(pointer, "schema", "it is nested too deeply")
            return {}
        out = {key: value for key, value in raw.items() if value is not None or key in ("const", "default")}
        if "properties" in raw and raw["properties"] is None:
            out["properties"] = {}
        self._reference(out, pointer)
        self._type(out, pointer)
        self._enum(out, pointer)
        self._limits(out, pointer)
        self._pattern(out, pointer)
        self._children(out, pointer, depth)
        self._required(out, raw)
        return out

    def _type(self, out: Schema, pointer: str) -> None:
        kinds = out.get("type")
        if kinds is None:
            out.pop("type", None)
        else:
            names: list[str] = []
            for kind in kinds if isinstance(kinds, list) else [kinds]:
                word = kind.strip().lower() if isinstance(kind, str) else None
                name = _TYPE_OF.get(word) if word is not None else "null" if kind is None else None
                if name is None and word not in _ANY_TYPE:
                    self._problem(pointer, "type", f"unknown type {str(kind)[:40]!r}")
                if name is None:
                    names = []
                    break
                if name not in names:
                    names.append(name)
            if names:
                out["type"] = type_of(names)
            else:
                del out["type"]
        nullable = out.pop("nullable", None)
        kinds = out.get("type")
        if nullable is True and kinds is not None:
            types = kinds if isinstance(kinds, list) else [kinds]
            out["type"] = types if "null" in types else [*types, "null"]
            if isinstance(out.get("enum"), list) and None not in out["enum"]:
                out["enum"] = [*out["enum"], None]

    def _enum(self, out: Schema, pointer: str) -> None:
        values = out.get("enum")
        if values is None:
            return
        if not isinstance(values, list):
            self._problem(pointer, "enum", "it is not an array")
        if not isinstance(values, list) or not values:
            del out["enum"]

    def _limits(self, out: Schema, pointer: str) -> None:
        for keyword in (*_COUNTS, *_BOUNDS):
            if keyword not in out:
                continue
            value = out[keyword]
            if isinstance(value, bool) and keyword.startswith("exclusive"):
                # Draft 4: the boolean makes "minimum" or "maximum" exclusive.
                del out[keyword]
                plain = keyword.removeprefix("exclusive").lower()
                if value and _number(out.get(plain)) is not None:
                    out[keyword] = _number(out.pop(plain))
                continue
            number = _number(value)
            if number is None or (keyword in _COUNTS and (number != int(number) or number < 0)):
                self._problem(pointer, keyword, f"{str(value)[:40]!r} is not a valid number")
                del out[keyword]
            else:
                out[keyword] = int(number) if number == int(number) else number

    def _pattern(self, out: Schema, pointer: str) -> None:
        if "pattern" not in out:
            return
        pattern = out["pattern"]
        try:
            if not isinstance(pattern, str):
                raise Unsupported("it is not a string")
            self._effort.letters -= len(pattern)
            if self._effort.letters < 0:
                raise Unsupported("there are too many long patterns")
            out["pattern"] = convertible_pattern(pattern)
        except Unsupported as error:
            self._problem(pointer, "pattern", str(error))
            del out["pattern"]

    def _reference(self, out: Schema, pointer: str) -> None:
        for dynamic in ("$dynamicRef", "$recursiveRef"):
            # Within one document they resolve as a plain "$ref" does.
            if dynamic in out:
                out.setdefault("$ref", out.pop(dynamic))
        if "$ref" not in out:
            return
        target = out["$ref"]
        reference = self._resolve(target) if isinstance(target, str) else None
        if reference is None:
            self._problem(pointer, "$ref", f"{str(target)[:80]!r} is not in the schema")
            del out["$ref"]
        else:
            out["$ref"] = reference

    def _resolve(self, target: str) -> str | None:
        """Return a reference in a form that llama.cpp follows; None if it leads nowhere."""
        document_id = self._document.get("$id")
        if isinstance(document_id, str) and document_id and target.startswith(f"{document_id}#"):
            target = target.removeprefix(document_id)
        if target in ("#", "#/"):
            self.refers_to_root = True
            return f"#/$defs/{self.root_name}"
        if target.startswith("#/"):
            node = at_pointer(self._document, target)
            if node is None:
                return None
            is_place = target.count("/") != 2 or target.split("/")[1] not in DEFINITIONS
            self.refers_to_places |= is_place
            unnamed = {"~", "%"} & {*target} or (is_place and self._name_places)
            return self._name_target(target, node) if unnamed else target
        if target.startswith("#"):
            if self._anchors is None:
                self._anchors = anchors_in(self._document)
            if target[1:] in self._anchors:
                return self._name_target(target, self._anchors[target[1:]])
        name = target.rsplit("/", 1)[-1].removeprefix("#")
        for keyword in ("$defs", "definitions"):
            defs = self._document.get(keyword)
            if isinstance(defs, dict) and isinstance(defs.get(name), dict):
                return f"#/{keyword}/{name}"
        return None

    def _name_target(self, target: str, node: Schema) -> str:
        name = f"{self.root_name}_{len(self._named) + 1}"
        return f"#/$defs/{self._named.setdefault(id(node), (name, target, node))[0]}"

    def _children(self, out: Schema, pointer: str, depth: int) -> None:
        for keyword in _MAPS:
            if keyword not in out:
                continue
            children = out[keyword]
            if isinstance(children, list) and not children:
                children = {}
            if not isinstance(children, dict):
                self._problem(pointer, keyword, "it is not an object")
                del out[keyword]
                continue
            out[keyword] = {
                name: child
                if keyword == "dependencies" and isinstance(child, list)
                else self.node(child, f"{pointer}/{keyword}/{escaped(name)}", depth + 1)
                for name, child in children.items()
                if child is not False
            }
            if keyword == "properties":
                self._deny(out, [name for name, child in children.items() if child is False], pointer)
        for keyword in _LISTS:
            if keyword in out:
                self._list(out, keyword, pointer, depth)
        for keyword in _SINGLES:
            if keyword not in out:
                continue
            child, path = out[keyword], f"{pointer}/{keyword}"
            if keyword in _MAY_BE_BOOL and isinstance(child, bool):
                continue
            if keyword == "items" and isinstance(child, list):
                out[keyword] = [self.node(item, f"{path}/{n}", depth + 1) for n, item in enumerate(child)]
            elif child is False and keyword == "items":
                out.pop("items")
                prefix = out.get("prefixItems")
                count = len(prefix) if isinstance(prefix, list) else 0
                out["maxItems"] = min(count, out.get("maxItems", count))
            elif child is False:
                self._problem(pointer, keyword, "false can't be enforced")
                del out[keyword]
            else:
                out[keyword] = self.node(child, path, depth + 1)

    def _deny(self, out: Schema, names: list[str], pointer: str) -> None:
        """Forbid the properties whose schema is false, so that later joins do not bring them back."""
        rest = out.get("additionalProperties")
        if not names or rest is False:
            return
        if rest is not None:
            self._problem(pointer, "properties", "false can't be enforced beside additionalProperties")
            return
        denied = [{"required": [name]} for name in names]
        existing = [out["not"]] if isinstance(out.get("not"), dict) else []
        out["not"] = denied[0] if len(denied) == 1 and not existing else {"anyOf": [*existing, *denied]}

    def _list(self, out: Schema, keyword: str, pointer: str, depth: int) -> None:
        children = out[keyword]
        if not isinstance(children, list):
            self._problem(pointer, keyword, "it is not an array")
            children = []
        kept = [
            self.node(child, f"{pointer}/{keyword}/{n}", depth + 1)
            for n, child in enumerate(children)
            if child is not False
        ]
        if kept:
            out[keyword] = kept
        else:
            del out[keyword]

    def _required(self, out: Schema, raw: Schema) -> None:
        """Make ``required`` a list of names; draft 3 has it in the property itself."""
        required = out.get("required")
        names = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
        children = raw.get("properties")
        if isinstance(children, dict):
            own = [
                name
                for name, child in children.items()
                if isinstance(child, dict) and child.get("required") is True
            ]
            known = {*names}
            names += [name for name in own if name not in known]
        rest = out.get("additionalProperties", out.get("unevaluatedProperties"))
        if isinstance(out.get("properties"), dict) and rest in (None, True):
            # llama.cpp ignores required properties that have no schema.
            out["properties"] |= {name: {} for name in names if name not in out["properties"]}
        if names:
            out["required"] = names
        else:
            out.pop("required", None)


def _number(value: Any) -> float | int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if not isinstance(value, (int, float)) or value != value or abs(value) == float("inf"):
        return None
    return value
