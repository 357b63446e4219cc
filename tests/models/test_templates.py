"""Translation of Ollama's Go templates to Jinja."""

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
CALLED: list[dict[str, Any]] = [
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
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    text: str = environment.from_string(to_jinja(template)).render(messages=messages, **more)
    return text


def test_a_template_of_one_exchange_is_rendered_for_each_exchange() -> None:
    assert rendered(LLAMA, CHAT) == (
        "<|system|>\nS<|eot|><|user|>\nhi<|eot|><|assistant|>\nyo<|eot|>"
        "<|user|>\na\n\nb<|eot|><|assistant|>\n"
    )


def test_a_final_assistant_message_is_left_open() -> None:
    messages = [*CHAT[:2], {"role": "assistant", "content": "Yes, "}]
    assert rendered(LLAMA, messages).endswith("<|assistant|>\nYes, ")


def test_the_raw_template_renders_only_the_user_text() -> None:
    assert rendered(RAW, [{"role": "user", "content": "Once upon a {{ time }}"}]) == "Once upon a {{ time }}"
    assert rendered(RAW, CHAT[:2]) == "hi", "the system text is left out"


def test_a_template_over_messages_renders_the_conversation() -> None:
    assert rendered(GEMMA, CHAT) == (
        "<start_of_turn>user\nS<end_of_turn>\n<start_of_turn>user\nhi<end_of_turn>\n"
        "<start_of_turn>model\nyo<end_of_turn>\n<start_of_turn>user\na\n\nb<end_of_turn>\n"
        "<start_of_turn>model\n"
    )


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
def test_tools_and_tool_calls_are_rendered(arguments: object) -> None:
    messages = [CALLED[0], {**CALLED[1]}, CALLED[2]]
    messages[1]["tool_calls"] = [{"function": {"name": "f", "arguments": arguments}}]
    text = rendered(TOOLED, messages, tools=TOOLS)
    assert '"function": {"description": "d", "name": "f"' in text
    assert '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>' in text
    assert text.endswith("<|im_start|>user\n42<|im_end|>\n<|im_start|>assistant\n")


def test_text_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}]
    assert rendered(RAW, [{"role": "user", "content": parts}]) == "ab"


@pytest.mark.parametrize(
    ("template", "expected"),
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
        ("x \n{{-\nif .Prompt\n-}}\n y{{ end }}{{ .Prompt }}", "xyhi"),
        ("\u3000{{- .Prompt -}}\u00a0", "\u3000hi\u00a0"),
        ('{{ "\\u003c\\x7c\\U0001F600\\101" }}{{ .Prompt }}', "<|\U0001f600Ahi"),
        ('{{ $x := "a" }}{{ if .Messages }}{{ $x := "b" }}{{ $x }}{{ end }}{{ $x }}', "ba"),
        ('{{ $x := "a" }}{{ if .Suffix }}{{ else }}{{ $x := "b" }}{{ end }}{{ $x }}{{ .Prompt }}', "ahi"),
        ('{{ $x := "a" }}{{ if .Messages }}{{ $x = "b" }}{{ end }}{{ $x }}', "b"),
        ("{% raw %}{{ .Prompt }}{# no comment #}", "{% raw %}hi{# no comment #}"),
    ],
)
def test_template_constructs(template: str, expected: str) -> None:
    assert rendered(template, [{"role": "user", "content": "hi"}]) == expected


TURNS = [{"role": role, "content": content} for role, content in zip("uauau", "abcde", strict=True)]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{{ .Content }}{{ if eq .Content "c" }}{{ break }}{{ end }}-', "a-b-c"),
        ('{{ if eq .Content "c" }}{{ .Content }}{{ break }}{{ else }}x{{ end }}-', "x-x-c"),
        ('{{ if eq .Role "a" }}{{ continue }}{{ end }}{{ .Content }}', "ace"),
        ('({{ with .Content }}{{ if eq . "b" }}{{ continue }}{{ end }}{{ . }}{{ end }})', "(a)((c)(d)(e)"),
        ("{{ .Content }}{{ range $.Messages }}{{ break }}{{ end }}", "abcde"),
    ],
)
def test_output_before_a_break_or_continue_is_kept(body: str, expected: str) -> None:
    assert rendered(f"{{{{ range .Messages }}}}{body}{{{{ end }}}}", TURNS) == expected
    assert "break" not in to_jinja(f"{{{{ range .Messages }}}}{body}{{{{ end }}}}")


@pytest.mark.parametrize(
    ("template", "reason"),
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
        ('{{ "\\q" }}', "is not supported"),
        ('{{ "\\xff" }}', "is not supported"),
        ('{{ "\\ud800" }}', "is not supported"),
        ('{{ "\\UFFFFFFFF" }}', "is not supported"),
        ("{{ range .Messages }}x{{ else }}{{ break }}{{ end }}", "outside of a range"),
        ("{{ if .Prompt }}" * 60 + "{{ end }}" * 60, "nested"),
        ("{{ " + "(" * 5000 + ".Prompt" + ")" * 5000 + " }}", "nested"),
        ("x" * 200_000, "longer than"),
        ("{{ .Prompt" + " | html" * 5000 + " }}", "nested"),
        ("{{ if " + "(eq " * 45 + ".Prompt" + ' "a" "b")' * 45 + " }}x{{ end }}", "translation is too long"),
        ("{{ if eq .Prompt " + "9" * 5000 + " }}x{{ end }}", "is not supported"),
        ("{{ range .Messages }}" + "{{ if .Role }}{{ continue }}{{ end }}" * 2000 + "{{ end }}", "continues"),
    ],
)
def test_unsupported_templates_are_refused_with_the_reason(template: str, reason: str) -> None:
    assert reason in untranslatable(template)
    with pytest.raises(TemplateError):
        to_jinja(template)


def test_long_templates_are_parsed_in_linear_time() -> None:
    parse_template("{{ .Prompt }}" * 5000)
    parse_template("{{/*" + "x" * 50_000 + "*/}}")
    with pytest.raises(TemplateError):
        parse_template("{{ " * 30_000)


def test_templates_have_distinct_fingerprints() -> None:
    assert fingerprint("") == "" != fingerprint(RAW) != fingerprint(LLAMA)
