"""Ollama's templates in Jinja: what a conversation becomes."""

from __future__ import annotations

from typing import Any

import pytest

from sollold.models.templates.go_parser import TemplateError, parse_template
from sollold.models.templates.jinja import RAW, fingerprint, to_jinja, untranslatable

jinja2 = pytest.importorskip("jinja2")

CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "a"},
    {"role": "user", "content": "b"},
]
CALLED = [
    {"role": "user", "content": "hi"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
    },
    {"role": "tool", "content": "42", "tool_call_id": "1"},
]
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
]

LLAMA = """{{ if .System }}<|system|>
{{ .System }}<|eot|>{{ end }}{{ if .Prompt }}<|user|>
{{ .Prompt }}<|eot|>{{ end }}<|assistant|>
{{ .Response }}<|eot|>"""
GEMMA = """{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if or (eq .Role "user") (eq .Role "system") }}<start_of_turn>user
{{ .Content }}<end_of_turn>
{{ if $last }}<start_of_turn>model
{{ end }}
{{- else if eq .Role "assistant" }}<start_of_turn>model
{{ .Content }}{{ if not $last }}<end_of_turn>
{{ end }}
{{- end }}
{{- end }}"""
TOOLED = """{{- if or .System .Tools }}<|im_start|>system
{{- if .System }}
{{ .System }}
{{- end }}
{{- range .Tools }}
{"type": "function", "function": {{ .Function }}}
{{- end }}<|im_end|>
{{ end }}
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 -}}
{{- if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ if .Content }}{{ .Content }}
{{- else if .ToolCalls }}<tool_call>
{{ range .ToolCalls }}{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
{{ end }}</tool_call>
{{- end }}{{ if not $last }}<|im_end|>
{{ end }}
{{- else if eq .Role "tool" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ end }}
{{- if and (ne .Role "assistant") $last }}<|im_start|>assistant
{{ end }}
{{- end }}"""


def rendered(template: str, messages: list[dict[str, Any]], **more: Any) -> str:
    made = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    return made.from_string(to_jinja(template)).render(messages=messages, **more)


def test_a_template_of_one_exchange_is_printed_once_for_each() -> None:
    assert rendered(LLAMA, CHAT) == (
        "<|system|>\nS<|eot|><|user|>\nhi<|eot|><|assistant|>\nyo<|eot|>"
        "<|user|>\na\n\nb<|eot|><|assistant|>\n"
    )


def test_an_answer_that_has_begun_goes_on() -> None:
    begun = [*CHAT[:2], {"role": "assistant", "content": "Yes, "}]
    assert rendered(LLAMA, begun).endswith("<|assistant|>\nYes, ")


def test_without_a_template_the_prompt_is_what_the_user_says() -> None:
    assert rendered(RAW, [{"role": "user", "content": "Once upon a {{ time }}"}]) == "Once upon a {{ time }}"
    assert rendered(RAW, CHAT[:2]) == "hi", "a system text has no place in it"


def test_a_template_of_messages_prints_the_conversation() -> None:
    assert rendered(GEMMA, CHAT) == (
        "<start_of_turn>user\nS<end_of_turn>\n<start_of_turn>user\nhi<end_of_turn>\n"
        "<start_of_turn>model\nyo<end_of_turn>\n<start_of_turn>user\na\n\nb<end_of_turn>\n"
        "<start_of_turn>model\n"
    )


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
def test_tools_and_their_calls(arguments: object) -> None:
    messages = [CALLED[0], {**CALLED[1]}, CALLED[2]]
    messages[1]["tool_calls"] = [{"function": {"name": "f", "arguments": arguments}}]
    shown = rendered(TOOLED, messages, tools=TOOLS)
    assert '"function": {"description": "d", "name": "f"' in shown
    assert '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>' in shown
    assert shown.endswith("<|im_start|>user\n42<|im_end|>\n<|im_start|>assistant\n")


