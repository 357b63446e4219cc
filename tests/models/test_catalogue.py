"""The catalogue of a node's models."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sollold.models.gguf import reader
from sollold.models.model import Model
from sollold.models.names import parse
from sollold.models.stores import folders, header_facts, scan_result
from sollold.models.stores.catalogue import Catalogue
from sollold.models.stores.header_facts import HeaderFacts
from sollold.models.stores.name_owners import NameOwners, name_with_digest
from sollold.models.stores.scan_result import Scan
from sollold.models.stores.threads import in_own_thread
from sollold.settings.schema import ModelSettings
from tests.doubles import until
from tests.gguf.projector import write as write_projector
from tests.gguf.size import Size
from tests.gguf.writer import write as write_model
from tests.models.stores import OllamaStore, hub_file, hub_repository, write_gguf

Make = Callable[..., Catalogue]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    made: list[Catalogue] = []

    def make_catalogue(**options: Any) -> Catalogue:
        settings = options.pop("settings", None) or ModelSettings(
            folders=(str(tmp_path / "folder"),), ollama_stores=(str(tmp_path / "store"),)
        )
        catalogue = Catalogue(
            settings, tmp_path / "state", environ={}, home=tmp_path / "home", interval=0.02, **options
        )
        made.append(catalogue)
        return catalogue

    yield make_catalogue
    for catalogue in made:
        await catalogue.close()


def named(catalogue: Catalogue) -> dict[str, Model]:
    return {model.name: model for model in catalogue.models}


def targets(model: Model) -> list[str]:
    return [os.path.realpath(file) for file in model.files]


async def test_a_models_facts_are_read_from_its_header(make: Make, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "folder" / "Tiny-F16.gguf")
    catalogue = make()
    await catalogue.start()
    model = named(catalogue)["Tiny:F16"]
    assert model.files == (str(path),)
    assert (model.architecture, model.layers, model.context_train) == ("llama", 1, 4096)
    assert model.parameters == 3 * 32 * 32
    assert model.quantization == "F16"
    assert model.size == path.stat().st_size
    assert model.capabilities == ("completion", "tools")
    assert model.unusable == ""
    assert len((await catalogue.shape("Tiny:F16")).layers) == 1
    assert (await catalogue.metadata("Tiny:F16"))["llama.block_count"] == 1


async def test_equal_content_has_the_same_digest_in_all_stores(make: Make, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "folder" / "Tiny-F16.gguf", seed=7)
    store = OllamaStore(tmp_path / "store")
    store.model("tiny:f16", tmp_path, seed=7)
    store.model("other:latest", tmp_path, seed=8)
    snapshot = hub_repository(tmp_path / "home/.cache/huggingface/hub", "o/Tiny-GGUF")
    hub_file(snapshot, "x-F16.gguf", path.read_bytes())
    catalogue = make()
    await catalogue.start()
    models = named(catalogue)
    assert models["tiny:f16"].digest == models["hf.co/o/Tiny-GGUF:F16"].digest
    assert models["other:latest"].digest != models["tiny:f16"].digest
    assert "Tiny:F16" not in models, "the same name and content is listed once"


async def test_other_content_under_a_taken_name_is_listed_with_a_suffix(make: Make, tmp_path: Path) -> None:
    write_gguf(tmp_path / "folder" / "tiny-F16.gguf", seed=1)
    OllamaStore(tmp_path / "store").model("tiny:F16", tmp_path, seed=2)
    catalogue = make()
    await catalogue.start()
    (first, second) = catalogue.models
    assert first.name == "tiny:F16"
    assert first.source == "ollama"
    assert second.name == "tiny:F16-folder"
    (problem,) = catalogue.problems
    assert "folder/tiny-F16.gguf has different content and is listed as tiny:F16-folder" in problem.what


async def test_a_model_keeps_its_name_when_another_claims_it(make: Make, tmp_path: Path) -> None:
    write_gguf(tmp_path / "folder" / "tiny-F16.gguf", seed=1)
    catalogue = make()
    await catalogue.start()
    (first,) = catalogue.models
    OllamaStore(tmp_path / "store").model("Tiny:f16", tmp_path, seed=2)
    await catalogue.refresh()
    assert catalogue.get("tiny:F16") == catalogue.get("TINY:f16") == first
    (newcomer,) = [model for model in catalogue.models if model != first]
    assert newcomer.name == f"Tiny:f16-{newcomer.digest[:8]}", (
        "models of Ollama stores are distinguished by their digest"
    )
    await catalogue.close()
    restarted = make()
    await restarted.start()
    assert restarted.models == catalogue.models, "after a restart"
    (tmp_path / "folder" / "tiny-F16.gguf").unlink()
    await restarted.refresh()
    assert [model.name for model in restarted.models] == ["Tiny:f16"], (
        "the name of a removed model is free again"
    )


async def test_a_damaged_file_of_name_owners_is_ignored(make: Make, tmp_path: Path) -> None:
    write_gguf(tmp_path / "folder" / "tiny-F16.gguf", seed=1)
    for text in ("", "[]", '{"a": 1}'):
        catalogue = make()
        (catalogue._owners._path).parent.mkdir(parents=True, exist_ok=True)
        catalogue._owners._path.write_text(text)
        await catalogue.start()
        assert [model.name for model in catalogue.models] == ["tiny:F16"]
        await catalogue.close()


async def test_a_projector_of_another_width_is_not_paired(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_model(folder / "eyes.gguf", "llama", Size(layers=1))
    width = reader.read(folder / "eyes.gguf").integer("llama.embedding_length")
    for projected, paired in ((width, True), (width * 2, False)):
        catalogue = make()
        write_projector(folder / "mmproj-eyes.gguf", projected)
        await catalogue.start()
        (model,) = catalogue.models
        assert (bool(model.projector), "vision" in model.capabilities) == (paired, paired)
        assert (model.unusable, model.width) == ("", width)
        keys = {key for key in await catalogue.metadata(model.name) if key.startswith("clip.")}
        assert ({"clip.vision.embedding_length", "clip.parameter_count"} <= keys) == paired == bool(keys)
        await catalogue.close()


async def test_a_corrupt_file_is_listed_with_the_reason(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    whole = write_gguf(folder / "good.gguf").read_bytes()
    (folder / "cut.gguf").write_bytes(whole[:-500])
    (folder / "text.gguf").write_bytes(b"this is no model")
    (folder / "empty.gguf").write_bytes(b"")
    (folder / "dangling.gguf").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.gguf")
    catalogue = make()
    async with asyncio.timeout(10):
        await catalogue.start()
    models = named(catalogue)
    assert models["good:latest"].unusable == ""
    assert "truncated" in models["cut:latest"].unusable
    for name in ("text", "empty", "dangling", "pipe"):
        assert models[f"{name}:latest"].unusable, name
    with pytest.raises(LookupError, match="truncated"):
        await catalogue.shape("cut:latest")


@pytest.mark.parametrize("suffix", [".aria2", ".st"])
async def test_a_file_of_full_size_is_unusable_until_its_download_is_complete(
    make: Make, tmp_path: Path, suffix: str
) -> None:
    path = write_gguf(tmp_path / "folder" / "m.gguf")
    state = path.with_name(path.name + suffix)
    state.touch()
    catalogue = make()
    await catalogue.start()
    assert str(state) in catalogue.models[0].unusable
    state.unlink()
    await until(lambda: not catalogue.models[0].unusable)


@pytest.mark.parametrize("damage", [b"", b"this is no model", None])
async def test_the_damaged_file_of_a_split_model_is_named(
    make: Make, tmp_path: Path, damage: bytes | None
) -> None:
    for number, tensor in enumerate(("token_embd.weight", "output.weight"), 1):
        split = {"split.no": number - 1, "split.count": 2, "split.tensors.count": 2}
        path = tmp_path / "folder" / f"big-{number:05}-of-00002.gguf"
        write_gguf(path, metadata=split, tensors=(tensor,))
    path.write_bytes(path.read_bytes()[:-500] if damage is None else damage)
    catalogue = make()
    await catalogue.start()
    assert str(path) in named(catalogue)["big:latest"].unusable


async def test_a_header_with_wrong_types_does_not_hide_other_models(make: Make, tmp_path: Path) -> None:
    write_gguf(tmp_path / "folder" / "odd.gguf", metadata={"llama.block_count": True})
    write_gguf(tmp_path / "folder" / "long.gguf", metadata={"llama.context_length": True}, seed=1)
    write_gguf(tmp_path / "folder" / "fine.gguf", seed=2)
    catalogue = make()
    await catalogue.start()
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(catalogue.models), type=tuple[Model, ...])
    assert len(decoded) == 3, "other nodes must be able to decode the list"


async def test_numbers_beyond_64_bits_in_a_manifest_do_not_hide_other_models(
    make: Make, tmp_path: Path
) -> None:
    store = OllamaStore(tmp_path / "store")
    store.model("fine:latest", tmp_path)
    weights = store.layer("model", write_gguf(tmp_path / "x.gguf", seed=1).read_bytes())
    store.manifest("huge:latest", [weights, {**store.layer("license", b"MIT"), "size": 10**30}])
    store.manifest("sum:latest", [weights, *[{**store.layer("license", b"MIT"), "size": 2**63 - 1}] * 3])
    store.manifest("long:latest", [], {"model_format": "safetensors", "context_length": 10**30})
    catalogue = make()
    await catalogue.start()
    assert named(catalogue).keys() == {"fine:latest", "huge:latest", "sum:latest", "long:latest"}
    assert "damaged" in named(catalogue)["huge:latest"].unusable
    assert msgspec.msgpack.encode(catalogue.models)


async def test_a_file_name_in_another_encoding_does_not_hide_other_models(make: Make, tmp_path: Path) -> None:
    write_gguf(tmp_path / "folder" / "fine.gguf")
    write_gguf(tmp_path / "folder" / os.fsdecode(b"mod\xe8le-F16.gguf"))
    OllamaStore(tmp_path / "store").model(os.fsdecode(b"caf\xe9:latest"), tmp_path)
    catalogue = make()
    await catalogue.start()
    models = named(catalogue)
    assert set(models) == {"fine:latest", "mod-le:F16"}
    assert "rename it" in models["mod-le:F16"].unusable
    assert msgspec.json.encode([(problem.what, problem.fix) for problem in catalogue.problems])


async def test_split_blobs_get_shard_names_by_links(make: Make, tmp_path: Path) -> None:
    store = OllamaStore(tmp_path / "store")
    layers = []
    for number, tensor in enumerate(("token_embd.weight", "output.weight")):
        split = {"split.no": number, "split.count": 2, "split.tensors.count": 2}
        path = write_gguf(tmp_path / "x.gguf", metadata=split, tensors=(tensor,))
        layers.append(store.layer("model", path.read_bytes()))
    store.manifest("split:latest", layers[::-1])
    before = sorted(store.root.rglob("*"))
    catalogue = make()
    await catalogue.start()
    model = named(catalogue)["split:latest"]
    assert [Path(file).name for file in model.files] == [
        "model-00001-of-00002.gguf",
        "model-00002-of-00002.gguf",
    ]
    assert targets(model) == [str(store.path(layer)) for layer in layers]
    assert all(Path(file).is_relative_to(tmp_path / "state") for file in model.files)
    assert sorted(store.root.rglob("*")) == before
    assert model.parameters == 2 * 32 * 32


async def test_the_last_model_layer_of_a_manifest_is_used(make: Make, tmp_path: Path) -> None:
    store = OllamaStore(tmp_path / "store")
    layers = [store.layer("model", write_gguf(tmp_path / "x.gguf", seed=k).read_bytes()) for k in (1, 2)]
    store.manifest("two:latest", layers)
    catalogue = make()
    await catalogue.start()
    assert named(catalogue)["two:latest"].files == (str(store.path(layers[1])),)


async def test_projectors_and_adapters_are_not_listed_as_models(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write_gguf(folder / "see-F16.gguf")
    write_gguf(folder / "mmproj-see.gguf", architecture="clip", metadata={"general.type": "mmproj"})
    write_gguf(folder / "lora.gguf", metadata={"general.type": "adapter", "adapter.type": "lora"})
    catalogue = make()
    await catalogue.start()
    (model,) = catalogue.models
    assert model.projector == str(folder / "mmproj-see.gguf")
    assert "vision" in model.capabilities


async def test_capabilities_follow_the_architecture_and_the_template(make: Make, tmp_path: Path) -> None:
    write_gguf(
        tmp_path / "folder" / "embed.gguf", architecture="nomic-bert", metadata={"nomic-bert.pooling_type": 1}
    )
    store = OllamaStore(tmp_path / "store")
    template = store.layer("template", b"{{ .Suffix }}{{ if .Think }}{{ end }}")
    store.model("coder:latest", tmp_path, extra=[template])
    catalogue = make()
    await catalogue.start()
    models = named(catalogue)
    assert models["embed:latest"].capabilities == ("embedding",)
    assert set(models["coder:latest"].capabilities) == {"completion", "tools", "insert", "thinking"}


async def test_models_that_only_ollama_can_run_are_marked(make: Make, tmp_path: Path) -> None:
    store = OllamaStore(tmp_path / "store")
    store.model("gptoss:20b", tmp_path, architecture="gptoss")
    store.model("see:latest", tmp_path, tensors=("token_embd.weight", "v.patch_embd.weight"))
    store.manifest("mlx:latest", [store.layer("tensor", b"x")], {"model_format": "safetensors"})
    catalogue = make()
    await catalogue.start()
    models = named(catalogue)
    assert "gpt-oss" in models["gptoss:20b"].only_ollama
    assert "v.patch_embd.weight" in models["see:latest"].only_ollama
    assert "safetensors" in models["mlx:latest"].only_ollama


async def test_headers_are_read_once(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "folder" / "a.gguf")
    reads: list[tuple[str, ...]] = []
    real = header_facts.read_facts

    def record_read(files: tuple[str, ...]) -> HeaderFacts:
        reads.append(files)
        return real(files)

    monkeypatch.setattr(header_facts, "read_facts", record_read)
    first = make()
    await first.start()
    await first.refresh()
    await first.close()
    second = make()
    await second.start()
    assert second.models == first.models
    assert len(reads) == 1
    write_gguf(tmp_path / "folder" / "a.gguf", seed=5)
    await second.refresh()
    assert len(reads) == 2


@pytest.mark.parametrize("raw", [b'[3, {"x": 1}]', b'{"\xff": "', b"[" * 5000])
async def test_a_damaged_cache_is_ignored(make: Make, tmp_path: Path, raw: bytes) -> None:
    write_gguf(tmp_path / "folder" / "a.gguf")
    (tmp_path / "state").mkdir()
    for name in ("headers.json", "refused.json"):
        (tmp_path / "state" / name).write_bytes(raw)
    catalogue = make()
    await catalogue.start()
    assert len(catalogue.models) == 1


async def test_changes_of_the_stores_are_noticed(make: Make, tmp_path: Path) -> None:
    catalogue = make()
    await catalogue.start()
    seen: list[int] = []
    catalogue.subscribe(lambda: seen.append(len(catalogue.models)))
    digest = catalogue.digest
    path = write_gguf(tmp_path / "folder" / "new.gguf")
    await until(lambda: "new:latest" in named(catalogue))
    assert catalogue.digest != digest
    OllamaStore(tmp_path / "store").model("pulled:latest", tmp_path)
    await until(lambda: "pulled:latest" in named(catalogue))
    path.unlink()
    await until(lambda: "new:latest" not in named(catalogue))
    shutil.rmtree(tmp_path / "store")
    await until(lambda: not catalogue.models)
    assert seen[-1] == 0


async def test_the_demo_model_is_written_only_without_other_models(make: Make, tmp_path: Path) -> None:
    calls: list[Path] = []

    def demo(path: Path) -> None:
        calls.append(path)
        write_gguf(path)

    catalogue = make(demo=demo)
    await catalogue.start()
    assert named(catalogue)["demo:latest"].source == "demo"
    await catalogue.close()
    restarted = make(demo=demo)
    await restarted.start()
    assert calls == [tmp_path / "state" / "models" / "demo.gguf"]


async def test_readable_files_take_precedence_over_offered_models(make: Make, tmp_path: Path) -> None:
    OllamaStore(tmp_path / "store").model("here:latest", tmp_path)
    catalogue = make()
    await catalogue.start()
    catalogue.offer(
        tuple(Model(name, "d" * 64, "ollama", (), 1, 0.0) for name in ("here:latest", "hidden:latest"))
    )
    models = named(catalogue)
    assert models["here:latest"].files
    assert not models["hidden:latest"].files
    with pytest.raises(LookupError, match="can't be read"):
        await catalogue.shape("hidden:latest")


async def test_a_failed_load_is_remembered_for_the_content_and_the_build(make: Make, tmp_path: Path) -> None:
    write_gguf(tmp_path / "folder" / "odd.gguf")
    first = make()
    await first.start()
    first.use_build("b1")
    digest = first.models[0].digest
    await first.load_failed(digest, "ggml_cuda: out of memory\nmain: exiting")
    assert first.models[0].only_ollama == ""
    log = (
        "load_tensors: ...\nllama_model_load: error loading model: missing tensor 'blk.0.x'\nmain: exiting\n"
    )
    await first.load_failed(digest, log)
    assert "missing tensor" in first.models[0].only_ollama
    restarted = make()
    await restarted.start()
    restarted.use_build("b1")
    assert "b1 refused" in restarted.models[0].only_ollama
    restarted.use_build("b2")
    assert restarted.models[0].only_ollama == "", "another build may support it"


async def test_watching_continues_after_an_unexpected_error(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scan(root: Path) -> Scan:
        if broken:
            failures.append(root)
            raise ValueError("not foreseen")
        return real(root)

    real, broken = folders.scan_folder, True
    failures: list[Path] = []
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("sollold.models.stores.folders.scan_folder", scan)
    OllamaStore(tmp_path / "store").model("fine:latest", tmp_path)
    catalogue = make()
    await catalogue.start()
    assert failures
    assert set(named(catalogue)) == {"fine:latest"}, "the other stores are scanned"
    assert ["not foreseen" in problem.what for problem in catalogue.problems] == [True]
    broken = False
    write_gguf(tmp_path / "folder" / "Tiny-F16.gguf")
    await catalogue.refresh()
    assert catalogue.problems == ()
    broken = True
    count = len(failures)
    write_gguf(tmp_path / "folder" / "Other-F16.gguf", seed=1)
    await until(lambda: len(failures) > count)
    broken = False
    await until(lambda: "Other:F16" in named(catalogue))


async def test_a_store_under_two_paths_is_scanned_once(make: Make, tmp_path: Path) -> None:
    OllamaStore(tmp_path / "store").model("a:latest", tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "store")
    catalogue = make(settings=ModelSettings(ollama_stores=(str(tmp_path / "link"), str(tmp_path / "store"))))
    await catalogue.start()
    assert set(named(catalogue)) == {"a:latest"}


@pytest.fixture
def hang_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[bool], None]]:
    """A function that makes accesses to ``folder`` and its files block (True), or ends that (False).

    Simulates a network share with an unreachable server.
    """
    reachable = threading.Event()
    reachable.set()

    def blocking(real: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(argument: Any) -> Any:
            if str(tmp_path / "folder") in str(argument):
                reachable.wait()
            return real(argument)

        return call

    monkeypatch.setattr("sollold.models.stores.folders.scan_folder", blocking(folders.scan_folder))
    monkeypatch.setattr(reader, "read_files", blocking(reader.read_files))
    monkeypatch.setattr(scan_result, "_watched", blocking(scan_result._watched))
    monkeypatch.setattr("sollold.models.stores.catalogue._SCAN_SECONDS", 0.05)
    monkeypatch.setattr("sollold.models.stores.header_reader.PATIENCE", 0.05)
    monkeypatch.setattr("sollold.models.stores.store_watcher.SILENT", 0.05)
    yield lambda hang: reachable.clear() if hang else reachable.set()
    reachable.set()


async def test_a_hanging_share_does_not_hide_other_stores(
    make: Make, tmp_path: Path, hang_share: Callable[[bool], None]
) -> None:
    write_gguf(tmp_path / "folder" / "far.gguf")
    store = OllamaStore(tmp_path / "store")
    store.model("here:latest", tmp_path, seed=1)
    hang_share(True)
    catalogue = make()
    async with asyncio.timeout(10):
        await catalogue.start()
        await until(lambda: catalogue.problems)
        assert set(named(catalogue)) == {"here:latest"}
        assert str(tmp_path / "folder") in catalogue.problems[0].what
        store.model("new:latest", tmp_path, seed=2)
        await catalogue.refresh()
        assert set(named(catalogue)) == {"here:latest", "new:latest"}
        hang_share(False)
        await until(lambda: "far:latest" in named(catalogue))
        await until(lambda: not catalogue.problems)


async def test_a_refresh_after_a_cancelled_one_finds_models_added_meanwhile(
    make: Make, tmp_path: Path, hang_share: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = make()
    await catalogue.start()
    await catalogue.close()
    monkeypatch.setattr("sollold.models.stores.catalogue._SCAN_SECONDS", 10.0)
    monkeypatch.setattr("sollold.models.stores.store_watcher.SILENT", 10.0)
    hang_share(True)
    refresh = asyncio.create_task(catalogue.refresh())
    await until(lambda: any(thread.name.endswith("/folder") for thread in threading.enumerate()))
    refresh.cancel()
    await asyncio.gather(refresh, return_exceptions=True)
    write_gguf(tmp_path / "folder" / "new.gguf")
    second_refresh = asyncio.create_task(catalogue.refresh())
    await asyncio.sleep(0)
    hang_share(False)
    await second_refresh
    assert set(named(catalogue)) == {"new:latest"}


async def test_models_of_a_hanging_share_are_unusable_until_it_answers(
    make: Make, tmp_path: Path, hang_share: Callable[[bool], None]
) -> None:
    write_gguf(tmp_path / "folder" / "far.gguf")
    catalogue = make()
    await catalogue.start()
    assert not named(catalogue)["far:latest"].unusable
    hang_share(True)
    before = threading.active_count()
    async with asyncio.timeout(10):
        shapes = [catalogue.shape("far:latest") for _ in range(20)]
        for fault in await asyncio.gather(*shapes, return_exceptions=True):
            assert "does not answer" in str(fault)
        assert threading.active_count() <= before + 2, "callers must not block a thread each"
        await catalogue.refresh()
        await until(lambda: "does not answer" in named(catalogue)["far:latest"].unusable)
        hang_share(False)
        await until(lambda: not named(catalogue)["far:latest"].unusable)
        assert (await catalogue.shape("far:latest")).n_embd == 32


async def test_usable_content_has_the_name_of_a_model_on_a_hanging_share(
    make: Make, tmp_path: Path, hang_share: Callable[[bool], None]
) -> None:
    """As when the model is pulled again; the share's gets the name back."""
    write_gguf(tmp_path / "folder" / "far.gguf", seed=1)
    catalogue = make()
    await catalogue.start()
    first = named(catalogue)["far:latest"].digest
    hang_share(True)
    async with asyncio.timeout(10):
        await asyncio.gather(catalogue.shape("far:latest"), return_exceptions=True)
        OllamaStore(tmp_path / "store").model("far:latest", tmp_path, seed=2)
        await catalogue.refresh()
        await until(lambda: not named(catalogue)["far:latest"].unusable)
        second = named(catalogue)["far:latest"].digest
        assert second != first
        await catalogue.close()
        restarted = make()
        await restarted.start()
        await until(lambda: "far:latest" in named(restarted))
        assert named(restarted)["far:latest"].digest == second
        hang_share(False)
        await until(lambda: named(restarted)["far:latest"].digest == first)
        assert sorted(named(restarted)) == ["far:latest", f"far:latest-{second[:8]}"]


