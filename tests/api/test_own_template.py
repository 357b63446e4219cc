"""A ``template`` in a request to ``/api/generate``, rendered as Go does."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import msgspec
import pytest
from aiohttp import ClientSession

from sollold.api.ollama.generate import PackedTurn, generate_call, pack_context
from sollold.api.ollama.request import Generate, parse_options
from sollold.api.ollama.template import render_template
from sollold.errors import Refusal
from sollold.models.model import Model
from tests.api.api_parts import model
from tests.api.dialects import post

GEMMA = """{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if or (eq .Role "user") (eq .Role "system") }}<start>user
{{ .Content }}<end>
{{ if $last }}<start>model
{{ end }}
{{- else if eq .Role "assistant" }}<start>model
{{ .Content }}{{ if not $last }}<end>
{{ end }}
{{- end }}
{{- end }}"""
LEGACY = (
    "{{ if .System }}<s>{{ .System }}{{ end }}{{ if .Prompt }}<u>{{ .Prompt }}{{ end }}<a>{{ .Response }}<e>"
)
EXCHANGE = [("user", "one"), ("assistant", "two")]


def prompt_of(template: str, served: Model | None = None, **fields: Any) -> Any:
    request = msgspec.convert(
        {"model": "demo", "prompt": "hi", "template": template, **fields}, type=Generate
    )
    served = served or model()
    return generate_call(request, parse_options(None, served), served).body["prompt"]


def refused(template: str, **values: Any) -> str:
    with pytest.raises(Refusal) as caught:
        render_template(template, values)
    return caught.value.message


def test_a_template_can_iterate_over_messages() -> None:
    assert prompt_of(GEMMA) == "<start>user\nhi<end>\n<start>model\n"
    assert prompt_of(GEMMA, system="S").startswith("<start>user\nS<end>\n<start>user\nhi<end>\n")
    context = pack_context([PackedTurn(role, content) for role, content in EXCHANGE])
    assert prompt_of(GEMMA, context=context) == (
        "<start>user\none<end>\n<start>model\ntwo<end>\n<start>user\nhi<end>\n<start>model\n"
    )


def test_a_template_of_one_exchange_is_rendered_for_each() -> None:
    context = pack_context(
        [PackedTurn("system", "S"), *(PackedTurn(role, content) for role, content in EXCHANGE)]
    )
    assert prompt_of(LEGACY, context=context) == "<s>S<u>one<a>two<e><u>hi<a>"
    assert prompt_of(LEGACY, context=context, system="T") == "<s>T<u>one<a>two<e><u>hi<a>"
    assert prompt_of("[{{ .Prompt }}]", context=context) == "[one]two[hi]"
    configured = model(messages=tuple(EXCHANGE), system="S")
    assert prompt_of(LEGACY, configured) == "<s>S<u>one<a>two<e><u>hi<a>"
    assert prompt_of("", configured, raw=True) == "hi"


@pytest.mark.parametrize(
    ("template", "printed"),
    [
        ("{{ with .System }}[{{ . }}]{{ else }}none{{ end }}", "[s]"),
        ('{{ $x := "a" }}{{ if true }}{{ $x = "b" }}{{ end }}{{ $x }}', "b"),
        ('{{ $x := "a" }}{{ if true }}{{ $x := "b" }}{{ end }}{{ $x }}', "a"),
        ("{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Role }};{{ end }}", "0system;1user;"),
        ("{{ range .Messages }}{{ .Content }}{{ break }}{{ end }}", "s"),
        (
            '{{ range .Messages }}{{ if eq .Role "system" }}{{ continue }}{{ end }}{{ .Content }}{{ end }}',
            "p",
        ),
        ("{{ range .Tools }}x{{ else }}no tools{{ end }}", "no tools"),
        ("{{ range 3 }}{{ . }}{{ end }}", "012"),
        ("{{ (index .Messages 1).Content }}", "p"),
        ("{{ len .Messages }}{{ gt (len .Messages) 1 }}{{ .Prompt | len }}", "2true1"),
        ('{{ and .System "" "x" }}|{{ or "" .Prompt }}|{{ not .Prompt }}', "|p|false"),
        ('{{ eq .Prompt "a" "p" }}{{ ne .Prompt "a" }}{{ json .Messages | len | lt 10 }}', "truetruetrue"),
        ('{{ print "a" .Prompt 1 }}{{ `b"c` }}{{ "\\n" }}', 'ap1b"c\n'),
        ("{{ slice .Prompt 0 1 }}{{ .ThinkLevel }}{{ .First }}", "ptrue"),
    ],
)
def test_supported_template_syntax(template: str, printed: str) -> None:
    values = {"System": "s", "Prompt": "p"}
    over = template if "Messages" in template else template + "{{ if .Messages }}{{ end }}"
    assert render_template(over, values) == printed


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ .Odd }}", "unknown field .Odd"),
        ("{{ range .Messages }}{{ .Odd }}{{ end }}", "unknown field .Odd"),
        ("{{ $x }}", "$x"),
        ("{{ odd .Prompt }}", "the function odd"),
        ("{{ index .Messages 9 }}", "index"),
        ("{{ slice .Prompt -1 }}", "slice"),
        ("{{ lt .Prompt 1 }}", "lt"),
        ("{{ range .Prompt }}{{ end }}", "range"),
        ('{{ define "x" }}{{ end }}', "define"),
        ("{{ if .Prompt }}", "without {{ end }}"),
    ],
)
def test_unsupported_template_syntax_is_refused_by_name(template: str, message: str) -> None:
    assert message in refused(template, Prompt="p") and "raw" in refused(template, Prompt="p")


@pytest.mark.parametrize(
    "template",
    [
        "{{ range .Messages }}" * 49 + "x" + "{{ end }}" * 49,
        "{{ range 1000000000 }}{{ end }}",
        "{{ range 9999 }}{{ $.Prompt }}{{ end }}",
        "{{ range 9999 }}{{ if eq $.Prompt $.System }}{{ end }}{{ end }}",
        "{{ range 9999 }}{{ if json $.Messages }}{{ end }}{{ end }}",
        "{{ if .Messages }}{{ end }}" * 3000,
    ],
)
def test_templates_are_limited_in_time(template: str) -> None:
    values = {"Prompt": "a" * 200_000 + "b", "System": "a" * 200_000 + "c"}
    before = time.process_time()
    with contextlib.suppress(Refusal):
        render_template(template, values)
    assert time.process_time() - before < 1.0


@pytest.mark.llama
async def test_llama_cpp_answers_with_the_template_of_the_request(real: str, http: ClientSession) -> None:
    body = {
        "model": "demo",
        "prompt": "hi",
        "template": GEMMA,
        "stream": False,
        "options": {"num_predict": 3},
    }
    status, answer, _ = await post(http, f"{real}/api/generate", body)
    assert status == 200 and answer["response"].startswith("Hello!") and answer["prompt_eval_count"] > 5
