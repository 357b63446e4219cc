// Talks with a node through the npm clients and prints what they understood as JSON.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [folder, url] = process.argv.slice(2);
const require = createRequire(pathToFileURL(`${folder}/`));
const { Ollama } = require("ollama");
const OpenAI = require("openai").default;

const messages = [{ role: "user", content: "Who are you?" }];
const tool = {
  type: "function",
  function: {
    name: "get_time",
    description: "The time of day",
    parameters: { type: "object", properties: { zone: { type: "string" } }, required: ["zone"] },
  },
};
const out = {};

const ollama = new Ollama({ host: url });
out.version = (await ollama.version()).version;
out.models = (await ollama.list()).models.map((one) => one.name);
out.chat = (await ollama.chat({ model: "demo", messages })).message.content;
out.chatStreamed = "";
for await (const part of await ollama.chat({ model: "demo", messages, stream: true })) {
  out.chatStreamed += part.message.content;
  out.chatDone = part.done;
}
out.generated = "";
for await (const part of await ollama.generate({ model: "demo", prompt: "x", stream: true })) out.generated += part.response;
out.call = (await ollama.chat({ model: "call", messages, tools: [tool] })).message.tool_calls[0].function.arguments;
out.thinking = (await ollama.chat({ model: "think", messages, think: true })).message.thinking;
out.embedded = (await ollama.embed({ model: "embed", input: ["one", "two"] })).embeddings.length;
out.missing = await ollama.chat({ model: "nothing", messages }).catch((error) => error.message);

const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
out.openai = (await openai.chat.completions.create({ model: "demo", messages })).choices[0].message.content;
out.openaiStreamed = "";
const stream = await openai.chat.completions.create({
  model: "demo", messages, stream: true, stream_options: { include_usage: true },
});
for await (const part of stream) {
  out.openaiStreamed += part.choices[0]?.delta?.content ?? "";
  if (part.usage) out.openaiTokens = part.usage.completion_tokens;
}
const called = await openai.chat.completions.create({ model: "call", messages, tools: [tool] });
out.openaiCall = JSON.parse(called.choices[0].message.tool_calls[0].function.arguments);
out.responses = (await openai.responses.create({ model: "demo", input: "Who are you?" })).output_text;
out.responsesStreamed = "";
for await (const event of await openai.responses.create({ model: "demo", input: "Who are you?", stream: true })) {
  if (event.type === "response.output_text.delta") out.responsesStreamed += event.delta;
}
out.openaiEmbedded = (await openai.embeddings.create({ model: "embed", input: "one" })).data[0].embedding.length;
out.openaiMissing = await openai.chat.completions.create({ model: "nothing", messages }).catch((error) => error.status);

console.log(JSON.stringify(out));