def test_a_name_is_not_older_than_the_clock_that_was_set_later(tmp_path: Path) -> None:
    """Names lead to the content that has had them longest on any node: 1970 would always win."""
    owners = NameOwners(tmp_path / "owners.json")

    def since(now: float) -> float:
        model = Model("x:latest", "1", "own", ("/own/x.gguf",), 1, 0.0)
        ((listed,), _, _) = owners.assign((model,), now, settled=True, reading=False)
        return listed.since

    assert since(20.0) == 0.0
    assert since(1.7e9) == 1.7e9
    assert since(1.8e9) == 1.7e9
    assert since(20.0) == 1.7e9


async def test_a_usable_copy_is_listed_rather_than_one_that_can_not_be_read(tmp_path: Path) -> None:
    owners = NameOwners(tmp_path / "owners.json")
    hung, own = (
        Model("x:latest", "1", "folder", (f"/{place}/x.gguf",), 1, 0.0, unusable=reason)
        for place, reason in (("share", "it does not answer"), ("own", ""))
    )
    for copies in ((hung, own), (own, hung)):
        ((listed,), _, _) = owners.assign(copies, 1.0, settled=True, reading=False)
        assert listed.files == own.files


async def test_hanging_reads_of_a_file_make_its_folder_unusable_until_they_end(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "folder" / "far.gguf")
    catalogue = make()
    await catalogue.start()
    reachable, reads = threading.Event(), 0

    def hanging(paths: Any) -> Any:
        nonlocal reads
        reads += 1
        reachable.wait()
        return read(paths)

    read = reader.read_files
    monkeypatch.setattr(reader, "read_files", hanging)
    monkeypatch.setattr("sollold.models.stores.header_reader.PATIENCE", 0.05)
    try:
        model = named(catalogue)["far:latest"]
        with pytest.raises(LookupError, match="folder does not answer"):
            await catalogue.shape("far:latest")
        monkeypatch.setattr("sollold.models.stores.header_reader.PATIENCE", 60.0)
        async with asyncio.timeout(10):
            assert "folder does not answer" in named(catalogue)["far:latest"].unusable
            (problem,) = catalogue.problems
            assert "folder does not answer, so its models can't be used" in problem.what
            # Callers that already have the model get the error immediately, without further reads.
            for _ in range(2):
                with pytest.raises(LookupError, match="folder does not answer"):
                    await catalogue._headers.shape(model)
            assert reads == 1
            reachable.set()
            await until(lambda: not catalogue.problems and not named(catalogue)["far:latest"].unusable)
            assert (await catalogue.header(model)).metadata
    finally:
        reachable.set()


