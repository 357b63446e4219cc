// Calls a node through the npm clients and prints their results as JSON: client → feature → [whole, streamed].
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [folder, url, picture] = process.argv.slice(2);
const require = createRequire(pathToFileURL(`${folder}/`));
const { Ollama } = require("ollama");
const OpenAI = require("openai").default;

const messages = [{ role: "user", content: "Who are you?" }];
const parameters = { type: "object", properties: { zone: { type: "string" } }, required: ["zone"] };
const tool = { type: "function", function: { name: "get_time", description: "The time of day", parameters } };
const schema = {
  type: "object",
  properties: { age: { type: "integer", minimum: 0, maximum: 99 }, tall: { type: "boolean" } },
  required: ["age", "tall"],
};

async function all(parts, read) {
  const values = [];
  for await (const part of await parts) values.push(read(part));
  return values.filter((value) => value !== undefined && value !== null);
}
const joined = async (parts, read) => (await all(parts, read)).join("");

async function withOllama() {
  const client = new Ollama({ host: url });
  const chat = (options) => client.chat({ messages, ...options });
  const streamed = (options) => client.chat({ messages, ...options, stream: true });
  const withImage = [{ ...messages[0], images: [picture] }];
  const out = {};
  out.version = (await client.version()).version;
  out.models = (await client.list()).models.map((model) => model.name);
  out.chat = [
    (await chat({ model: "demo" })).message.content,
    await joined(streamed({ model: "demo" }), (part) => part.message.content),
  ];
  out.done = await all(streamed({ model: "demo" }), (part) => part.done);
  out.generate = [
    (await client.generate({ model: "demo", prompt: "x" })).response,
    await joined(client.generate({ model: "demo", prompt: "x", stream: true }), (part) => part.response),
  ];
  const call = { model: "call", tools: [tool] };
  out.tools = [
    (await chat(call)).message.tool_calls[0].function.arguments,
    (await all(streamed(call), (part) => part.message.tool_calls?.[0]))[0].function.arguments,
  ];
  const think = { model: "think", think: true };
  out.thinking = [
    (await chat(think)).message.thinking,
    await joined(streamed(think), (part) => part.message.thinking),
  ];
  const random = { model: "random", format: schema };
  out.schema = [
    JSON.parse((await chat(random)).message.content),
    JSON.parse(await joined(streamed(random), (part) => part.message.content)),
  ];
  const see = { model: "see", messages: withImage };
  out.images = [
    (await chat(see)).message.content,
    await joined(streamed(see), (part) => part.message.content),
  ];
  out.embedded = (await client.embed({ model: "embed", input: ["one", "two"] })).embeddings.length;
  out.missing = await chat({ model: "nothing" }).catch((error) => error.message);
  return out;
}

async function withOpenai() {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
  const chat = (options) => client.chat.completions.create({ messages, ...options });
  const message = async (options) => (await chat(options)).choices[0].message;
  const deltas = (options, read) => joined(chat({ ...options, stream: true }), (part) => read(part.choices[0]?.delta ?? {}));
  const content = (delta) => delta.content;
  const withImage = [
    {
      role: "user",
      content: [
        { type: "text", text: "What is this?" },
        { type: "image_url", image_url: { url: `data:image/png;base64,${picture}` } },
      ],
    },
  ];
  const out = {};
  out.chat = [(await message({ model: "demo" })).content, await deltas({ model: "demo" }, content)];
  out.tokens = [
    (await chat({ model: "demo" })).usage.completion_tokens,
    (await all(
      chat({ model: "demo", stream: true, stream_options: { include_usage: true } }),
      (part) => part.usage?.completion_tokens,
    ))[0],
  ];
  const call = { model: "call", tools: [tool] };
  out.tools = [
    JSON.parse((await message(call)).tool_calls[0].function.arguments),
    JSON.parse(await deltas(call, (delta) => delta.tool_calls?.[0]?.function?.arguments)),
  ];
  out.thinking = [
    (await message({ model: "think" })).reasoning_content,
    await deltas({ model: "think" }, (delta) => delta.reasoning_content),
  ];
  const random = {
    model: "random",
    response_format: { type: "json_schema", json_schema: { name: "person", schema } },
  };
  out.schema = [JSON.parse((await message(random)).content), JSON.parse(await deltas(random, content))];
  const see = { model: "see", messages: withImage };
  out.images = [(await message(see)).content, await deltas(see, content)];
  const request = { model: "demo", input: "Who are you?" };
  out.responses = [
    (await client.responses.create(request)).output_text,
    await joined(client.responses.create({ ...request, stream: true }), (event) =>
      event.type === "response.output_text.delta" ? event.delta : undefined,
    ),
  ];
  out.embedded = (await client.embeddings.create({ model: "embed", input: "one" })).data[0].embedding.length;
  out.models = (await all(client.models.list(), (model) => model.id));
  out.missing = await chat({ model: "nothing" }).catch((error) => error.status);
  return out;
}

console.log(JSON.stringify({ ollama: await withOllama(), openai: await withOpenai() }));
