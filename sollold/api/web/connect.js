// Settings to copy for common client programs, filled in with this node's address.

import { copyButton, el, setText } from "./dom.js";
import { base } from "./http.js";
import { refreshModels, state } from "./store.js";

const programs = (base, model) => [
  ["curl", "Ollama's API:", `curl ${base}/api/chat -d '{"model": "${model}", "messages": [{"role": "user", "content": "Hello"}]}'`],
  ["ollama", "The ollama command, with this node as its server:", `OLLAMA_HOST=${base} ollama run ${model}`],
  ["Open WebUI", "As its Ollama server; or under Settings → Connections:", `docker run -d -p 3000:8080 -e OLLAMA_BASE_URL=${base} ghcr.io/open-webui/open-webui:main`],
  ["Continue", "In ~/.continue/config.yaml:", `models:\n  - name: ${model}\n    provider: ollama\n    model: ${model}\n    apiBase: ${base}`],
  ["Claude Code", "It uses Anthropic's API. For a model loaded with --context 32768; with more, change the number, and from 65536 on omit the last export:", `export ANTHROPIC_BASE_URL=${base}\nexport ANTHROPIC_AUTH_TOKEN=none\nexport ANTHROPIC_MODEL=${model}\nexport ANTHROPIC_DEFAULT_HAIKU_MODEL=${model}\nexport CLAUDE_CODE_MAX_CONTEXT_TOKENS=32768\nexport CLAUDE_CODE_MAX_OUTPUT_TOKENS=4096\nclaude`],
  ["Codex", "In ~/.codex/config.toml, for a model loaded with --context 32768:", `model = "${model}"\nmodel_provider = "sollold"\nmodel_context_window = 32768\n\n[model_providers.sollold]\nname = "sollold"\nbase_url = "${base}/v1"\nwire_api = "responses"`],
  ["Python, openai", "pip install openai", `from openai import OpenAI\n\nclient = OpenAI(base_url="${base}/v1", api_key="none")\nanswer = client.chat.completions.create(\n    model="${model}", messages=[{"role": "user", "content": "Hello"}]\n)\nprint(answer.choices[0].message.content)`],
  ["Python, ollama", "pip install ollama", `from ollama import Client\n\nclient = Client(host="${base}")\nanswer = client.chat(model="${model}", messages=[{"role": "user", "content": "Hello"}])\nprint(answer.message.content)`],
  ["LangChain", "pip install langchain-ollama", `from langchain_ollama import ChatOllama\n\nmodel = ChatOllama(model="${model}", base_url="${base}")\nprint(model.invoke("Hello").content)`],
];

export function connectView(place) {
  const choice = el("select", { id: "connect-model" });
  const list = el("div", { class: "snippets" });
  const label = el("label", { class: "inline", for: "connect-model", text: "with the model" });
  const none = el("p", { class: "empty", hidden: true }, "There is no model yet: replace MODEL with the name of one, once you have ",
    el("a", { href: "#/models", text: "pulled it" }), ".");
  place.append(el("div", { class: "title-row" }, el("h1", { text: "Connect" }), label, choice), none,
    el("p", { class: "dim" }, "Every node answers for the whole cluster; this one is ", el("code", { text: base }),
      ". If the cluster requires a key, create one under ", el("a", { href: "#/keys", text: "Keys" }), " and use it instead of ", el("code", { text: "none" }), "."), list);
  const boxes = programs("", "").map(([title]) => {
    const words = el("p", { class: "dim small" });
    const code = el("pre", { tabindex: "0" });
    list.append(el("section", { class: "panel snippet" }, el("div", { class: "snippet-head" }, el("h2", { text: title }), copyButton(() => code.textContent)), words, code));
    return [words, code];
  });
  const draw = () => {
    // Characters that would break a shell command or a string are removed; such names are refused anyway.
    const model = (choice.value || "MODEL").replace(/["'\\`$\n]/g, "");
    programs(base, model).forEach(([, words, code], at) => {
      setText(boxes[at][0], words);
      setText(boxes[at][1], code);
    });
  };
  choice.addEventListener("change", draw);
  draw();
  refreshModels().then(() => {
    const able = state.models.filter((one) => !one.unusable && (one.capabilities || []).includes("completion"));
    none.hidden = able.length > 0;
    choice.hidden = label.hidden = !able.length;
    choice.replaceChildren(...able.map((one) => el("option", { value: one.name.replace(/:latest$/, ""), text: one.name.replace(/:latest$/, "") })));
    draw();
  }).catch(() => {});
}
