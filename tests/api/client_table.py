"""Client × feature: which test is the cell. Each is run on every way to an answer, streamed and not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

COLUMNS = {"ollama": "test_ollama_", "openai": "test_openai_", "anthropic": "test_anthropic_"}
"""Client → what the names of its tests begin with."""

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
"""Feature → client → the rest of the test's name; a client that is not there has no such feature."""


def cell(feature: str, client: str) -> str:
    """The name of the test; empty where there is none."""
    rest = TABLE[feature].get(client, "")
    return COLUMNS[client] + rest if rest else ""


def shown(outcomes: Mapping[str, Sequence[str]]) -> list[str]:
    """The table as lines. ``outcomes``: test → how each run of it ended."""
    width = max(map(len, TABLE))
    lines = [" " * width + "".join(f"{client:>16}" for client in COLUMNS)]
    for feature in TABLE:
        cells = (_told(outcomes, cell(feature, client)) for client in COLUMNS)
        lines.append(f"{feature:{width}}" + "".join(f"{told:>16}" for told in cells))
    return lines


def _told(outcomes: Mapping[str, Sequence[str]], test: str) -> str:
    if not test:
        return "-"
    ends = outcomes.get(test, ())
    good = sum(end == "passed" for end in ends)
    if not ends:
        return "NOT RUN"
    return f"{good} passed" if good == len(ends) else f"{len(ends) - good} of {len(ends)} NOT"
