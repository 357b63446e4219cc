"""Lists of models: what is in them, and what of it is Ollama's own."""

from __future__ import annotations

from sollold.api.ollama.models import ps, show, tags
from sollold.cluster.gossip.record import Backend, Endpoint, State
from sollold.control.models import Running
from sollold.models.listing import Listed
from tests.api.api_parts import model


def names(listed: Listed) -> list[str]:
    return list(listed.nodes)


OLLAMAS = model("x:latest", manifest="a" * 64, listed_size=777, parent="base:latest", width=64)
BROKEN = model("broken:latest", unusable="The file is truncated.")


def test_what_can_not_be_run_is_left_out_unless_asked_for() -> None:
    models = [Listed(OLLAMAS, ("n",)), Listed(BROKEN, ("n",))]
    assert [one["name"] for one in tags(models, names)["models"]] == ["x:latest"]
    shown = {one["name"]: one for one in tags(models, names, unusable=True)["models"]}
    assert shown["broken:latest"]["unusable"] == "The file is truncated."


def test_digest_size_and_details_of_an_ollamas_model_are_its_own() -> None:
    (shown,) = tags([Listed(OLLAMAS, ("n",))], names)["models"]
    assert (shown["digest"], shown["size"]) == ("a" * 64, 777)
    assert shown["details"]["parent_model"] == "base:latest"
    assert shown["details"]["embedding_length"] == 64
    assert "context_length" in shown["details"]
    endpoint = Endpoint("d", "x:latest", OLLAMAS.digest, Backend.LOCAL, State.READY, loaded=True)
    (loaded,) = ps([Running(endpoint, "n")], [Listed(OLLAMAS, ("n",))], 0.0)["models"]
    assert loaded["digest"] == "a" * 64


def test_a_model_without_a_chat_template_says_so() -> None:
    bare = Listed(model("bare:latest", template="{{ .Prompt }}"), ("n",))
    (shown,) = tags([bare], names)["models"]
    assert "no chat template" in shown["note"]
    assert "no chat template" in show(bare, names, {}, verbose=False)["note"]
    assert "note" not in show(Listed(OLLAMAS, ("n",)), names, {}, verbose=False)


def test_a_plain_file_is_told_by_its_content() -> None:
    plain = model("y:latest")
    (shown,) = tags([Listed(plain, ("n",))], names)["models"]
    assert (shown["digest"], shown["size"]) == (plain.digest, plain.size)