def test_text_of_several_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}]
    assert rendered(RAW, [{"role": "user", "content": parts}]) == "ab"


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("{{/* a }} comment */}}x{{ .Prompt }}", "xhi"),
        ("  {{- /* trimmed */ -}}  x{{ .Prompt }}", "xhi"),
        ("{{ if and .System (not .Suffix) }}S{{ else }}N{{ end }}{{ .Prompt }}", "Nhi"),
        ("{{ with .Prompt }}[{{ . }}]{{ else }}none{{ end }}", "[hi]"),
        ('{{ $x := "a\\n\\"" }}{{ $x }}{{ $x = `b` }}{{ $x }}{{ .Prompt }}', 'a\n"bhi'),
        ("{{ .Prompt | print }}", "hi"),
        (
            '{{ range .Messages }}{{ if eq .Role "user" "a" }}{{ .Content }}{{ break }}{{ end }}{{ end }}',
            "hi",
        ),
        (
            "{{ range $i, $m := .Messages }}<{{ if eq $i 0 }}{{ continue }}{{ end }}{{ .Content }}{{ end }}",
            "<",
        ),
        ("{{ (index .Messages 0).Content }}", "hi"),
        ("{{ len .Messages }}", "1"),
        ("{% raw %}{{ .Prompt }}{# no comment #}", "{% raw %}hi{# no comment #}"),
    ],
)
def test_forms(template: str, shown: str) -> None:
    assert rendered(template, [{"role": "user", "content": "hi"}]) == shown


TURNS = [{"role": role, "content": content} for role, content in zip("uauau", "abcde", strict=True)]


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ('{{ .Content }}{{ if eq .Content "c" }}{{ break }}{{ end }}-', "a-b-c"),
        ('{{ if eq .Content "c" }}{{ .Content }}{{ break }}{{ else }}x{{ end }}-', "x-x-c"),
        ('{{ if eq .Role "a" }}{{ continue }}{{ end }}{{ .Content }}', "ace"),
        ('({{ with .Content }}{{ if eq . "b" }}{{ continue }}{{ end }}{{ . }}{{ end }})', "(a)((c)(d)(e)"),
        ("{{ .Content }}{{ range $.Messages }}{{ break }}{{ end }}", "abcde"),
    ],
)
def test_what_was_printed_before_a_loop_is_left_stays(body: str, shown: str) -> None:
    assert rendered(f"{{{{ range .Messages }}}}{body}{{{{ end }}}}", TURNS) == shown
    assert "break" not in to_jinja(f"{{{{ range .Messages }}}}{body}{{{{ end }}}}")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ if .Prompt }}x", "without {{ end }}"),
        ("{{ end }}", "{{ end }} without"),
        ("{{ else }}", "{{ else }} without"),
        ("{{ .Prompt", "{{ without }}"),
        ('{{ template "x" }}', "template"),
        ("{{ toTypeScriptType .Prompt }}", "toTypeScriptType"),
        ("{{ .Nonsense }}", ".Nonsense"),
        ("{{ range .Messages }}{{ .Nonsense }}{{ end }}", ".Nonsense"),
        ("{{ $x }}", "$x"),
        ("{{ $x = 1 }}", "$x"),
        ("{{ ; }}", ";"),
        ("{{ . }}", "{{ . }} is not supported"),
        ("{{ break }}", "break"),
        ("{{ if .Prompt }}" * 60 + "{{ end }}" * 60, "nested"),
        ("{{ " + "(" * 5000 + ".Prompt" + ")" * 5000 + " }}", "nested"),
        ("x" * 200_000, "longer than"),
    ],
)
def test_what_is_not_known_is_named(template: str, why: str) -> None:
    assert why in untranslatable(template)
    with pytest.raises(TemplateError):
        to_jinja(template)


def test_reading_is_linear_in_the_length() -> None:
    parse_template("{{ .Prompt }}" * 5000)
    parse_template("{{/*" + "x" * 50_000 + "*/}}")
    with pytest.raises(TemplateError):
        parse_template("{{ " * 30_000)


def test_a_loaded_model_is_known_by_its_template() -> None:
    assert fingerprint("") == "" != fingerprint(RAW) != fingerprint(LLAMA)
