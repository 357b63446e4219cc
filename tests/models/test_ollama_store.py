"""Models in Ollama's stores."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sollold.models.stores import ollama_store
from sollold.models.stores.permission_hint import permission_hint, whoami
from sollold.models.stores.scan_result import FoundModel
from tests.models.stores import OllamaStore, shut, write_gguf


@pytest.fixture
def store(tmp_path: Path) -> OllamaStore:
    return OllamaStore(tmp_path / "store")


def found(store: OllamaStore) -> dict[str, FoundModel]:
    return {model.name: model for model in ollama_store.scan(store.root).found}


def test_names_are_read_from_the_manifest_paths(store: OllamaStore, tmp_path: Path) -> None:
    store.model("llama3.1:70b", tmp_path)
    store.model("mike/mario:latest", tmp_path)
    store.model("hf.co/user/Repo-GGUF:Q4_K_M", tmp_path)
    assert set(found(store)) == {"llama3.1:70b", "mike/mario:latest", "hf.co/user/Repo-GGUF:Q4_K_M"}


def test_layers_are_read(store: OllamaStore, tmp_path: Path) -> None:
    extra = [
        store.layer("template", b"{{ .System }}{{ .Tools }}{{ .Prompt }}"),
        store.layer("system", b"You are Mario."),
        store.layer("params", b'{"stop":["<|end|>"],"temperature":0.5}'),
        store.layer("license", b"MIT"),
        store.layer("license", b"and more"),
        store.layer("projector", b"GGUF projector"),
        store.layer("adapter", b"GGUF adapter"),
    ]
    manifest = store.model("mario:latest", tmp_path, extra=extra)
    model = found(store)["mario:latest"]
    assert model.template == "{{ .System }}{{ .Tools }}{{ .Prompt }}"
    assert model.system == "You are Mario."
    assert json.loads(model.params) == {"stop": ["<|end|>"], "temperature": 0.5}
    assert model.license == "MIT\n\nand more"
    assert model.projector == str(store.path(extra[5]))
    assert model.adapters == (str(store.path(extra[6])),)
    assert model.modified == manifest.stat().st_mtime
    assert len(model.manifest) == 64
    assert model.unusable == ""


@pytest.mark.parametrize("kind", ["system", "template", "license"])
def test_a_link_in_place_of_a_text_publishes_no_other_file(
    store: OllamaStore, tmp_path: Path, kind: str
) -> None:
    """Another user may own the store, and the texts are shown to everybody."""
    secret = tmp_path / "keyring"
    secret.write_text("a secret of the daemon")
    layer = store.layer(kind, b"harmless")
    store.path(layer).unlink()
    store.path(layer).symlink_to(secret)
    store.model("mario:latest", tmp_path, extra=[layer])
    assert getattr(found(store)["mario:latest"], kind) == ""


def test_a_text_may_be_a_link_and_long(store: OllamaStore, tmp_path: Path) -> None:
    layer = store.layer("license", b"MIT " * 200_000)
    moved = store.path(layer).rename(tmp_path / "license")
    store.path(layer).symlink_to(moved)
    store.model("mario:latest", tmp_path, extra=[layer])
    assert found(store)["mario:latest"].license.startswith("MIT MIT")


def test_a_manifest_with_thousands_of_licenses_takes_little_memory(
    store: OllamaStore, tmp_path: Path
) -> None:
    store.model("wordy:latest", tmp_path, extra=[store.layer("license", b"x" * 100_000)] * 3000)
    assert len(found(store)["wordy:latest"].license) < 2_000_000


def test_old_blob_names_are_read(store: OllamaStore, tmp_path: Path) -> None:
    content = write_gguf(tmp_path / "x.gguf").read_bytes()
    layers = [store.layer("model", content, old=True), store.layer("prompt", b"{{ .Prompt }}", old=True)]
    store.manifest("old:latest", layers)
    model = found(store)["old:latest"]
    assert Path(model.files[0]).name.startswith("sha256:")
    assert model.template == "{{ .Prompt }}"
    assert model.unusable == ""


def test_cloud_and_safetensors_models_are_recognized(store: OllamaStore, tmp_path: Path) -> None:
    store.manifest("big:120b-cloud", [])
    store.manifest("far:latest", [], {"remote_host": "https://ollama.com:443", "remote_model": "far"})
    store.manifest("mlx:latest", [store.layer("tensor", b"x")], {"model_format": "safetensors"})
    models = found(store)
    assert models["big:120b-cloud"].format == "cloud"
    assert "cloud" in models["far:latest"].unusable
    assert models["mlx:latest"].format == "safetensors"


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"layers": 3}', b'{"layers":[{"digest":5}]}', b'{"x":' + b"[" * 5000],
)
def test_a_model_with_a_damaged_manifest_is_listed_as_unusable(
    store: OllamaStore, tmp_path: Path, raw: bytes
) -> None:
    store.model("bad:latest", tmp_path).write_bytes(raw)
    model = found(store)["bad:latest"]
    assert "ollama pull bad:latest" in model.unusable


@pytest.mark.parametrize("params", [b'{"stop":' + b"[" * 5000, b'{"temperature": NaN}', b'{"top_p": 1e999}'])
def test_invalid_parameters_are_ignored(store: OllamaStore, tmp_path: Path, params: bytes) -> None:
    store.model("odd:latest", tmp_path, extra=[store.layer("params", params)])
    assert found(store)["odd:latest"].params == "{}"


def test_messages_are_read_and_the_template_only_without_a_renderer(
    store: OllamaStore, tmp_path: Path
) -> None:
    messages = [
        store.layer("messages", b'[{"role":"user","content":"hi"},{"role":"assistant","content":"yo"}]')
    ]
    template = store.layer("template", b"{{ .Prompt }}")
    store.model("told:latest", tmp_path, extra=[*messages, template])
    store.model("odd:latest", tmp_path, extra=[store.layer("messages", b'{"role": 1}')])
    assert found(store)["told:latest"].messages == (("user", "hi"), ("assistant", "yo"))
    assert found(store)["told:latest"].template == "{{ .Prompt }}"
    assert found(store)["odd:latest"].messages == ()
    layer = store.layer("model", write_gguf(tmp_path / "x.gguf").read_bytes())
    store.manifest("drawn:latest", [layer, template], config={"model_format": "gguf", "renderer": "qwen3"})
    assert found(store)["drawn:latest"].template == "", "the renderer replaces the template"


def test_a_model_with_a_missing_blob_is_listed_as_unusable(store: OllamaStore, tmp_path: Path) -> None:
    layer = store.layer("model", write_gguf(tmp_path / "x.gguf").read_bytes())
    store.manifest("gone:latest", [layer])
    store.path(layer).unlink()
    assert "missing" in found(store)["gone:latest"].unusable


def test_a_path_in_place_of_a_digest_is_not_followed(store: OllamaStore) -> None:
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": "../../../etc/passwd", "size": 3}
    store.manifest("evil:latest", [layer])
    assert found(store)["evil:latest"].files == ()


def test_stray_files_and_folders_are_ignored(store: OllamaStore, tmp_path: Path) -> None:
    store.model("fine:latest", tmp_path)
    manifests = store.root / "manifests"
    (manifests / "file-at-the-top").write_text("x")
    (manifests / "registry.ollama.ai" / "library" / "empty").mkdir()
    (manifests / "registry.ollama.ai" / "library" / "fine" / "latest.d").mkdir()
    (manifests / "registry.ollama.ai" / "library" / "fine" / ".DS_Store").write_text("x")
    assert set(found(store)) == {"fine:latest"}


def test_a_missing_store_is_empty_until_it_is_created(tmp_path: Path) -> None:
    scan = ollama_store.scan(tmp_path / "nothing")
    assert scan.found == []
    assert scan.problems == []
    assert not scan.changed()
    (tmp_path / "nothing" / "manifests").mkdir(parents=True)
    assert scan.changed()


def test_a_scan_does_not_change_the_store(store: OllamaStore, tmp_path: Path) -> None:
    store.model("a:latest", tmp_path)
    before = sorted((str(path), path.stat().st_mtime_ns) for path in store.root.rglob("*"))
    ollama_store.scan(store.root)
    assert sorted((str(path), path.stat().st_mtime_ns) for path in store.root.rglob("*")) == before


def test_changes_of_the_store_are_noticed(store: OllamaStore, tmp_path: Path) -> None:
    manifest = store.model("a:latest", tmp_path)
    scan = ollama_store.scan(store.root)
    assert not scan.changed()
    manifest.write_text(manifest.read_text() + "\n")
    assert scan.changed()
    scan = ollama_store.scan(store.root)
    store.model("a:other", tmp_path)
    assert scan.changed()


def test_invalid_names_are_a_problem_and_hide_no_other_model(store: OllamaStore, tmp_path: Path) -> None:
    store.model("fine:latest", tmp_path)
    store.model("fine:latest~", tmp_path, seed=1)
    store.model("my models/odd:latest", tmp_path, seed=2)
    scan = ollama_store.scan(store.root)
    assert [model.name for model in scan.found] == ["fine:latest"]
    (problem,) = scan.problems
    assert "and 1 more" in problem.what
    assert "latest~" in problem.what or "my models" in problem.what


def test_too_many_models_are_a_problem(
    store: OllamaStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tag in "abc":
        store.model(f"a:{tag}", tmp_path)
    monkeypatch.setattr(ollama_store, "_MAX_MODELS", 2)
    scan = ollama_store.scan(store.root)
    assert len(scan.found) == 2
    assert ["has 3 models" in problem.what for problem in scan.problems] == [True]


def test_unreadable_blobs_make_the_model_unusable(
    store: OllamaStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.model("a:latest", tmp_path)
    shut(monkeypatch, store.root / "blobs")
    model = found(store)["a:latest"]
    assert "can't be read. Run: " in model.unusable
    assert f"{store.root}/blobs" in model.unusable


def test_a_folder_without_search_permission_is_a_problem(
    store: OllamaStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.model("shut:latest", tmp_path)
    folder = store.root / "manifests" / "registry.ollama.ai" / "library" / "shut"
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and real(path, mode))
    scan = ollama_store.scan(store.root)
    assert [str(folder) in problem.fix for problem in scan.problems] == [True]
    assert scan.found == []


class TestRoots:
    def test_folders_of_the_settings_replace_the_others(self, tmp_path: Path) -> None:
        roots = ollama_store.roots([str(tmp_path)], environ={"OLLAMA_MODELS": "/elsewhere"}, home=tmp_path)
        assert roots == (tmp_path,)

    def test_the_order_of_the_default_folders(self, tmp_path: Path) -> None:
        unit = tmp_path / "ollama.service"
        unit.write_text(
            "[Service]\nUser=nobody-such\n"
            'Environment="PATH=/bin" "OLLAMA_MODELS=/srv/my models"\nExecStart=/usr/bin/ollama serve\n'
        )
        roots = ollama_store.roots(
            environ={"OLLAMA_MODELS": "/env"}, home=tmp_path, units=[str(unit)], homes=["/usr/share/ollama"]
        )
        assert roots == (
            Path("/srv/my models"),
            Path("/env"),
            Path("/usr/share/ollama/.ollama/models"),
            tmp_path / ".ollama/models",
        )

    def test_drop_ins_and_environment_files_of_the_unit_are_read(self, tmp_path: Path) -> None:
        unit = tmp_path / "ollama.service"
        unit.write_text(f"[Service]\nEnvironment=OLLAMA_MODELS=/one\nEnvironmentFile=-{tmp_path}/none\n")
        dropins = tmp_path / "ollama.service.d"
        dropins.mkdir()
        (tmp_path / "env").write_text("# comment\nOLLAMA_MODELS=/two\n")
        (dropins / "override.conf").write_text(f"[Service]\nEnvironmentFile={tmp_path}/env\n")
        roots = ollama_store.roots(environ={}, home=tmp_path, units=[str(unit)], homes=[])
        assert roots[0] == Path("/two")

    def test_each_folder_is_listed_once(self, tmp_path: Path) -> None:
        roots = ollama_store.roots([str(tmp_path / "real"), f"{tmp_path}/./real/", str(tmp_path / "other")])
        assert roots == (tmp_path / "real", tmp_path / "other")


class TestPermissionHint:
    @pytest.fixture
    def models(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr("shutil.which", lambda name: None)
        models = tmp_path / "home of alice" / ".ollama" / "models"
        (models / "blobs").mkdir(parents=True)
        return models

    def shut(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        """Make ``os.access`` refuse a folder and everything below it."""
        real = os.access
        monkeypatch.setattr(
            os, "access", lambda path, mode: not Path(path).is_relative_to(folder) and real(path, mode)
        )

    def test_a_closed_home_gets_only_search_permission(
        self, models: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home = models.parents[1]
        self.shut(monkeypatch, home)
        assert permission_hint(models / "manifests", models) == (
            f"sudo chmod o+x '{home}' '{home}/.ollama' && sudo chmod -R o+rX '{models}'"
        )

    def test_access_lists_grant_access_only_to_the_daemons_user(
        self, models: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
        home, user = models.parents[1], whoami()
        self.shut(monkeypatch, home)
        assert permission_hint(models / "manifests", models) == (
            f"sudo setfacl -m u:{user}:x '{home}' '{home}/.ollama' && "
            f"sudo setfacl -R -m u:{user}:rX '{models}'"
        )

    def test_only_the_closed_folder_of_models_is_opened(
        self, models: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.shut(monkeypatch, models / "blobs")
        blob = models / "blobs" / "sha256-0"
        assert permission_hint(blob, models) == f"sudo chmod -R o+rX '{models}/blobs'"
        assert "home of alice'" not in permission_hint(models / "blobs", models)

    def test_only_the_closed_blob_is_opened(self, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        blob = models / "blobs" / "sha256-0"
        blob.write_bytes(b"x")
        self.shut(monkeypatch, blob)
        assert permission_hint(blob, models) == f"sudo chmod -R o+rX '{blob}'"