async def test_a_hanging_projector_does_not_make_the_folder_of_the_weights_unresponsive(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "folder" / "far.gguf")
    catalogue = make()
    await catalogue.start()
    model = replace(
        named(catalogue)["far:latest"], digest="0" * 64, projector=str(tmp_path / "share" / "mmproj.gguf")
    )
    reachable = threading.Event()
    monkeypatch.setattr(reader, "read", lambda path: reachable.wait(30))
    monkeypatch.setattr("sollold.models.stores.header_reader.PATIENCE", 0.05)
    try:
        for ask in (catalogue._headers.shape, catalogue._headers.metadata):
            with pytest.raises(LookupError, match="share does not answer"):
                await ask(model)
        assert catalogue._headers.silent == {tmp_path / "share"}
        assert not named(catalogue)["far:latest"].unusable
    finally:
        reachable.set()


async def test_unchanged_stores_are_checked_in_a_single_thread(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "folder" / "a.gguf")
    catalogue = make()
    await catalogue.start()
    await catalogue.close()
    started: list[str] = []

    def counted(work: Callable[[], Any], *, name: str) -> asyncio.Future[Any]:
        started.append(name)
        return in_own_thread(work, name=name)

    monkeypatch.setattr("sollold.models.stores.store_watcher.in_own_thread", counted)
    assert not await catalogue._scan_if_changed()
    assert len(catalogue._stores) > 2 and started == ["look at the stores"]
    write_gguf(tmp_path / "folder" / "b.gguf")
    assert await catalogue._scan_if_changed()
    assert started[1:] == ["look at the stores", f"look at {tmp_path / 'folder'}"]
    assert set(named(catalogue)) == {"a:latest", "b:latest"}


