from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sollold.engines.install.find import Llama
from sollold.engines.llamacpp.command_line import (
    WorkerAddress,
    command_line,
    device_names,
    external_workers,
    worker_devices,
    worker_nodes,
)
from sollold.engines.llamacpp.llama_server import progress_in
from sollold.models.footprint.run_options import Run
from sollold.models.model import Model
from sollold.placement.plan import Plan, Share

FLAGS = frozenset(
    {
        *("--fit", "--cache-ram", "--ctx-checkpoints", "--no-kv-unified", "--kv-unified", "--no-webui"),
        *("--slots", "--mmproj-device", "--n-cpu-moe"),
    }
)
LLAMA = Llama(Path("/l/llama-server"), Path("/l/ggml-rpc-server"), "b1", "c", FLAGS)
MODEL = Model("m:latest", "d", "folder", ("/m/one.gguf", "/m/two.gguf"), 1, 0.0, layers=8)
RUN = Run(context=4096, slots=4, type_k="q8_0", type_v="q8_0")


def share(node: str, device: str, first: int, last: int) -> Share:
    return Share(node, device, first, last, 1, 0, 0)


PLAN = Plan(
    "m:latest",
    "d",
    "a",
    8,
    RUN,
    share("a", "CPU", 0, 1),
    (
        share("c", "CUDA1", 1, 3),
        share("b", "CPU", 3, 4),
        share("c", "CUDA0", 4, 6),
        share("a", "CUDA0", 6, 8),
        share("a", "CPU", 8, 9),
    ),
)
REACH = [
    WorkerAddress("c", 7001, ("CUDA1", "CUDA0")),
    WorkerAddress("b", 7002, ("CPU",)),
    WorkerAddress("a", 7003, ("CPU",)),
]

KEY_FILE = Path("/state/engine_keys/18080.key")


def line(plan: Plan = PLAN, model: Model = MODEL, llama: Llama = LLAMA, **more: object) -> list[str]:
    reach = REACH if plan.shares else []
    return command_line(plan, model, llama, reach, port=18080, key_file=KEY_FILE, threads=4, **more)  # type: ignore[arg-type]


def after(words: list[str], option: str) -> str:
    assert words.count(option) == 1
    return words[words.index(option) + 1]


def test_who_starts_a_worker_over_what():
    assert worker_nodes(PLAN) == ("c", "b", "a")
    assert worker_devices(PLAN, "c") == ("CUDA1", "CUDA0")
    assert worker_devices(PLAN, "a") == ("CPU",), "the head's GPU needs no worker"


def test_devices_are_named_in_the_order_of_layers():
    assert device_names(PLAN, REACH) == ("RPC0", "RPC2", "RPC1", "CUDA0", "RPC3")


def test_a_spread_plan():
    words = line(extra=("--mlock",))
    assert after(words, "--rpc") == "127.0.0.1:7001,127.0.0.1:7002,127.0.0.1:7003"
    assert words.index("--rpc") < words.index("--device")
    assert after(words, "--device") == "RPC0,RPC2,RPC1,CUDA0,RPC3"
    assert after(words, "--tensor-split") == "2,1,2,2,1"
    assert after(words, "--gpu-layers") == "8"
    assert after(words, "--fit") == "off"
    assert after(words, "--cache-ram") == "0"
    assert after(words, "--ctx-checkpoints") == "0"
    assert after(words, "--host") == "127.0.0.1"
    assert after(words, "--model") == "/m/one.gguf"
    assert after(words, "--alias") == "m:latest"
    assert (after(words, "--ctx-size"), after(words, "--parallel")) == ("4096", "4")
    assert (after(words, "--cache-type-k"), after(words, "--cache-type-v")) == ("q8_0", "q8_0")
    assert "--no-kv-unified" in words
    assert "--embedding" not in words
    assert words[-1] == "--mlock"


def test_plain_workers_are_reached_at_their_own_address_and_all_their_devices_are_counted():
    shares = (share("a", "pc:50052#2/3", 1, 4), share("b", "CPU", 4, 6), share("b", "10.0.0.7:1", 6, 9))
    mixed = replace(PLAN, shares=shares)
    assert worker_nodes(mixed) == ("b",)
    assert worker_devices(mixed, "a") == (), "nobody starts a worker for what others have started"
    plain = external_workers(mixed)
    assert plain == (
        ("a", "pc:50052", ("pc:50052#1/3", "pc:50052#2/3", "pc:50052#3/3")),
        ("b", "10.0.0.7:1", ("10.0.0.7:1",)),
    )
    reach = [
        WorkerAddress("b", 7002, ("CPU",)),
        WorkerAddress("a", 50052, plain[0][2], "pc"),
        WorkerAddress("b", 7003, plain[1][2]),
    ]
    eyed = replace(MODEL, projector="/m/eyes.gguf")
    words = command_line(mixed, eyed, LLAMA, reach, port=18080, key_file=KEY_FILE, threads=4)
    assert after(words, "--rpc") == "127.0.0.1:7002,pc:50052,127.0.0.1:7003"
    assert after(words, "--device") == "RPC2,RPC0,RPC4"
    assert "--no-mmproj-offload" in words, "an external worker is no GPU of the head's"


def test_a_plan_for_the_hosts_processor_alone():
    words = line(replace(PLAN, host=share("a", "CPU", 0, 9), shares=()))
    assert after(words, "--device") == "none"
    assert after(words, "--gpu-layers") == "0"
    assert "--rpc" not in words
    assert "--tensor-split" not in words


