"""Client × feature: the test of each combination. Each test runs for all of ``conftest.WAYS``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

COLUMNS = {"ollama": "test_ollama_", "openai": "test_openai_", "anthropic": "test_anthropic_"}
"""Client → prefix of its tests' names."""

TABLE: dict[str, dict[str, str]] = {
    "chat": {"ollama": "chat", "openai": "chat", "anthropic": "messages"},
    "text": {"ollama": "generate_and_context", "openai": "completions_and_embeddings"},
    "responses": {"openai": "responses"},
    "responses: tools, thinking": {"openai": "responses_tools_and_thinking"},
    "tools": {"ollama": "tools", "openai": "tools", "anthropic": "tools"},
    "tool_choice none": {"openai": "tool_choice_none"},
    "thinking": {"ollama": "thinking", "openai": "thinking_under_both_names", "anthropic": "thinking"},
    "thinking, levels": {
        "ollama": "think_levels_reach_the_template",
        "openai": "reasoning_effort_reaches_the_template",
    },
    "schema": {"ollama": "schema", "openai": "schema", "anthropic": "schema"},
    "schema streamed, JSON": {"ollama": "schema_streamed", "openai": "schema_streamed_and_json_object"},
    "JSON": {"ollama": "json"},
    "images": {"ollama": "chat_with_an_image", "openai": "chat_with_an_image", "anthropic": "with_an_image"},
    "images, other routes": {"ollama": "generate_with_an_image", "openai": "responses_with_an_image"},
    "logprobs": {"ollama": "logprobs", "openai": "several_answers_and_logprobs"},
    "logprobs streamed": {"ollama": "logprobs_streamed_and_of_a_text", "openai": "logprobs_streamed"},
    "stop sequences": {"anthropic": "stop_sequences"},
    "suffix": {"ollama": "suffix", "openai": "suffix"},
    "embeddings": {"ollama": "embed", "openai": "completions_and_embeddings"},
    "tokens, infill": {
        "openai": "client_on_the_routes_of_llama_server",
        "anthropic": "counting_and_errors",
    },
    "models, errors": {
        "ollama": "list_show_load",
        "openai": "models_and_errors",
        "anthropic": "counting_and_errors",
    },
    "keep_alive": {"ollama": "keep_alive"},
    "keep_alive, wrong": {"ollama": "keep_alive_that_is_none"},
}
"""Feature → client → rest of the test's name. A client without the feature is absent."""


def cell(feature: str, client: str) -> str:
    """The test's name; empty if there is none."""
    rest = TABLE[feature].get(client, "")
    return COLUMNS[client] + rest if rest else ""


def table_lines(outcomes: Mapping[str, Sequence[str]]) -> list[str]:
    """The lines of the table. ``outcomes``: test → outcome of each run."""
    width = max(map(len, TABLE))
    lines = [" " * width + "".join(f"{client:>16}" for client in COLUMNS)]
    for feature in TABLE:
        cells = (_summary(outcomes, cell(feature, client)) for client in COLUMNS)
        lines.append(f"{feature:{width}}" + "".join(f"{text:>16}" for text in cells))
    return lines


def _summary(outcomes: Mapping[str, Sequence[str]], test: str) -> str:
    if not test:
        return "-"
    results = outcomes.get(test, ())
    passed = sum(result == "passed" for result in results)
    if not results:
        return "NOT RUN"
    return f"{passed} passed" if passed == len(results) else f"{len(results) - passed} of {len(results)} NOT"
