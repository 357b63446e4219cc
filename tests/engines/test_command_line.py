"""The command line of llama-server for a plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

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
LLAMA = Llama(Path("/l/llama-server"), Path("/l/ggml-rpc-server"), "b1", FLAGS)
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
WORKERS = [
    WorkerAddress("c", 7001, ("CUDA1", "CUDA0")),
    WorkerAddress("b", 7002, ("CPU",)),
    WorkerAddress("a", 7003, ("CPU",)),
]

KEY_FILE = Path("/state/engine_keys/18080.key")


def line(plan: Plan = PLAN, model: Model = MODEL, llama: Llama = LLAMA, **more: Any) -> list[str]:
    workers = WORKERS if plan.shares else []
    return command_line(plan, model, llama, workers, port=18080, key_file=KEY_FILE, threads=4, **more)


def after(arguments: list[str], option: str) -> str:
    """The argument that follows an option, which must occur once."""
    assert arguments.count(option) == 1
    return arguments[arguments.index(option) + 1]


def test_workers_are_started_on_all_nodes_with_remote_or_cpu_layers() -> None:
    assert worker_nodes(PLAN) == ("c", "b", "a")
    assert worker_devices(PLAN, "c") == ("CUDA1", "CUDA0")
    assert worker_devices(PLAN, "a") == ("CPU",), "the head's GPU needs no worker"


def test_devices_are_in_the_order_of_layers() -> None:
    assert device_names(PLAN, WORKERS) == ("RPC0", "RPC2", "RPC1", "CUDA0", "RPC3")


def test_the_arguments_of_a_spread_plan() -> None:
    arguments = line(extra=("--mlock",))
    assert after(arguments, "--rpc") == "127.0.0.1:7001,127.0.0.1:7002,127.0.0.1:7003"
    assert arguments.index("--rpc") < arguments.index("--device")
    assert after(arguments, "--device") == "RPC0,RPC2,RPC1,CUDA0,RPC3"
    assert after(arguments, "--tensor-split") == "2,1,2,2,1"
    assert after(arguments, "--gpu-layers") == "8"
    assert after(arguments, "--fit") == "off"
    assert after(arguments, "--cache-ram") == "0"
    assert after(arguments, "--ctx-checkpoints") == "0"
    assert after(arguments, "--host") == "127.0.0.1"
    assert after(arguments, "--model") == "/m/one.gguf"
    assert after(arguments, "--alias") == "m:latest"
    assert (after(arguments, "--ctx-size"), after(arguments, "--parallel")) == ("4096", "4")
    assert (after(arguments, "--cache-type-k"), after(arguments, "--cache-type-v")) == ("q8_0", "q8_0")
    assert "--no-kv-unified" in arguments
    assert "--embedding" not in arguments
    assert arguments[-1] == "--mlock"


def test_external_workers_keep_their_address_and_all_their_devices_are_counted() -> None:
    shares = (share("a", "pc:50052#2/3", 1, 4), share("b", "CPU", 4, 6), share("b", "10.0.0.7:1", 6, 9))
    mixed = replace(PLAN, shares=shares)
    assert worker_nodes(mixed) == ("b",)
    assert worker_devices(mixed, "a") == (), "no worker is started for external ones"
    external = external_workers(mixed)
    assert external == (
        ("a", "pc:50052", ("pc:50052#1/3", "pc:50052#2/3", "pc:50052#3/3")),
        ("b", "10.0.0.7:1", ("10.0.0.7:1",)),
    )
    workers = [
        WorkerAddress("b", 7002, ("CPU",)),
        WorkerAddress("a", 50052, external[0][2], "pc"),
        WorkerAddress("b", 7003, external[1][2]),
    ]
    with_projector = replace(MODEL, projector="/m/eyes.gguf")
    arguments = command_line(mixed, with_projector, LLAMA, workers, port=18080, key_file=KEY_FILE, threads=4)
    assert after(arguments, "--rpc") == "127.0.0.1:7002,pc:50052,127.0.0.1:7003"
    assert after(arguments, "--device") == "RPC2,RPC0,RPC4"
    assert "--no-mmproj-offload" in arguments, "an external worker is not a GPU of the head"


def test_the_arguments_of_a_plan_for_the_hosts_cpu() -> None:
    arguments = line(replace(PLAN, host=share("a", "CPU", 0, 9), shares=()))
    assert after(arguments, "--device") == "none"
    assert after(arguments, "--gpu-layers") == "0"
    assert "--rpc" not in arguments
    assert "--tensor-split" not in arguments


def test_the_number_of_checkpoints_is_that_of_the_plan() -> None:
    arguments = line(replace(PLAN, run=replace(RUN, checkpoints=3)))
    assert after(arguments, "--ctx-checkpoints") == "3"


def test_the_number_of_layers_with_experts_on_the_cpu() -> None:
    assert after(line(replace(PLAN, cpu_moe=5)), "--n-cpu-moe") == "5"
    assert "--n-cpu-moe" not in line()


def test_drafting_by_ngrams() -> None:
    plan = replace(PLAN, run=replace(RUN, drafts=8), drafts_by="ngram")
    assert "--spec-type" not in line(plan), "the build does not support it"
    arguments = line(plan, llama=replace(LLAMA, flags=FLAGS | {"--spec-ngram-simple-size-m"}))
    assert after(arguments, "--spec-type") == "ngram-simple"
    assert after(arguments, "--spec-ngram-simple-size-m") == "8"


def test_drafting_by_the_models_own_layer() -> None:
    plan = replace(PLAN, run=replace(RUN, drafts=2, predicts=True), drafts_by="mtp")
    assert "--spec-type" not in line(plan)
    flags = FLAGS | {"--spec-ngram-simple-size-m"}
    assert "--spec-type" not in line(plan, llama=replace(LLAMA, flags=flags)), "the build does not support it"
    arguments = line(plan, llama=replace(LLAMA, flags=flags | {"draft-mtp"}))
    assert (after(arguments, "--spec-type"), after(arguments, "--spec-draft-n-max")) == ("draft-mtp", "2")
    # The plan counts the cache with these types, and no samplers in the backend.
    assert after(arguments, "--spec-draft-type-k") == "q8_0"
    assert "--no-spec-draft-backend-sampling" in arguments
    assert "--spec-draft-model" not in arguments and "--spec-draft-device" not in arguments


def test_drafting_by_another_model_on_the_heads_own_device() -> None:
    llama = replace(LLAMA, flags=FLAGS | {"--spec-ngram-simple-size-m"})
    draft = replace(MODEL, files=("/m/small.gguf",))
    plan = replace(PLAN, run=replace(RUN, drafts=3), drafts_by="small", draft_digest="d2")
    arguments = line(replace(plan, draft_device="CUDA0"), llama=llama, draft=draft)
    assert after(arguments, "--spec-draft-model") == "/m/small.gguf"
    assert after(arguments, "--spec-draft-n-max") == "3"
    assert after(arguments, "--spec-draft-type-k") == "q8_0"
    assert (after(arguments, "--spec-draft-device"), after(arguments, "--spec-draft-ngl")) == ("CUDA0", "all")
    arguments = line(replace(plan, draft_device="CPU"), llama=llama, draft=draft)
    assert (after(arguments, "--spec-draft-device"), after(arguments, "--spec-draft-ngl")) == ("none", "0")


def test_options_that_the_build_does_not_support_are_left_out() -> None:
    arguments = line(llama=replace(LLAMA, flags=frozenset()))
    assert not {"--fit", "--cache-ram", "--no-webui", "--slots"} & set(arguments)


def test_the_arguments_for_projector_adapters_and_embeddings() -> None:
    model = replace(MODEL, projector="/m/eyes.gguf", adapters=("/m/a.gguf", "/m/b,c.gguf"))
    arguments = line(replace(PLAN, run=replace(RUN, embedding=True, unified=True)), model)
    assert after(arguments, "--mmproj") == "/m/eyes.gguf"
    assert after(arguments, "--lora") == '/m/a.gguf,"/m/b,c.gguf"'
    assert "--embedding" in arguments
    assert "--kv-unified" in arguments


def test_the_projector_stays_on_the_head() -> None:
    model = replace(MODEL, projector="/m/eyes.gguf")
    old = replace(LLAMA, flags=frozenset())
    first = replace(PLAN, shares=PLAN.shares[3:])
    without = replace(PLAN, shares=PLAN.shares[:3])
    assert after(line(model=model), "--mmproj-device") == "CUDA0"
    assert "--no-mmproj-offload" not in line(model=model)
    assert "--no-mmproj-offload" in line(without, model), "llama-server would use the first device, a worker"
    assert "--no-mmproj-offload" in line(model=model, llama=old)
    assert not {"--no-mmproj-offload", "--mmproj-device"} & set(line(first, model, old))
    assert "--no-mmproj-offload" in line(replace(PLAN, host=share("a", "CPU", 0, 9), shares=()), model)


def test_the_argument_for_a_reranker() -> None:
    run = replace(RUN, embedding=True)
    arguments = line(replace(PLAN, run=run), replace(MODEL, capabilities=("embedding", "rerank")))
    assert "--reranking" in arguments and "--embedding" not in arguments and "--pooling" not in arguments


def test_progress_is_read_from_llama_servers_output() -> None:
    line_format = 'cmd_child_to_router:state:{"state":"loading","payload":{"stages":["text","eyes"],'
    line_format += '"current":"%s","value":%s}}'
    assert progress_in(line_format % ("text", 0.5)) == 0.25
    assert progress_in(line_format % ("eyes", 0.5)) == 0.75
    assert progress_in(line_format % ("other", 7)) == 1.0
    assert progress_in("0.00.1 I srv  load_model: loading model") is None
    assert progress_in('cmd_child_to_router:state:{"state":"ready","payload":{"id":"x"}}') is None
    assert progress_in("cmd_child_to_router:state:[") is None
    assert progress_in('cmd_child_to_router:state:{"state":"loading","payload":{"value":"x"}}') is None
