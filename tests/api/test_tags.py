"""Lists and details of models, and facts that come from Ollama."""

from __future__ import annotations

from sollold.api.ollama.models import ps, show, tags, with_settings
from sollold.cluster.gossip.record import Backend, Endpoint, State
from sollold.control.models import Running
from sollold.models.listing import Listed
from tests.api.api_parts import model


def names(listed: Listed) -> list[str]:
    return list(listed.nodes)


FROM_OLLAMA = model("x:latest", manifest="a" * 64, listed_size=777, parent="base:latest", width=64)
BROKEN = model("broken:latest", unusable="The file is truncated.")


def test_unusable_models_are_listed_only_on_request() -> None:
    models = [Listed(FROM_OLLAMA, ("n",)), Listed(BROKEN, ("n",))]
    assert [entry["name"] for entry in tags(models, names)["models"]] == ["x:latest"]
    shown = {entry["name"]: entry for entry in tags(models, names, unusable=True)["models"]}
    assert shown["broken:latest"]["unusable"] == "The file is truncated."


def test_digest_size_and_details_of_a_model_in_ollama_are_ollamas() -> None:
    (shown,) = tags([Listed(FROM_OLLAMA, ("n",))], names)["models"]
    assert (shown["digest"], shown["size"]) == ("a" * 64, 777)
    assert shown["details"]["parent_model"] == "base:latest"
    assert shown["details"]["embedding_length"] == 64
    assert "context_length" in shown["details"]
    endpoint = Endpoint("d", "x:latest", FROM_OLLAMA.digest, Backend.LOCAL, State.READY, loaded=True)
    (loaded,) = ps([Running(endpoint, "n")], [Listed(FROM_OLLAMA, ("n",))], 0.0)["models"]
    assert loaded["digest"] == "a" * 64


def test_a_model_without_a_chat_template_has_a_note() -> None:
    bare = Listed(model("bare:latest", template="{{ .Prompt }}"), ("n",))
    (shown,) = tags([bare], names)["models"]
    assert "no chat template" in shown["note"]
    assert "no chat template" in show(bare, names, {}, verbose=False)["note"]
    assert "note" not in show(Listed(FROM_OLLAMA, ("n",)), names, {}, verbose=False)


def test_a_plain_file_has_the_digest_of_its_content() -> None:
    plain = model("y:latest")
    (shown,) = tags([Listed(plain, ("n",))], names)["models"]
    assert (shown["digest"], shown["size"]) == (plain.digest, plain.size)


def test_show_has_a_complete_modelfile() -> None:
    """Clients copy the Modelfile and read its messages."""
    described = model(
        projector="/m/p.gguf",
        adapters=("/m/a.gguf",),
        template="[{{ .Prompt }}]",
        system="S",
        params='{"stop":["x"]}',
        license="MIT",
        messages=(("user", "Hi"), ("assistant", "Arr!")),
    )
    shown = show(Listed(described, ("n",)), names, {}, verbose=False)
    assert shown["messages"] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Arr!"}]
    assert shown["modelfile"].splitlines()[1:] == [
        f"FROM {described.files[0]}",
        "FROM /m/p.gguf",
        "ADAPTER /m/a.gguf",
        'TEMPLATE """[{{ .Prompt }}]"""',
        'SYSTEM """S"""',
        'PARAMETER stop "x"',
        'LICENSE """MIT"""',
        'MESSAGE user """Hi"""',
        'MESSAGE assistant """Arr!"""',
    ]
    assert "messages" not in show(Listed(FROM_OLLAMA, ("n",)), names, {}, verbose=False)


def test_the_projector_is_separate_and_floats_are_short() -> None:
    header = {
        "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
        "llama.rope.freq_base": 500000.0,
        "llama.odd": 1 / 3,
        "clip.vision.embedding_length": 64,
        "clip.parameter_count": 188_000,
    }
    shown = show(Listed(FROM_OLLAMA, ("n",)), names, header, verbose=False)
    info = shown["model_info"]
    assert info["llama.attention.layer_norm_rms_epsilon"] == 1e-05
    assert (info["llama.rope.freq_base"], info["llama.odd"]) == (500000.0, 1 / 3)
    assert shown["projector_info"] == {
        "clip.vision.embedding_length": 64,
        "general.architecture": "clip",
        "general.parameter_count": 188_000,
    }
    assert not [key for key in info if key.startswith("clip.")]
    assert "projector_info" not in show(Listed(FROM_OLLAMA, ("n",)), names, {}, verbose=False)


def test_settings_of_a_session_are_shown_with_the_model() -> None:
    """The ollama command requests this before it saves a session."""
    configured = model(system="S", params='{"stop":["x"],"top_k":3}')
    shown = show(
        Listed(with_settings(configured, "Be brief.", {"top_k": 5, "seed": 1}), ("n",)),
        names,
        {},
        verbose=False,
    )
    assert shown["system"] == "Be brief."
    assert shown["modelfile"].splitlines()[2:] == [
        'SYSTEM """Be brief."""',
        'PARAMETER stop "x"',
        "PARAMETER top_k 5",
        "PARAMETER seed 1",
    ]
    assert with_settings(configured, None, None) == configured
