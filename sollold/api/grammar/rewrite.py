"""Rewrites a JSON schema as an equivalent one whose keywords llama.cpp reads. Pure.

llama.cpp reads one keyword of a schema and ignores the others: ``$ref``, else ``oneOf``, ``anyOf``,
``const`` or ``enum``. Keywords beside these are joined with the schemas that they lead to; the rest is
converted (`values`, `settle`). Parts that llama.cpp reads as they are stay unchanged.
"""

from __future__ import annotations

from sollold.api.grammar.join import Unjoinable, Unsatisfiable, joined, with_rest
from sollold.api.grammar.keywords import (
    CHOICES,
    CONDITIONS,
    CONSTRAINTS,
    DEFINITIONS,
    JOINS,
    Schema,
    constraints_of,
    kinds_of,
)
from sollold.api.grammar.overlap import may_overlap
from sollold.api.grammar.plain import plain_parts
from sollold.api.grammar.pointer import at_pointer
from sollold.api.grammar.problem import SchemaProblem, escaped
from sollold.api.grammar.settle import settle, without_kind
from sollold.api.grammar.values import Effort, ValueCheck, filter_values

MOST_ALTERNATIVES = 64
"""Maximum alternatives of one schema, after all keywords beside a choice are joined into each."""
_MAX_DEPTH = 40
_MAPS = ("properties", "patternProperties")
_LISTS = ("prefixItems", "items")
_SINGLES = ("items", "additionalProperties")


_FORBIDDING = JOINS | CONSTRAINTS | {"then", "else"}
_JOIN_ORDER = ("allOf", "anyOf", "oneOf", "$ref")
_SEPARATE = JOINS | {*DEFINITIONS}


class TooLarge(Exception):
    """The schema would become too large."""