async def test_a_share_that_hangs_during_a_check_for_changes_does_not_hide_other_stores(
    make: Make, tmp_path: Path, hang_share: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "folder" / "far.gguf")
    store = OllamaStore(tmp_path / "store")
    store.model("here:latest", tmp_path, seed=1)
    monkeypatch.setattr("sollold.models.stores.store_watcher._CHECK_SECONDS", 0.05)
    catalogue = make()
    await catalogue.start()
    assert set(named(catalogue)) == {"far:latest", "here:latest"}
    hang_share(True)
    async with asyncio.timeout(10):
        await until(lambda: "does not answer" in named(catalogue)["far:latest"].unusable)
        threads = threading.active_count()
        store.model("new:latest", tmp_path, seed=2)
        await until(lambda: "new:latest" in named(catalogue))
        assert not named(catalogue)["here:latest"].unusable
        assert threading.active_count() <= threads + 1, "a hanging share is not checked again"
        hang_share(False)
        await until(lambda: not named(catalogue)["far:latest"].unusable)


async def test_a_card_with_an_invalid_name_is_ignored(make: Make, tmp_path: Path) -> None:
    catalogue = make()
    path = write_gguf(catalogue.own / "x" / "model.gguf")
    card = Model("no name", "d", "own", (), 1, 0.0)
    path.with_name(folders.CARD).write_bytes(msgspec.json.encode(card))
    await catalogue.start()
    assert [model.name for model in catalogue.models] == ["model:latest"]


def test_a_name_of_maximal_length_gets_a_digest_suffix() -> None:
    name = f"{'a' * 300}:{'b' * 49}"
    assert len(name) == 350
    other = name_with_digest(name, "c0ffee00" * 8)
    assert parse(other).tag.endswith("-c0ffee00")


async def test_a_failure_to_read_any_folder_is_reported_as_a_problem(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example if no thread can be started: without the problem, models would be missing silently."""
    write_gguf(tmp_path / "folder" / "here.gguf")

    def fail(work: object, *, name: str) -> None:
        raise RuntimeError("can't start new thread")

    catalogue = make()
    with monkeypatch.context() as patch:
        patch.setattr("sollold.models.stores.store_watcher.in_own_thread", fail)
        await catalogue.start()
        assert not catalogue.models
        assert "can't start new thread" in catalogue.problems[0].what
    await until(lambda: "here:latest" in named(catalogue))
    await until(lambda: not catalogue.problems)