def test_as_many_checkpoints_are_kept_as_were_planned():
    words = line(replace(PLAN, run=replace(RUN, checkpoints=3)))
    assert after(words, "--ctx-checkpoints") == "3"


def test_experts_that_stay_with_the_processor():
    assert after(line(replace(PLAN, cpu_moe=5)), "--n-cpu-moe") == "5"
    assert "--n-cpu-moe" not in line()


def test_drafts_from_the_conversation_itself():
    plan = replace(PLAN, run=replace(RUN, drafts=8), drafts_by="ngram")
    assert "--spec-type" not in line(plan), "the build does not know it"
    words = line(plan, llama=replace(LLAMA, flags=FLAGS | {"--spec-ngram-simple-size-m"}))
    assert after(words, "--spec-type") == "ngram-simple"
    assert after(words, "--spec-ngram-simple-size-m") == "8"


def test_drafts_by_the_models_own_layer():
    plan = replace(PLAN, run=replace(RUN, drafts=2, predicts=True), drafts_by="mtp")
    assert "--spec-type" not in line(plan)
    flags = FLAGS | {"--spec-ngram-simple-size-m"}
    assert "--spec-type" not in line(plan, llama=replace(LLAMA, flags=flags)), "the build does not know it"
    words = line(plan, llama=replace(LLAMA, flags=flags | {"draft-mtp"}))
    assert (after(words, "--spec-type"), after(words, "--spec-draft-n-max")) == ("draft-mtp", "2")
    # Its cache is what the plan has counted, and so are its samplers.
    assert after(words, "--spec-draft-type-k") == "q8_0"
    assert "--no-spec-draft-backend-sampling" in words
    assert "--spec-draft-model" not in words and "--spec-draft-device" not in words


def test_drafts_by_another_model_on_the_heads_own_device():
    llama = replace(LLAMA, flags=FLAGS | {"--spec-ngram-simple-size-m"})
    draft = replace(MODEL, files=("/m/small.gguf",))
    plan = replace(PLAN, run=replace(RUN, drafts=3), drafts_by="small", draft_digest="d2")
    words = line(replace(plan, draft_device="CUDA0"), llama=llama, draft=draft)
    assert after(words, "--spec-draft-model") == "/m/small.gguf"
    assert after(words, "--spec-draft-n-max") == "3"
    assert after(words, "--spec-draft-type-k") == "q8_0"
    assert (after(words, "--spec-draft-device"), after(words, "--spec-draft-ngl")) == ("CUDA0", "all")
    words = line(replace(plan, draft_device="CPU"), llama=llama, draft=draft)
    assert (after(words, "--spec-draft-device"), after(words, "--spec-draft-ngl")) == ("none", "0")


def test_what_a_build_does_not_know_it_is_not_told():
    words = line(llama=replace(LLAMA, flags=frozenset()))
    assert not {"--fit", "--cache-ram", "--no-webui", "--slots"} & set(words)


def test_projector_adapters_and_embeddings():
    model = replace(MODEL, projector="/m/eyes.gguf", adapters=("/m/a.gguf", "/m/b,c.gguf"))
    words = line(replace(PLAN, run=replace(RUN, embedding=True, unified=True)), model)
    assert after(words, "--mmproj") == "/m/eyes.gguf"
    assert after(words, "--lora") == '/m/a.gguf,"/m/b,c.gguf"'
    assert "--embedding" in words
    assert "--kv-unified" in words


def test_the_projector_stays_on_the_head():
    model = replace(MODEL, projector="/m/eyes.gguf")
    old = replace(LLAMA, flags=frozenset())
    first = replace(PLAN, shares=PLAN.shares[3:])
    without = replace(PLAN, shares=PLAN.shares[:3])
    assert after(line(model=model), "--mmproj-device") == "CUDA0"
    assert "--no-mmproj-offload" not in line(model=model)
    assert "--no-mmproj-offload" in line(without, model), "it would go to the first device, a worker"
    assert "--no-mmproj-offload" in line(model=model, llama=old)
    assert not {"--no-mmproj-offload", "--mmproj-device"} & set(line(first, model, old))
    assert "--no-mmproj-offload" in line(replace(PLAN, host=share("a", "CPU", 0, 9), shares=()), model)


def test_a_reranker_is_started_as_one():
    run = replace(RUN, embedding=True)
    words = line(replace(PLAN, run=run), replace(MODEL, capabilities=("embedding", "rerank")))
    assert "--reranking" in words and "--embedding" not in words and "--pooling" not in words


def test_progress_in_llama_servers_output():
    told = 'cmd_child_to_router:state:{"state":"loading","payload":{"stages":["text","eyes"],'
    told += '"current":"%s","value":%s}}'
    assert progress_in(told % ("text", 0.5)) == 0.25
    assert progress_in(told % ("eyes", 0.5)) == 0.75
    assert progress_in(told % ("other", 7)) == 1.0
    assert progress_in("0.00.1 I srv  load_model: loading model") is None
    assert progress_in('cmd_child_to_router:state:{"state":"ready","payload":{"id":"x"}}') is None
    assert progress_in("cmd_child_to_router:state:[") is None
    assert progress_in('cmd_child_to_router:state:{"state":"loading","payload":{"value":"x"}}') is None