class Rewriter:
    """One pass over a converted schema.

    Attributes:
        problems: parts that can't be enforced.
        notes: parts that are only partly enforced.
    """

    def __init__(self, document: Schema, effort: Effort, *, formats: bool = True) -> None:
        """``formats``: set the patterns of formats."""
        self._document = document
        self.problems: list[SchemaProblem] = []
        self.notes: list[SchemaProblem] = []
        self._plain = plain_parts(document)
        self._check = ValueCheck(self._resolve, effort)
        self._effort = effort
        self._formats = formats
        self._joined = self._choosing = 0
        self._only_one = False

    def document(self) -> Schema:
        """Rewrite the whole document.

        Raises:
            TooLarge: the schema would become too large.
        """
        return self._child(self._document, "", 0)

    def _resolve(self, reference: str) -> Schema | None:
        return at_pointer(self._document, reference)

    def _child(self, schema: Schema, pointer: str, depth: int) -> Schema:
        """Rewrite the schema at ``pointer``; without most constraints if no value can satisfy them."""
        if id(schema) in self._plain:
            return schema
        try:
            return self._visit(schema, pointer, depth)
        except Unsatisfiable as error:
            self.problems.append(SchemaProblem(pointer, error.keyword, error.reason))
            kept = {"const", "enum"} if schema.keys() & {"const", "enum"} else {"type"}
            return {key: value for key, value in schema.items() if key in kept or key not in _FORBIDDING}

    def _visit(self, schema: Schema, pointer: str, depth: int) -> Schema:
        self._effort.visits -= self._joined > 0
        if depth > _MAX_DEPTH or self._effort.visits < 0:
            raise TooLarge
        schema = self._with_definitions(schema, pointer, depth)
        schema = self._without_known_types(schema)
        joins = [key for key in JOINS if key in schema]
        if not joins:
            return self._leaf(schema, pointer, depth)
        if len(joins) == 1 and not constraints_of(schema):
            (join,) = joins
            if join == "$ref":
                return schema
            if join in CHOICES:
                return self._choice(schema, join, schema[join], pointer, depth)
            members = [part for part in schema["allOf"] if part.keys() & JOINS or constraints_of(part)]
            if len(members) == 1 and members[0].keys() & JOINS == {"$ref"} and not constraints_of(members[0]):
                return {**members[0], **{key: value for key, value in schema.items() if key != "allOf"}}
        return self._flattened(schema, schema, pointer, depth)

    def _flattened(self, schema: Schema, fallback: Schema, pointer: str, depth: int) -> Schema:
        """Join the keywords beside each other in ``schema``; return ``fallback`` if that is impossible."""
        self._joined += 1
        self._only_one = False
        annotations = {key: value for key, value in schema.items() if key not in _FORBIDDING}
        try:
            alternatives = self._alternatives(
                {key: value for key, value in schema.items() if key in _FORBIDDING}, pointer, ()
            )
        except Unjoinable as error:
            keyword = min(schema.keys() & JOINS, key=_JOIN_ORDER.index)
            reason = f'"{error}" of one part can\'t be joined with that of another'
            self.problems.append(SchemaProblem(pointer, keyword, reason))
            return {key: value for key, value in fallback.items() if key != CONDITIONS}
        finally:
            self._joined -= 1
        keyword = "oneOf" if self._only_one else "anyOf"
        self._joined += 1
        try:
            if len(alternatives) == 1:
                return {**self._visit({**alternatives[0], **annotations}, pointer, depth + 1), **annotations}
            return self._choice(annotations, keyword, alternatives, pointer, depth)
        finally:
            self._joined -= 1

    def _choice(self, schema: Schema, keyword: str, parts: list[Schema], pointer: str, depth: int) -> Schema:
        """Return ``schema``, which has no constraints, with the choices ``parts``, rewritten."""
        kept: list[Schema] = []
        problem = Unsatisfiable(keyword, "no value satisfies any of them")
        for index, part in enumerate(parts):
            self._choosing += 1
            try:
                kept.append(self._visit(part, f"{pointer}/{keyword}/{index}", depth + 1))
            except Unsatisfiable as error:
                problem = error if len(parts) == 1 else problem
            finally:
                self._choosing -= 1
        if not kept:
            raise problem
        if keyword == "oneOf" and may_overlap(kept, self._resolve):
            reason = "that only one of them matches"
            self.notes.append(SchemaProblem(pointer, keyword, reason))
        return {**schema, keyword: kept}

    def _alternatives(self, schema: Schema, pointer: str, seen: tuple[str, ...]) -> list[Schema]:
        """Return the alternatives of ``schema``, each without `JOINS` and joined with everything beside them.

        Raises:
            Unjoinable: a keyword can't be joined.
            Unsatisfiable: no value satisfies ``schema``.
        """
        own = _with_conditions({key: value for key, value in schema.items() if key not in _SEPARATE})
        forbids = constraints_of(own)
        found = [{key: value for key, value in own.items() if key in forbids or key not in CONSTRAINTS}]
        if (reference := schema.get("$ref")) is not None:
            target = self._resolve(reference)
            if target is None or reference in seen:
                raise Unjoinable("$ref")
            found = self._product(found, self._alternatives(target, pointer, (*seen, reference)))
        for member in schema.get("allOf", ()):
            if not (member.keys() & JOINS or constraints_of(member)):
                continue
            found = self._product(found, self._alternatives(member, pointer, seen))
        for keyword in CHOICES:
            if keyword not in schema:
                continue
            choices = schema[keyword]
            if keyword == "oneOf" and len(choices) > 1:
                choices = _exclusive(choices)
                self._only_one |= choices is schema[keyword]
            expanded: list[Schema] = []
            for choice in choices:
                try:
                    expanded += self._alternatives(choice, pointer, seen)
                except Unsatisfiable:
                    continue
                if len(expanded) > MOST_ALTERNATIVES:
                    raise TooLarge
            found = self._product(found, expanded)
        return [with_rest(alternative) for alternative in found]

    def _product(self, left: list[Schema], right: list[Schema]) -> list[Schema]:
        self._effort.visits -= len(left) * len(right)
        if len(left) * len(right) > MOST_ALTERNATIVES or self._effort.visits < 0:
            raise TooLarge
        found: list[Schema] = []
        problem = Unsatisfiable("anyOf", "no value satisfies any of them")
        for first in left:
            for second in right:
                try:
                    found.append(joined(first, second))
                except Unsatisfiable as error:
                    problem = error
        if not found:
            raise problem
        return found

    def _leaf(self, schema: Schema, pointer: str, depth: int) -> Schema:
        """Rewrite a schema without `JOINS`."""
        schema = filter_values(_with_conditions(schema), self._check)
        if "enum" not in schema and "const" not in schema:
            settled = settle(schema, self._check, formats=self._formats)
            self.problems += [SchemaProblem(pointer, *problem) for problem in settled.problems]
            self.notes += [SchemaProblem(pointer, *note) for note in settled.notes]
            if settled.alternatives is not None:
                chosen = {"anyOf": settled.alternatives, **settled.schema}
                return self._flattened(chosen, settled.schema, pointer, depth)
            schema = settled.schema
        if schema.pop(CONDITIONS, None):
            self.notes.append(SchemaProblem(pointer, "if", ""))
        return self._with_parts(schema, pointer, depth)

    def _with_parts(self, schema: Schema, pointer: str, depth: int) -> Schema:
        out = dict(schema)
        try:
            for keyword in _MAPS:
                if isinstance(out.get(keyword), dict):
                    out[keyword] = self._properties(out, keyword, f"{pointer}/{keyword}", depth)
        except Unsatisfiable:
            if (reduced := without_kind(schema, "object")) is None:
                raise
            out = reduced
        try:
            for keyword in _LISTS:
                if isinstance(out.get(keyword), list):
                    out[keyword] = [
                        self._item(item, f"{pointer}/{keyword}/{index}", depth)
                        for index, item in enumerate(out[keyword])
                    ]
        except Unsatisfiable:
            if (reduced := without_kind(out, "array")) is None:
                raise
            out = reduced
        for keyword in _SINGLES:
            if isinstance(out.get(keyword), dict):
                out[keyword] = self._child(out[keyword], f"{pointer}/{keyword}", depth + 1)
        return out

    def _item(self, schema: Schema, pointer: str, depth: int) -> Schema:
        """Rewrite an item of a tuple; an impossible one rules out its alternative, since none is optional."""
        visit = self._visit if self._choosing and id(schema) not in self._plain else self._child
        return visit(schema, pointer, depth + 1)

    def _properties(self, schema: Schema, keyword: str, pointer: str, depth: int) -> dict[str, Schema]:
        found: dict[str, Schema] = {}
        required = {*schema.get("required", ())}
        for name, child in schema[keyword].items():
            if id(child) in self._plain:
                found[name] = child
                continue
            if child is False:
                continue
            location = f"{pointer}/{escaped(name)}"
            is_required = name in required
            is_closed = schema.get("additionalProperties", False) is False
            if not (self._choosing and keyword == "properties" and (is_required or is_closed)):
                found[name] = self._child(child, location, depth + 1)
                continue
            try:
                found[name] = self._visit(child, location, depth + 1)
            except Unsatisfiable:
                if is_required:
                    raise
        return found

    def _with_definitions(self, schema: Schema, pointer: str, depth: int) -> Schema:
        for keyword in DEFINITIONS:
            if isinstance(schema.get(keyword), dict):
                visited = {
                    name: self._child(child, f"{pointer}/{keyword}/{escaped(name)}", depth + 1)
                    for name, child in schema[keyword].items()
                }
                schema = {**schema, keyword: visited}
        return schema

    def _without_known_types(self, schema: Schema) -> Schema:
        """Remove a ``type`` beside a choice or a reference that leads only to values of these types."""
        if (
            "type" not in schema
            or len(schema.keys() & JOINS) != 1
            or constraints_of(schema).keys() != {"type"}
        ):
            return schema
        rest = {key: value for key, value in schema.items() if key != "type"}
        found = self._kinds(rest, 0)
        return rest if found is not None and found <= {*(kinds_of(schema) or ())} else schema

    def _kinds(self, schema: Schema, depth: int) -> set[str] | None:
        """Return the types of all values that a schema allows; None for any."""
        if (kinds := kinds_of(schema)) is not None:
            return {*kinds}
        if depth > _MAX_DEPTH // 4:
            return None
        if "$ref" in schema:
            target = self._resolve(schema["$ref"])
            return None if target is None else self._kinds(target, depth + 1)
        for keyword in CHOICES:
            if keyword in schema:
                found = [self._kinds(choice, depth + 1) for choice in schema[keyword][:MOST_ALTERNATIVES]]
                known = [kinds for kinds in found if kinds is not None]
                complete = len(known) == len(schema[keyword])
                return {kind for kinds in known for kind in kinds} if complete else None
        return None


def _with_conditions(schema: Schema) -> Schema:
    """Combine ``if``, ``then`` and ``else`` to one keyword, which can hold those of several schemas."""
    if "if" not in schema:
        return schema
    parts = [schema.get(key, True) for key in ("if", "then", "else")]
    rest = {key: value for key, value in schema.items() if key not in ("if", "then", "else")}
    return {**rest, CONDITIONS: [*rest.get(CONDITIONS, ()), parts]} if parts[1:] != [True, True] else rest


def _exclusive(choices: list[Schema]) -> list[Schema]:
    """If each choice requires just one property, forbid the properties of the other choices."""
    names = [
        choice["required"]
        for choice in choices
        if {*constraints_of(choice)} <= {"required", "type"} and "required" in choice
    ]
    if len(names) != len(choices) or any(len(name) != 1 for name in names):
        return choices
    if any(choice.keys() & JOINS for choice in choices):
        return choices
    return [
        {**choice, "not": {"anyOf": [{"required": name} for name in names if name != choice["required"]]}}
        for choice in choices
    ]
